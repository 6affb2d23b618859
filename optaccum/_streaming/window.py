"""The window of micro-steps: how a gradient enters it, and what happens when it is full.

A micro-step is two calls. `enter`: check, weigh, add. `close`: divide, run the inner optimizer once. Nothing is ever
multiplied by a mask (0 * NaN is NaN): what does not count is replaced by zero, and a window starts by overwriting the
last sums.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optaccum._dtypes import (
    AccumulatorDType,
    as_flag,
    as_scalar,
    at_least_float32,
    dtype_of,
    is_float0,
    keep_avals,
    keep_sharding,
)
from optaccum._noise_scale import NoiseScaleState, add_term, close_terms
from optaccum._run_if import run_if
from optaccum._streaming.schedule import EveryK, is_full
from optaccum._streaming.skip import should_skip
from optaccum._streaming.state import (
    ADVICE,
    AccumulateState,
    add_to_total,
    check_gradients,
    check_is_state,
    check_state,
    two_sum,
)
from optaccum._varying import zeros_of


class Options(NamedTuple):
    """The arguments of `optaccum.accumulate`, checked."""

    inner: optax.GradientTransformationExtraArgs
    every_k: EveryK | None
    use_grad_mean: bool
    accumulator_dtype: AccumulatorDType
    should_skip_update_fn: Callable[..., Any] | None
    averaged_extra_args: tuple[str, ...]
    track_noise_scale: bool


class Count(NamedTuple):
    """What a micro-step counts for."""

    weight: jax.Array  # shape=(), float32: the weight or the denominator; NaN for any that is not finite
    is_given: bool  # False: it is 1
    scales: bool  # the gradient is of a mean loss: still to be multiplied by it
    extra_terms: dict[str, jax.Array]  # each shape=(), float32: what averaged extra args add to their sums


# Enter: check, weigh, add.


def enter(
    options: Options,
    grads: optax.Updates,
    state: AccumulateState,
    params: optax.Params | None,
    weight: Any,
    denominator: Any,
    emit: Any,
    extra_args: dict[str, Any],
) -> tuple[AccumulateState, jax.Array]:
    """The state with this micro-step in its window, and whether the window ends with it; shape=(), bool."""
    check_is_state(state)
    check_gradients(grads, state.grad_sum)
    check_state(state, options.accumulator_dtype, options.averaged_extra_args, options.track_noise_scale)
    count = weigh(options, weight, denominator, extra_args)
    came = _as_arrays(grads, state.grad_sum, params)
    grads = jax.tree.map(lambda g: where_counted(count, g), came)
    skip, skip_state = should_skip(
        options.should_skip_update_fn, grads, count.weight if count.is_given else None, state, params
    )
    entered, full = add_count(options, state, count, emit, skip)

    noise_state = state.noise_state
    if isinstance(noise_state, NoiseScaleState):
        noise_state = add_term(noise_state, state.micro_step == 0, came, count.weight, count.scales)

    def add_gradient(total, grad):
        new = added(total, grad, state.micro_step == 0, count.weight if count.scales else None)
        return _unless(skip, new, total)

    return entered._replace(
        grad_sum=jax.tree.map(add_gradient, state.grad_sum, grads),
        skip_state=skip_state,
        noise_state=jax.tree.map(lambda new, old: _unless(skip, new, old), noise_state, state.noise_state),
    ), full


def added(
    total: jax.Array, grad: jax.Array, first: jax.Array | bool, weight: jax.Array | None = None
) -> jax.Array:
    """The sum with one more gradient, times its weight; that alone where it is the first."""
    wide = at_least_float32(total.dtype)
    term = grad.astype(wide) if weight is None else grad.astype(wide) * weight.astype(wide)
    return jnp.where(first, term, total.astype(wide) + term).astype(total.dtype)


def weigh(options: Options, weight: Any, denominator: Any, extra_args: dict[str, Any]) -> Count:
    """What the micro-step counts for; where its weight is zero, so is all that it adds."""
    if weight is not None and denominator is not None:
        raise TypeError(
            "expected weight= (grads of the micro-batch's mean loss) or denominator= (grads of its summed loss); got "
            "both. Leave out the one that does not describe the loss."
        )
    values = {name: _averaged(name, extra_args) for name in options.averaged_extra_args}
    if weight is None and denominator is None:
        return Count(jnp.ones([], jnp.float32), False, False, values)
    given = as_scalar("weight", weight) if denominator is None else as_scalar("denominator", denominator)
    count = Count(jnp.where(jnp.isfinite(given), given, jnp.nan), True, weight is not None, {})
    terms = {name: where_counted(count, value) for name, value in values.items()}
    if count.scales:
        terms = {name: count.weight * term for name, term in terms.items()}
    return count._replace(extra_terms=terms)


def where_counted(count: Count, x: jax.Array) -> jax.Array:
    """`x`, or zeros for a micro-step of no weight: not even a NaN of it gets in."""
    return jnp.where(count.weight != 0, x, jnp.zeros_like(x)) if count.is_given else x


def add_count(
    options: Options, state: AccumulateState, count: Count, emit: Any, skip: jax.Array | None
) -> tuple[AccumulateState, jax.Array]:
    """`enter` for all but the gradients: the counters and the scalar sums; and whether the window ends."""
    first = state.micro_step == 0

    def add(total, term):
        return _unless(skip, jnp.where(first, term, total + term), total)

    weight_sum, lost = two_sum(jnp.where(first, 0, state.weight_sum), count.weight)
    lost = jnp.where(jnp.isfinite(lost), _unless(skip, lost, jnp.zeros_like(lost)), 0)
    extra_sums = {name: add(total, count.extra_terms[name]) for name, total in dict(state.extra_sums).items()}
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
    if emit is not None:  # which ends no window where a skipped micro-step opened none
        full = (full | as_flag("emit", emit)) & (entered.micro_step > 0)
    elif options.every_k is None:
        raise TypeError(
            "expected emit= at every call, since every_k_schedule is None; got none. Pass emit=True with the last "
            "micro-step of a window and emit=False with the others."
        )
    return entered, full


def _unless(skip: jax.Array | None, new: Any, old: jax.Array) -> jax.Array:
    return new if skip is None else jnp.where(skip, old, new)


def _as_arrays(grads: optax.Updates, grad_sum: optax.Updates, params: optax.Params | None) -> optax.Updates:
    """The gradients laid out as their sums; zeros of the parameter's dtype for those that are float0."""

    def as_array(grad, total, param):
        return _zero_of(grad, param) if is_float0(grad) else keep_sharding(jnp.asarray(grad), total)

    return jax.tree.map(as_array, grads, grad_sum, _beside(grads, params))


def _beside(grads: optax.Updates, params: optax.Params | None) -> optax.Params:
    """The parameters that have a gradient; the others, which need not be arrays, are None."""
    if params is None:
        return jax.tree.map(lambda _: None, grads)
    return jax.tree.map(lambda g, p: None if g is None else p, grads, params, is_leaf=lambda g: g is None)


def _zero_of(grad: Any, param: Any) -> jax.Array:
    return jnp.zeros(grad.shape, jnp.int8) if param is None else jnp.zeros_like(param)


def _averaged(name: str, extra_args: dict[str, Any]) -> jax.Array:
    if extra_args.get(name) is None:
        raise TypeError(
            f"expected a scalar {name}= at every call, since averaged_extra_args names it; got {sorted(extra_args)}."
        )
    return as_scalar(name, extra_args[name])


# Close: divide, run the inner optimizer once.


def close(
    options: Options,
    state: AccumulateState,
    full: jax.Array,
    target: Any,
    step_fn: Callable[[Any, optax.OptState, optax.Updates, dict[str, jax.Array]], tuple[Any, optax.OptState]],
) -> tuple[Any, AccumulateState]:
    """Where the window is full, end it: run `step_fn` once, in place, unless the window's weight is zero.

    Args:
      options: of the transformation.
      state: with the window's sums.
      full: shape=(), bool.
      target: what `step_fn` replaces: the updates, or the parameters.
      step_fn: (target, inner_state, gradient, averaged extra args) -> (target, inner_state).
    """
    emits = full & (state.weight_sum != 0)
    state = _divide(options, state, emits)

    def emit(carry):
        target, inner_state, noise_state = carry
        new_target, new_inner_state = step_fn(target, inner_state, state.grad_sum, dict(state.extra_sums))
        new_inner_state = keep_avals(new_inner_state, inner_state, "the inner optimizer's state")
        if isinstance(noise_state, NoiseScaleState):
            noise_state = close_terms(noise_state, state.grad_sum, state.weight_sum, options.use_grad_mean)
        return new_target, new_inner_state, noise_state

    target, inner_state, noise_state = run_if(emits, emit, (target, state.inner_state, state.noise_state))
    # A weight that is not finite ends with its window, as a gradient does.
    counts = emits & jnp.isfinite(state.weight_sum)
    return target, state._replace(
        micro_step=jnp.where(full, jnp.zeros_like(state.micro_step), state.micro_step),
        gradient_step=jnp.where(emits, optax.safe_increment(state.gradient_step), state.gradient_step),
        has_updated=emits,
        inner_state=inner_state,
        weight_total=jnp.where(
            counts, add_to_total(state.weight_total, state.weight_sum), state.weight_total
        ),
        noise_state=noise_state,
    )


def close_with_updates(
    options: Options,
    state: AccumulateState,
    full: jax.Array,
    grads: optax.Updates,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, AccumulateState]:
    """`close`, for the updates that `inner` gives for gradients like `grads`; zeros where it does not run."""
    inner_update, updates_like = make_inner_update(options, grads, state, params, extra_args)

    def step_fn(_, inner_state, gradient, averages):
        return inner_update(gradient, inner_state, params, averages)

    return close(options, state, full, zeros_of(updates_like), step_fn)


def make_inner_update(
    options: Options,
    grads: optax.Updates,
    state: AccumulateState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[Callable[..., tuple[optax.Updates, optax.OptState]], optax.Updates]:
    """`inner.update` for a mean that is wider than `grads`, and what its updates look like.

    The updates get the structure and dtypes that `inner` itself gives for `grads`, found without running it. A leaf
    with a float0 gradient stays where it is, whatever weight decay would do to it.

    Returns:
      (gradient, inner_state, params, averaged extra args) -> (updates, inner_state), and a pytree of
      `jax.ShapeDtypeStruct`.
    """

    def like_gradient(grad, total, param):
        dtype = jax.dtypes.canonicalize_dtype(dtype_of(grad))
        return _zero_of(grad, param) if is_float0(grad) else jnp.zeros_like(total, dtype=dtype)

    beside = _beside(grads, params)
    like = jax.eval_shape(lambda: jax.tree.map(like_gradient, grads, state.grad_sum, beside))

    def update(gradient, inner_state, params, extra_args):
        updates, inner_state = options.inner.update(gradient, inner_state, params, **extra_args)
        if any(map(is_float0, jax.tree.leaves(grads))):
            updates = jax.tree.map(
                lambda g, zero, u: zeros_of(zero) if is_float0(g) else u, grads, like, updates
            )
        return updates, inner_state

    def strongly_typed_updates(gradient, inner_state):
        updates, new_inner_state = update(gradient, inner_state, params, extra_args)
        keep_avals(new_inner_state, inner_state, "the inner optimizer's state")
        return jax.tree.map(lambda u: lax.convert_element_type(u, jnp.result_type(u)), updates)

    try:
        updates_like = jax.eval_shape(strongly_typed_updates, like, state.inner_state)
    except Exception as error:
        error.add_note(f"It came of the inner optimizer's update. If its state was restored: {ADVICE}")
        raise

    def inner_update(gradient, inner_state, params, averages):
        updates, inner_state = update(gradient, inner_state, params, extra_args | averages)
        return keep_avals(updates, updates_like, "the inner optimizer's updates"), inner_state

    return inner_update, updates_like


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

    extra_means = jax.tree.map(divide, state.extra_sums)
    grad_sum = jax.tree.map(divide, state.grad_sum) if options.use_grad_mean else state.grad_sum
    return state._replace(grad_sum=grad_sum, extra_sums=extra_means)
