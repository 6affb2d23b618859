"""The window of micro-steps: how a gradient enters it, and what happens when it is full.

`accumulate`'s update, `apply_gradients` and `flush` are all made of these two steps. Nothing is ever
multiplied by a mask (0 * NaN is NaN): what does not count is replaced by zero, and a window starts by
overwriting the last sums.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optaccum._avals import keep_avals
from optaccum._dtypes import AccumulatorDType, at_least_float32
from optaccum._noise_scale import NoiseScaleState, average_in, estimate_noise, squared_norm
from optaccum._run_if import run_if
from optaccum._streaming.check_state import ADVICE, check_is_state, check_state
from optaccum._streaming.inner_update import make_inner_update
from optaccum._streaming.micro_step import MicroStep, make_micro_step
from optaccum._streaming.non_finite import cheaper
from optaccum._streaming.schedule import EveryK, micro_steps_in_window
from optaccum._streaming.state import AccumulateState, add_to_total, two_sum


class Options(NamedTuple):
    """The arguments of `optaccum.accumulate`, checked."""

    inner: optax.GradientTransformationExtraArgs
    every_k: EveryK
    use_grad_mean: bool
    accumulator_dtype: AccumulatorDType
    should_skip_update_fn: Callable[..., Any] | None
    averaged_extra_args: tuple[str, ...]
    track_noise_scale: bool


def enter(
    options: Options,
    grads: optax.Updates,
    state: AccumulateState,
    params: optax.Params | None,
    weight: Any,
    denominator: Any,
    extra_args: dict[str, Any],
) -> tuple[AccumulateState, jax.Array]:
    """The state with this micro-step in its window, and whether the window is full now; shape=(), bool."""
    check_is_state(state)
    step = make_micro_step(
        grads, state.grad_sum, params, weight, denominator, options.averaged_extra_args, extra_args
    )
    check_state(state, options.accumulator_dtype, options.averaged_extra_args, options.track_noise_scale)
    skip, skip_state = _skip(options, step, state, params)
    first = state.micro_step == 0

    def unless_skipped(new, old):
        return new if skip is None else jnp.where(skip, old, new)

    def add(total, term):
        return unless_skipped(jnp.where(first, term, total + term), total)

    def add_gradient(total, grad):
        wide = at_least_float32(total.dtype)
        term = grad.astype(wide) * step.weight.astype(wide) if step.scale else grad.astype(wide)
        return unless_skipped(jnp.where(first, term, total.astype(wide) + term).astype(total.dtype), total)

    noise_state = state.noise_state
    if isinstance(noise_state, NoiseScaleState):
        noise_state = noise_state._replace(
            num_terms=add(noise_state.num_terms, (step.weight != 0).astype(jnp.int32)),
            sq_norm_sum=add(noise_state.sq_norm_sum, _weighted_sq_norm(step)),
        )
    weight_sum, lost = two_sum(jnp.where(first, 0, state.weight_sum), step.weight)
    lost = unless_skipped(lost, jnp.zeros_like(lost))
    extra_sums = {name: add(total, step.extra_terms[name]) for name, total in dict(state.extra_sums).items()}
    entered = state._replace(
        micro_step=unless_skipped(optax.safe_increment(state.micro_step), state.micro_step),
        grad_sum=jax.tree.map(add_gradient, state.grad_sum, step.grads),
        weight_sum=unless_skipped(weight_sum, state.weight_sum),
        weight_total=state.weight_total + jnp.stack([jnp.zeros_like(lost), lost]),
        extra_sums=extra_sums or (),
        skip_state=skip_state,
        noise_state=noise_state,
    )
    full = entered.micro_step >= micro_steps_in_window(
        options.every_k, state.gradient_step, state.weight_total[0]
    )
    if skip is not None:
        full = full & ~skip
        num_skipped = jnp.where(skip, optax.safe_increment(state.num_skipped), state.num_skipped)
        entered = entered._replace(num_skipped=num_skipped)
    return entered, full


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

    Returns:
      The target and the state, ready for the next micro-step.
    """
    emits = full & (state.weight_sum != 0)
    state = _divide(options, state, emits)

    def emit(carry):
        target, inner_state, noise_state = carry
        new_target, new_inner_state = step_fn(target, inner_state, state.grad_sum, dict(state.extra_sums))
        new_inner_state = keep_avals(new_inner_state, inner_state, "the inner optimizer's state")
        return new_target, new_inner_state, _close_noise(options, state, noise_state)

    target, inner_state, noise_state = run_if(emits, emit, (target, state.inner_state, state.noise_state))
    return target, state._replace(
        micro_step=jnp.where(full, jnp.zeros_like(state.micro_step), state.micro_step),
        gradient_step=jnp.where(emits, optax.safe_increment(state.gradient_step), state.gradient_step),
        has_updated=emits,
        inner_state=inner_state,
        weight_total=jnp.where(emits, add_to_total(state.weight_total, state.weight_sum), state.weight_total),
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
    inner_update, updates_like = make_inner_update(
        options.inner, grads, state.inner_state, params, extra_args
    )

    def step_fn(_, inner_state, gradient, averages):
        return inner_update(gradient, inner_state, params, averages)

    return close(options, state, full, jax.tree.map(jnp.zeros_like, updates_like), step_fn)


def _skip(
    options: Options, step: MicroStep, state: AccumulateState, params: optax.Params | None
) -> tuple[jax.Array | None, Any]:
    """Whether to drop the micro-step (None: never), and the new skip state."""
    if options.should_skip_update_fn is None:
        return None, state.skip_state
    skip_fn = cheaper(options.should_skip_update_fn, state.skip_state)
    skip, skip_state = call_skip_fn(skip_fn, step.grads, state.gradient_step, params)
    return skip, keep_avals(skip_state, state.skip_state, "what should_skip_update_fn returns", ADVICE)


def call_skip_fn(skip_fn: Callable[..., Any], *args: Any) -> tuple[jax.Array, Any]:
    """Whether to drop, and the pytree to keep; raises for a function that does not decide."""
    returned = skip_fn(*args)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(
            "should_skip_update_fn expects to return (a bool scalar, a pytree), such as (skip, ()); it returned "
            f"{type(returned).__name__}."
        )
    skip, skip_state = jnp.asarray(returned[0]), returned[1]
    if skip.shape != () or skip.dtype != jnp.bool_:
        raise TypeError(
            "should_skip_update_fn expects to return (a bool scalar, a pytree); its first came with shape "
            f"{skip.shape} and dtype {skip.dtype}. Reduce over the gradients, as optax.skip_not_finite does."
        )
    return skip, skip_state


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


def _weighted_sq_norm(step: MicroStep) -> jax.Array:
    """The micro-step's n |g|^2, g being its mean gradient over n."""
    # Masking the scalar rather than the gradient lets XLA reduce what it reads, with no copy in between.
    counts = step.weight != 0
    sq_norm = jnp.where(counts, squared_norm(step.unmasked_grads), 0)
    return step.weight * sq_norm if step.scale else sq_norm / jnp.where(counts, step.weight, 1)


def _close_noise(options: Options, state: AccumulateState, noise_state: Any) -> Any:
    if not isinstance(noise_state, NoiseScaleState):
        return noise_state
    mean_sq_norm = squared_norm(state.grad_sum)
    if not options.use_grad_mean:
        mean_sq_norm = mean_sq_norm / jnp.square(state.weight_sum)
    estimates = estimate_noise(noise_state.num_terms, noise_state.sq_norm_sum, mean_sq_norm, state.weight_sum)
    return average_in(noise_state, estimates)
