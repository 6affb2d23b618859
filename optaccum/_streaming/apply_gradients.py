"""One call from gradients to parameters; and the end of a window before it is full."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaccum._avals import keep_avals
from optaccum._streaming.accumulate import options_of
from optaccum._streaming.check_state import check_is_state
from optaccum._streaming.inner_update import make_inner_update
from optaccum._streaming.state import AccumulateState
from optaccum._streaming.window import close, close_with_updates, enter


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    *,
    weight: jax.typing.ArrayLike | None = None,
    denominator: jax.typing.ArrayLike | None = None,
    **extra_args: Any,
) -> tuple[optax.Params, optax.OptState]:
    """One micro-step, from gradients to parameters: `tx.update` and `optax.apply_updates` in one.

    The parameters are those the two calls give. For a `tx` that `optaccum.accumulate` made there are no zero
    updates in between: parameters and optimizer state are touched only by the call that ends a window, and
    then in place where they are donated (`jax.jit(step, donate_argnums=...)`) in the order in which they
    return, as below: JAX pairs buffers of one shape in order, and in another order two copies of the
    parameters are made. For any other transformation, such as a chain with an `accumulate` inside, it is the
    two calls.

    Args:
      tx: any Optax gradient transformation.
      grads: gradients of one micro-batch, shaped like `params`.
      state: `tx`'s state.
      params: the parameters.
      weight: scalar; see `optaccum.accumulate`. Handed to `tx.update` only if given.
      denominator: scalar; likewise.
      **extra_args: as for `tx.update`.

    Returns:
      The new parameters and the new state.

    Raises:
      TypeError, ValueError: as the update of `optaccum.accumulate`; ValueError for no parameters.

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax, optaccum
      >>> tx = optaccum.accumulate(optax.sgd(1.0), 2)
      >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
      ... def step(params, state, grads):
      ...     return optaccum.apply_gradients(tx, grads, state, params)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for gradient in (1.0, 3.0):
      ...     params, state = step(params, state, jnp.full(2, gradient))
      >>> params.tolist()
      [-2.0, -2.0]
    """
    if params is None:
        raise ValueError("apply_gradients expects the parameters that it is to update, got None.")
    options = options_of(tx)
    if options is None or not isinstance(state, AccumulateState):
        given = {"weight": weight, "denominator": denominator}  # for an `accumulate` inside
        extra_args |= {name: value for name, value in given.items() if value is not None}
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state
    state, full = enter(options, grads, state, params, weight, denominator, extra_args)
    inner_update, _ = make_inner_update(options.inner, grads, state.inner_state, params, extra_args)

    def step_fn(params, inner_state, gradient, averages):
        updates, inner_state = inner_update(gradient, inner_state, params, averages)
        return keep_avals(optax.apply_updates(params, updates), params, "the parameters"), inner_state

    return close(options, state, full, params, step_fn)


def flush(
    tx: optax.GradientTransformation, state: AccumulateState, params: optax.Params, **extra_args: Any
) -> tuple[optax.Updates, AccumulateState]:
    """Ends an open window now, with what is in it: for the last, shorter window of an epoch.

    Args:
      tx: a transformation that `optaccum.accumulate` made.
      state: its state.
      params: the parameters.
      **extra_args: for `inner`. Those in `averaged_extra_args` need not be given: the window's averages
        count.

    Returns:
      The updates, of the dtypes that gradients of the parameters' dtypes give, and the state. The gradient
      sum is divided by the weight in the window. Where none is open, or its weight is zero, the updates are
      exact zeros and `inner` does not run.

    Raises:
      TypeError: `tx` is not made by `optaccum.accumulate` (a chain around one is not), the state is not of one, or a
        weight is given.

    Example:
      >>> import jax.numpy as jnp, optax, optaccum
      >>> tx = optaccum.accumulate(optax.sgd(1.0), 4)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for gradient in (1.0, 3.0):
      ...     _, state = tx.update(jnp.full(2, gradient), state, params)
      >>> updates, state = optaccum.flush(tx, state, params)
      >>> updates.tolist()
      [-2.0, -2.0]
    """
    options = options_of(tx)
    if options is None:
        raise TypeError(
            f"flush expects a transformation that optaccum.accumulate made, got {type(tx).__name__}. Of a chain, flush "
            "the accumulate in it."
        )
    check_is_state(state)
    for name in ("weight", "denominator"):
        if name in extra_args:
            raise TypeError(f"flush takes no {name}: it divides by what the window holds.")
    unseen = {name: jnp.zeros([], jnp.float32) for name in options.averaged_extra_args}
    like = _gradients_like(params)
    return close_with_updates(options, state, state.micro_step > 0, like, params, unseen | extra_args)


def _gradients_like(params: optax.Params) -> optax.Updates:
    """Zeros of the dtypes that `jax.grad` gives for these parameters."""

    def zeros(leaf):
        is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        return jnp.zeros_like(leaf) if is_float else np.zeros(jnp.shape(leaf), jax.dtypes.float0)

    return jax.tree.map(zeros, params)
