"""Taking over from `optax.MultiSteps`, in the middle of a window too."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from optaccum._dtypes import accumulator_dtype_of, at_least_float32
from optaccum._noise_scale import init_noise_state
from optaccum._streaming.accumulate import options_of
from optaccum._streaming.state import AccumulateState, add_to_total
from optaccum._streaming.window import Options


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
            f"{int(micro_step)} micro-steps into a window. Convert it after an update, or leave out "
            "averaged_extra_args."
        )
    weight_sum = micro_step.astype(jnp.float32)

    def grad_sum(path, total):
        dtype = accumulator_dtype_of(options.accumulator_dtype, path, total)
        wide = total.astype(at_least_float32(dtype))
        return (wide * weight_sum.astype(wide.dtype) if options.use_grad_mean else wide).astype(dtype)

    k = options.every_k if isinstance(options.every_k, int) else 0
    noise_state = ()
    if options.track_noise_scale:  # NaN: the open window's norms are not known, so it will not count
        noise_state = init_noise_state()._replace(sq_norm_sum=jnp.full([], jnp.nan, jnp.float32))
    return AccumulateState(
        micro_step=micro_step,
        gradient_step=gradient_step,
        has_updated=(micro_step == 0) & (gradient_step > 0),
        num_skipped=jnp.zeros([], jnp.int32),
        grad_sum=jax.tree_util.tree_map_with_path(grad_sum, state.acc_grads),
        weight_sum=weight_sum,
        inner_state=state.inner_opt_state,
        weight_total=add_to_total(jnp.zeros([2], jnp.float32), (gradient_step * k).astype(jnp.float32)),
        extra_sums={name: jnp.zeros([], jnp.float32) for name in options.averaged_extra_args} or (),
        skip_state=_skip_state(options, state),
        noise_state=noise_state,
    )


def _skip_state(options: Options, state: optax.MultiStepsState) -> Any:
    """MultiSteps' own where it has one, else what the skip function says of zeros."""
    if options.should_skip_update_fn is None:
        return ()
    zeros = jax.tree.map(jnp.zeros_like, state.acc_grads)
    fresh = options.should_skip_update_fn(zeros, jnp.zeros([], jnp.int32), zeros)[1]
    same = jax.tree.structure(fresh) == jax.tree.structure(state.skip_state)
    return state.skip_state if same else fresh
