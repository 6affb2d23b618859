"""Taking over from `optax.MultiSteps`, in the middle of a window too."""

import jax
import jax.core
import jax.numpy as jnp
import optax

from optaccum._dtypes import at_least_float32
from optaccum._noise_scale import NoiseScaleState
from optaccum._streaming.accumulate import options_of, start
from optaccum._streaming.state import AccumulateState


def from_multi_steps(tx: optax.GradientTransformation, state: optax.MultiStepsState) -> AccumulateState:
    r"""A state of `optax.MultiSteps`, as one of `accumulate` that goes on to the same parameters.

    It may be in the middle of a window. MultiSteps keeps the mean of its m micro-steps so far where
    `use_grad_mean` is True, so S = m times that, W = m.

    Args:
      tx: a transformation that `optaccum.accumulate` made, with the inner optimizer, the schedule and the
        `use_grad_mean` of the MultiSteps before it.
      state: the `optax.MultiStepsState`.

    Returns:
      The state for `tx`. Each micro-step so far counts with weight 1, but `weight_total` starts from 0 where k is a
      function. With `accumulator_dtype=None` the sum keeps MultiSteps' dtype. A window that is open stays out
      of the noise scale.

    Raises:
      TypeError: `tx` or `state` is something else.
      ValueError: in the middle of a window with `averaged_extra_args`, whose values MultiSteps does not keep.

    Example:
      >>> import jax.numpy as jnp, optax, optaccum
      >>> params = jnp.zeros(2)
      >>> multi_steps = optax.MultiSteps(optax.sgd(1.0), 2)
      >>> _, state = multi_steps.update(jnp.full(2, 1.0), multi_steps.init(params), params)
      >>> tx = optaccum.accumulate(optax.sgd(1.0), 2)
      >>> updates, _ = tx.update(jnp.full(2, 3.0), optaccum.from_multi_steps(tx, state), params)
      >>> updates.tolist()
      [-2.0, -2.0]
    """
    options = options_of(tx)
    if options is None or not isinstance(state, optax.MultiStepsState):
        raise TypeError(
            "expected a transformation that optaccum.accumulate made and an optax.MultiStepsState; got "
            f"{type(tx).__name__} and {type(state).__name__}."
        )
    micro_step = jnp.asarray(state.mini_step, jnp.int32)
    gradient_step = jnp.asarray(state.gradient_step, jnp.int32)
    if options.averaged_extra_args and not isinstance(micro_step, jax.core.Tracer) and micro_step > 0:
        raise ValueError(
            f"expected a MultiSteps state between windows, since it keeps no {options.averaged_extra_args}; got one "
            f"{int(micro_step)} micro-steps into a window. Convert after an update, or leave averaged_extra_args out."
        )
    fresh = start(options, state.acc_grads, state.inner_opt_state)
    weight_sum = micro_step.astype(jnp.float32)

    def grad_sum(zeros, total):
        wide = total.astype(at_least_float32(zeros.dtype))
        return (wide * weight_sum.astype(wide.dtype) if options.use_grad_mean else wide).astype(zeros.dtype)

    emitted = gradient_step * (options.every_k if isinstance(options.every_k, int) else 0)
    high = emitted.astype(jnp.float32)
    noise_state, skip_state = fresh.noise_state, fresh.skip_state
    if isinstance(noise_state, NoiseScaleState):  # NaN: the norms in the open window are not known
        noise_state = noise_state._replace(sq_norm_sum=jnp.full([], jnp.nan, jnp.float32))
    if jax.tree.structure(skip_state) == jax.tree.structure(state.skip_state):
        skip_state = state.skip_state
    return fresh._replace(
        micro_step=micro_step,
        gradient_step=gradient_step,
        has_updated=(micro_step == 0) & (gradient_step > 0),
        grad_sum=jax.tree.map(grad_sum, fresh.grad_sum, state.acc_grads),
        weight_sum=weight_sum,
        weight_total=jnp.stack([high, (emitted - high.astype(jnp.int32)).astype(jnp.float32)]),
        skip_state=skip_state,
        noise_state=noise_state,
    )
