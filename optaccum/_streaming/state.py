"""The state of streaming accumulation, and what can be asked of it."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaccum._dtypes import AccumulatorDType, accumulator_dtype_of, dtype_of, leaf_name
from optaccum._noise_scale import NoiseScaleState

ADVICE = "Restore it with the options that it was saved with, or start from init."


class AccumulateState(NamedTuple):
    """The state of the transformation that `optaccum.accumulate` returns.

    The fields after `weight_total` hold `()` unless the option named beside them is used; switching one on or
    off therefore changes the structure of a checkpoint.

    Attributes:
      micro_step: micro-steps in the open window.
      gradient_step: updates emitted so far.
      has_updated: whether the last call emitted.
      num_skipped: micro-steps dropped so far by `should_skip_update_fn`.
      grad_sum: weighted sum of the window's gradients. Where no window is open it holds what the last one
        emitted: a window starts by overwriting it.
      weight_sum: weight in the window, kept likewise.
      inner_state: the wrapped optimizer's state.
      weight_total: all the weight emitted so far, as an unevaluated sum of two float32 words; the low one also
        takes what `weight_sum` of the open window loses to rounding.
      extra_sums: of `averaged_extra_args`: name -> weighted sum over the window.
      skip_state: of `should_skip_update_fn`: what it last returned.
      noise_state: of `track_noise_scale`.
    """

    micro_step: jax.Array  # shape=(), int32
    gradient_step: jax.Array  # shape=(), int32
    has_updated: jax.Array  # shape=(), bool
    num_skipped: jax.Array  # shape=(), int32
    grad_sum: optax.Updates  # shapes of the parameters, accumulator dtypes
    weight_sum: jax.Array  # shape=(), float32
    inner_state: optax.OptState
    weight_total: jax.Array  # shape=(2,), float32: high word, low word
    extra_sums: dict[str, jax.Array] | tuple[()] = ()  # each shape=(), float32
    skip_state: Any = ()
    noise_state: NoiseScaleState | tuple[()] = ()


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`a + b`, rounded, and what the rounding lost (Knuth)."""
    rounded = a + b
    added = rounded - a
    return rounded, (a - (rounded - added)) + (b - added)


def add_to_total(total: jax.Array, weight: jax.Array) -> jax.Array:
    """`total + weight` in two float32 words, renormalised; exact to 2^48.

    Args:
      total: shape=(2,), float32.
      weight: shape=(), float32.
    """
    high, low = total
    rounded, lost = two_sum(high, weight)
    low = low + lost
    high = rounded + low
    return jnp.stack([high, low - (high - rounded)])


def has_updated(opt_state: Any) -> jax.Array:
    """Whether the last call emitted: whether the parameters have just been updated.

    Args:
      opt_state: a state of `optaccum.accumulate`, or any pytree that holds some (those of `optax.chain`,
        `optax.partition`, a whole `TrainState`).

    Returns:
      A bool array, shape=(): True exactly if the last call emitted an update; of several states, if all have.

    Raises:
      ValueError: `opt_state` holds no `AccumulateState`.

    Example:
      >>> import jax.numpy as jnp, optax, optaccum
      >>> tx = optax.chain(optax.clip(1.0), optaccum.accumulate(optax.sgd(0.1), 2))
      >>> params = jnp.zeros(3)
      >>> state, emitted = tx.init(params), []
      >>> for _ in range(4):
      ...     _, state = tx.update(jnp.ones(3), state, params)
      ...     emitted.append(bool(optaccum.has_updated(state)))
      >>> emitted
      [False, True, False, True]
    """
    find_states(opt_state)
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "has_updated")
    flags = [x for path, x in found if getattr(path[-1], "tuple_name", "") == AccumulateState.__name__]
    return functools.reduce(
        jnp.logical_and, map(jnp.asarray, flags)
    )  # without a constant, which eager calls transfer


def weight_total(opt_state: Any) -> float:
    """All the weight emitted so far: the examples, or tokens, that the parameters have been trained on.

    Args:
      opt_state: a state of `optaccum.accumulate`, or any pytree that holds some. Concrete: not inside jit.

    Returns:
      A float on the host, exact up to 2^48 for integer weights of 2^24 at most each (in the middle of a window of
      more than 2^24, to float32 of that window); of several states, and of a vmapped one's members, the least.

    Raises:
      ValueError: `opt_state` holds no `AccumulateState`.

    Example:
      >>> import jax.numpy as jnp, optax, optaccum
      >>> tx = optaccum.accumulate(optax.sgd(0.1), 2)
      >>> params = jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for tokens in (500, 300, 200):  # the third is in a window still open
      ...     _, state = tx.update(jnp.ones(3), state, params, weight=tokens)
      >>> int(optaccum.weight_total(state))
      800
    """
    return min(float(np.asarray(s.weight_total, np.float64).sum(-1).min()) for s in find_states(opt_state))


def find_states(opt_state: Any) -> list[AccumulateState]:
    """Every `AccumulateState` in a pytree, except those inside another's `inner_state`; one at least."""
    states = states_in(opt_state)
    if not states:
        raise ValueError(
            "expected an optimizer state that holds an optaccum.AccumulateState; got one that does not, "
            f"{type(opt_state).__name__}. {_way_out(opt_state)}"
        )
    return states


def states_in(tree: Any) -> list[AccumulateState]:
    """Every `AccumulateState` in a pytree, except those inside another."""
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_state) if is_state(leaf)]


def is_state(node: Any) -> TypeGuard[AccumulateState]:
    """Whether it is a state of `optaccum.accumulate`."""
    return isinstance(node, AccumulateState)


# Whether a state, restored perhaps, is one of this transformation; and whether gradients fit it.


def check_is_state(state: Any) -> None:
    """Raises, with the way out, for what is no state of `optaccum.accumulate`."""
    if not is_state(state):
        raise TypeError(
            f"expected the state to be an optaccum.AccumulateState; got {type(state).__name__}. {_way_out(state)}"
        )


def _way_out(state: Any) -> str:
    if isinstance(state, optax.MultiStepsState):
        return "optaccum.from_multi_steps goes on from it."
    if states_in(state):
        return (
            "It holds one: update, or flush, the whole transformation that it belongs to, or that one alone."
        )
    if _is_restored_bare(state):
        return "It was restored without its types: give the checkpointer tx.init(params) as the template to restore."
    return "Pass what this transformation's init, or its last call, returned; (grads, state, params) is the order."


def _is_restored_bare(tree: Any) -> bool:
    """Whether a checkpointer gave dicts and lists where an `AccumulateState` was saved."""
    nodes = [tree]
    for node in nodes:  # it grows
        if isinstance(node, Mapping):
            if {"micro_step", "grad_sum"} <= node.keys():
                return True
            nodes += node.values()
        elif isinstance(node, (list, tuple)):
            nodes += node
    return False


def check_state(
    state: AccumulateState,
    accumulator_dtype: AccumulatorDType,
    averaged_extra_args: tuple[str, ...],
    track_noise_scale: bool,
) -> None:
    """Raises, by name, where a state lacks what an option keeps, or would round what it adds up."""
    names, kept = sorted(averaged_extra_args), sorted(dict(state.extra_sums))
    if names != kept:
        raise ValueError(f"expected a state with averaged_extra_args={names}; got one with {kept}. {ADVICE}")
    if track_noise_scale and not isinstance(state.noise_state, NoiseScaleState):
        raise ValueError(f"expected a state with track_noise_scale=True; got one without. {ADVICE}")
    for path, total in jax.tree.leaves_with_path(state.grad_sum):
        if accumulator_dtype is None or not jnp.issubdtype(total.dtype, jnp.floating):
            continue
        expected = accumulator_dtype_of(accumulator_dtype, path, total)
        if jnp.finfo(total.dtype).bits < jnp.finfo(expected).bits:
            raise ValueError(
                f"expected grad_sum at {leaf_name(path)} to be {expected}, by accumulator_dtype; got {total.dtype}. "
                f"{ADVICE}"
            )


def check_gradients(grads: optax.Updates, grad_sum: optax.Updates) -> None:
    """Raises, naming the leaf, where the gradients are not shaped as the parameters that init was given."""
    if jax.tree.structure(grads) != jax.tree.structure(grad_sum):
        try:  # JAX names the node that differs
            jax.tree.map(lambda *_: None, grad_sum, grads)
            jax.tree.map(lambda *_: None, grads, grad_sum)
        except ValueError as error:
            error.add_note(
                "The gradients do not match the state that init made from the parameters: pass a gradient for each of "
                "them, or initialise with those that have one."
            )
            raise
    totals = jax.tree.leaves(grad_sum)
    for (path, grad), total in zip(jax.tree.leaves_with_path(grads), totals, strict=True):
        if jnp.shape(grad) != total.shape:
            raise ValueError(
                f"expected the gradient at {leaf_name(path)} to have the state's shape {total.shape}; got "
                f"{jnp.shape(grad)}. Pass gradients of the parameters that init was given."
            )
        dtype = dtype_of(grad)
        if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.iscomplexobj(total):
            raise ValueError(
                f"expected the gradient at {leaf_name(path)} to be real, as its accumulator, {total.dtype}; got "
                f"{dtype}. Initialise with complex parameters, or let accumulator_dtype be a function that "
                "returns a complex dtype for this leaf."
            )
