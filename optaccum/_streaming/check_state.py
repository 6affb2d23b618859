"""Whether a state, restored perhaps, is one of this transformation."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaccum._dtypes import AccumulatorDType, accumulator_dtype_of
from optaccum._noise_scale import NoiseScaleState
from optaccum._streaming.state import AccumulateState, states_in

ADVICE = "Restore it with the options that it was saved with, or start from init."


def check_is_state(state: Any) -> None:
    """Raises, with the way out, for what is no state of `optaccum.accumulate`."""
    if isinstance(state, AccumulateState):
        return
    advice = "Pass what this transformation's init, or its last call, returned; (grads, state, params) is the order."
    if isinstance(state, optax.MultiStepsState):
        advice = "optaccum.from_multi_steps goes on from it."
    elif states_in(state):
        advice = (
            "It holds one: update, or flush, the whole transformation that it belongs to, or that one alone."
        )
    raise TypeError(f"expected an optaccum.AccumulateState, got {type(state).__name__}. {advice}")


def check_state(
    state: AccumulateState,
    accumulator_dtype: AccumulatorDType,
    averaged_extra_args: tuple[str, ...],
    track_noise_scale: bool,
) -> None:
    """Raises, by name, where a state lacks what an option keeps, or would round what it adds up."""
    kept = dict(state.extra_sums)
    if set(averaged_extra_args) != set(kept):
        raise ValueError(
            f"averaged_extra_args expects a state with sums of {sorted(averaged_extra_args)}, got {sorted(kept)}. "
            f"{ADVICE}"
        )
    if track_noise_scale and not isinstance(state.noise_state, NoiseScaleState):
        raise ValueError(f"track_noise_scale expects a state that keeps it, got none. {ADVICE}")
    for path, total in jax.tree.leaves_with_path(state.grad_sum):
        if accumulator_dtype is None or not jnp.issubdtype(total.dtype, jnp.floating):
            continue
        expected = accumulator_dtype_of(accumulator_dtype, path, total)
        if jnp.finfo(total.dtype).bits < jnp.finfo(expected).bits:
            raise ValueError(
                f"the state's grad_sum at {jax.tree_util.keystr(path) or 'the root'} is {total.dtype}, "
                f"accumulator_dtype asks for {expected}. {ADVICE}"
            )


def explain_inner_state(
    inner: optax.GradientTransformationExtraArgs, inner_state: Any, params: optax.Params | None
) -> str | None:
    """How `inner_state` differs from what `inner` makes for `params`; None where that cannot be told."""
    if params is None:
        return None
    try:
        expected = jax.eval_shape(inner.init, params)
    except Exception:  # an init that wants values, or parameters that were not given: its own error will do
        return None
    shapes, came = (
        {
            jax.tree_util.keystr(path) or "the root": jnp.shape(leaf)
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in (expected, inner_state)
    )
    for name, shape in shapes.items():
        if name not in came:
            return f"{name} is missing"
        if came[name] != shape:
            return f"{name} has shape {came[name]}, expected {shape}"
    extra = [name for name in came if name not in shapes]
    if extra:
        return f"{extra[0]} is not among what it keeps"
    structures = jax.tree.structure(expected), jax.tree.structure(inner_state)
    return "expected {}, got {}".format(*structures) if structures[0] != structures[1] else None
