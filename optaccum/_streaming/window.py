"""The window of micro-steps: how a gradient enters it, and what happens when it is full.

A micro-step is two calls. `enter`: check, weigh, add. `close`: divide, run the inner optimizer once. Nothing is ever
multiplied by a mask (0 * NaN is NaN): what does not count is replaced by zero, and a window starts by overwriting the
last sums.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optaccum._dtypes import (
    AccumulatorDType,
    accumulator_dtype_of,
    as_flag,
    as_scalar,
    at_least_float32,
    is_function,
    keep_avals,
    leaf_name,
)
from optaccum._noise_scale import NoiseScaleState, add_term, close_terms
from optaccum._run_if import run_if
from optaccum._streaming.gradients import add_updates, as_arrays, check_gradients, moving, put_back, still
from optaccum._streaming.schedule import EveryK, is_full
from optaccum._streaming.skip import call_skip_fn
from optaccum._streaming.state import ADVICE, AccumulateState, add_to_total, check_is_state, two_sum
from optaccum._varying import jaxpr_and_structs, zeros_of


class Options(NamedTuple):
    """The arguments of `optaccum.accumulate`, checked."""

    inner: optax.GradientTransformationExtraArgs
    every_k: EveryK | None
    use_grad_mean: bool
    accumulator_dtype: AccumulatorDType
    should_skip_update_fn: Callable[..., Any] | None
    averaged_extra_args: tuple[str, ...]
    track_noise_scale: bool


class Given(NamedTuple):
    """The keywords of a micro-step."""

    weight: Any
    denominator: Any
    emit: Any
    extra_args: dict[str, Any]


class Count(NamedTuple):
    """What a micro-step counts for."""

    weight: jax.Array | None  # shape=(), float32, NaN for any that is not finite; None: not given, one
    scales: bool  # whether the gradient, of a mean loss, is still to be multiplied by it


# Enter: check, weigh, add.


def enter(
    options: Options, grads: optax.Updates, state: AccumulateState, params: optax.Params | None, given: Given
) -> tuple[AccumulateState, jax.Array]:
    """The state with this micro-step in its window, and whether the window ends with it; shape=(), bool."""
    check_is_state(state)
    check_gradients(grads, state.grad_sum)
    check_state(options, state)
    count = weigh(given)
    came = as_arrays(grads, state.grad_sum)
    counted = jax.tree.map(functools.partial(_where_counted, count.weight), came)
    skip, skip_state = None, state.skip_state
    if options.should_skip_update_fn is not None:
        skip, new = call_skip_fn(options.should_skip_update_fn, counted, state.gradient_step, params)
        skip = skip if count.weight is None else skip | ~jnp.isfinite(count.weight)
        skip_state = keep_avals(new, skip_state, "what should_skip_update_fn returns", ADVICE)
    entered, full = add_count(options, state, count, given, skip)

    first, noise_state = state.micro_step == 0, state.noise_state
    if isinstance(noise_state, NoiseScaleState):
        noise_state = add_term(noise_state, first, came, _or_one(count.weight), count.scales)

    def add_gradient(total, grad):
        return _unless(skip, added(total, grad, first, count.weight if count.scales else None), total)

    return entered._replace(
        grad_sum=jax.tree.map(add_gradient, state.grad_sum, counted),
        skip_state=skip_state,
        noise_state=jax.tree.map(functools.partial(_unless, skip), noise_state, state.noise_state),
    ), full


def check_state(options: Options, state: AccumulateState) -> None:
    """Raises, by name, where a state lacks what an option keeps, or would round what it adds up."""
    names, kept = sorted(options.averaged_extra_args), sorted(dict(state.extra_sums))
    if names != kept:
        raise ValueError(f"expected a state with averaged_extra_args={names}; got one with {kept}. {ADVICE}")
    if options.track_noise_scale and not isinstance(state.noise_state, NoiseScaleState):
        raise ValueError(f"expected a state with track_noise_scale=True; got one without. {ADVICE}")
    for path, total in jax.tree.leaves_with_path(state.grad_sum):
        dtype = options.accumulator_dtype
        if dtype is None or is_function(dtype) or not jnp.issubdtype(total.dtype, jnp.floating):
            continue  # a function is of the parameter, not of its sum
        expected = accumulator_dtype_of(dtype, path, total)
        if jnp.finfo(total.dtype).bits < jnp.finfo(expected).bits:
            raise ValueError(
                f"expected grad_sum at {leaf_name(path)} to be {expected}, by accumulator_dtype; got {total.dtype}. "
                f"{ADVICE}"
            )


def weigh(given: Given) -> Count:
    """What the micro-step counts for."""
    if given.weight is None and given.denominator is None:
        return Count(None, scales=False)
    if given.weight is not None and given.denominator is not None:
        raise TypeError(
            "expected weight= (grads of the micro-batch's mean loss) or denominator= (grads of its summed loss); got "
            "both. Leave out the one that does not describe the loss."
        )
    scales = given.weight is not None
    name, value = ("weight", given.weight) if scales else ("denominator", given.denominator)
    weight = as_scalar(name, value)
    return Count(jnp.where(jnp.isfinite(weight), weight, jnp.nan), scales)


def add_count(
    options: Options, state: AccumulateState, count: Count, given: Given, skip: jax.Array | None
) -> tuple[AccumulateState, jax.Array]:
    """`enter` for all but the gradients: the counters and the scalar sums; and whether the window ends."""
    first = state.micro_step == 0
    weight_sum, lost = two_sum(jnp.where(first, 0, state.weight_sum), _or_one(count.weight))
    lost = jnp.where(jnp.isfinite(lost), _unless(skip, lost, jnp.zeros_like(lost)), 0)
    sums, extra_sums = dict(state.extra_sums), {}
    for name in options.averaged_extra_args:
        value, total = _where_counted(count.weight, _averaged(name, given.extra_args)), sums[name]
        extra_sums[name] = _unless(skip, added(total, value, first, count.weight if count.scales else None), total)
    num_skipped = state.num_skipped
    if skip is not None:
        num_skipped = jnp.where(skip, optax.safe_increment(num_skipped), num_skipped)
    entered = state._replace(
        micro_step=_unless(skip, optax.safe_increment(state.micro_step), state.micro_step),
        num_skipped=num_skipped,
        weight_sum=_unless(skip, weight_sum, state.weight_sum),
        weight_total=state.weight_total + jnp.stack([jnp.zeros_like(lost), lost]),
        extra_sums=extra_sums or (),
    )
    full = is_full(options.every_k, entered.micro_step, entered.weight_sum, state)
    full = full if skip is None else full & ~skip
    if given.emit is not None:  # which ends no window where a skipped micro-step opened none
        full = (full | as_flag("emit", given.emit)) & (entered.micro_step > 0)
    elif options.every_k is None:
        raise TypeError(
            "expected emit= at every call, since every_k_schedule is None; got none. Pass emit=True with the last "
            "micro-step of a window and emit=False with the others."
        )
    return entered, full


def added(total: jax.Array, grad: jax.Array, first: jax.Array | bool, weight: jax.Array | None = None) -> jax.Array:
    """The sum with one more gradient, times its weight; that alone where it is the first."""
    wide = at_least_float32(total.dtype)
    term = grad.astype(wide) if weight is None else grad.astype(wide) * weight.astype(wide)
    return jnp.where(first, term, total.astype(wide) + term).astype(total.dtype)


def _where_counted(weight: jax.Array | None, x: jax.Array) -> jax.Array:
    """`x`, or zeros for a micro-step of no weight: not even a NaN of it gets in."""
    return x if weight is None else jnp.where(weight != 0, x, jnp.zeros_like(x))


def _or_one(weight: jax.Array | None) -> jax.Array:
    return jnp.ones([], jnp.float32) if weight is None else weight


def _unless(skip: jax.Array | None, new: Any, old: jax.Array) -> jax.Array:
    return new if skip is None else jnp.where(skip, old, new)


def _averaged(name: str, extra_args: dict[str, Any]) -> jax.Array:
    if extra_args.get(name) is None:
        given = sorted(other for other, value in extra_args.items() if value is not None)
        raise TypeError(f"expected a scalar {name}= at every call, since averaged_extra_args names it; got {given}.")
    return as_scalar(name, extra_args[name])


# Close: divide, run the inner optimizer once.


def close(
    options: Options,
    state: AccumulateState,
    full: jax.Array,
    grads: optax.Updates,
    params: optax.Params | None,
    extra_args: dict[str, Any],
    *,
    in_place: bool,
) -> tuple[Any, AccumulateState]:
    """Where the window is full, end it: run the inner optimizer once, unless the window's weight is zero.

    Returns the new parameters where `in_place`, else the updates, zeros where `inner` does not run; and the state. They
    are as `inner` gives them for gradients of the structure and dtypes of `grads`.
    """
    emits = full & (state.weight_sum != 0)
    state = _divide(options, state, emits)

    def inner_update(gradient, inner_state, params, averages):
        updates, new_state = options.inner.update(gradient, inner_state, params, **extra_args | averages)
        new_state = keep_avals(new_state, inner_state, "the inner optimizer's state")
        return still(grads, updates, params), new_state

    updates_like = _updates_like(inner_update, grads, state, params)

    def emit(carry):
        target, inner_state, noise_state = carry
        old = put_back(target, params) if in_place else params
        updates, inner_state = inner_update(state.grad_sum, inner_state, old, dict(state.extra_sums))
        new = keep_avals(updates, updates_like, "the inner optimizer's updates")
        if in_place:
            new = keep_avals(add_updates(target, new), target, "the parameters")
        if isinstance(noise_state, NoiseScaleState):
            noise_state = close_terms(noise_state, state.grad_sum, state.weight_sum, options.use_grad_mean)
        return new, inner_state, noise_state

    target = moving(grads, params) if in_place else zeros_of(updates_like, state.grad_sum)
    target, inner_state, noise_state = run_if(emits, emit, (target, state.inner_state, state.noise_state))
    # A weight that is not finite ends with its window, as a gradient does.
    counts = emits & jnp.isfinite(state.weight_sum)
    return put_back(target, params) if in_place else target, state._replace(
        micro_step=jnp.where(full, jnp.zeros_like(state.micro_step), state.micro_step),
        gradient_step=jnp.where(emits, optax.safe_increment(state.gradient_step), state.gradient_step),
        has_updated=emits,
        inner_state=inner_state,
        weight_total=jnp.where(counts, add_to_total(state.weight_total, state.weight_sum), state.weight_total),
        noise_state=noise_state,
    )


def _updates_like(
    inner_update: Callable[..., Any], grads: optax.Updates, state: AccumulateState, params: optax.Params | None
) -> optax.Updates:
    """The structure and dtypes of the updates that `inner` gives for `grads`, whose mean is wider."""

    def strongly_typed_updates(grads, grad_sum, inner_state):
        updates, _ = inner_update(as_arrays(grads, grad_sum), inner_state, params, {})
        return jax.tree.map(lambda u: lax.convert_element_type(u, jnp.result_type(u)), updates)

    try:
        _, updates = jaxpr_and_structs(strongly_typed_updates, grads, state.grad_sum, state.inner_state)
        return updates
    except Exception as error:
        error.add_note(f"It came of the inner optimizer's update. If its state was restored: {ADVICE}")
        raise


def _divide(options: Options, state: AccumulateState, emits: jax.Array) -> AccumulateState:
    """Where the window emits, its sums become means, in their own buffers.

    Dividing what `inner` reads instead costs a copy: XLA does not repeat a division in every reader.
    """
    weight = jnp.where(emits, state.weight_sum, 1)

    def divide(total):
        wide = total.astype(at_least_float32(total.dtype))
        divisor = weight.astype(jnp.finfo(wide.dtype).dtype)
        if jnp.iscomplexobj(total):
            return lax.complex(total.real / divisor, total.imag / divisor)
        return (wide / divisor).astype(total.dtype)

    grad_sum = jax.tree.map(divide, state.grad_sum) if options.use_grad_mean else state.grad_sum
    return state._replace(grad_sum=grad_sum, extra_sums=jax.tree.map(divide, state.extra_sums))
