"""One call from gradients to parameters."""

from typing import Any

import jax
import optax

from optaccum._streaming.accumulate import options_of
from optaccum._streaming.gradients import add_updates
from optaccum._streaming.state import is_state, states_in
from optaccum._streaming.window import Given, close, enter


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    *,
    weight: jax.typing.ArrayLike | None = None,
    denominator: jax.typing.ArrayLike | None = None,
    emit: jax.typing.ArrayLike | None = None,
    **extra_args: Any,
) -> tuple[optax.Params, optax.OptState]:
    """One micro-step, from gradients to parameters: `tx.update` and `optax.apply_updates` in one.

    The parameters are those the two calls give. For a `tx` that `optaccum.accumulate` made there are no zero updates in
    between: parameters and optimizer state are touched only by the call that ends a window, and then in place where
    they are donated in the order in which they return, as below (JAX pairs buffers of one shape in order: another costs
    two copies of the parameters). For any other transformation, such as a chain around an `accumulate`, it is the two
    calls.

    Args:
      tx: any Optax gradient transformation.
      grads: gradients of one micro-batch, shaped like `params`.
      state: `tx`'s state.
      params: the parameters.
      weight: scalar; see `optaccum.accumulate`. Handed to `tx.update` only if given, as the next two.
      denominator: scalar; likewise.
      emit: bool scalar; likewise.
      **extra_args: as for `tx.update`.

    Returns:
      The new parameters and the new state.

    Raises:
      TypeError, ValueError: as the update of `optaccum.accumulate`; ValueError for no parameters; TypeError for a
        weight, denominator or emit where there is no `accumulate` in `tx` to take it.

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
        raise ValueError("expected params to be the parameters that apply_gradients is to update; got None.")
    options = options_of(tx)
    if options is not None and is_state(state):
        state, full = enter(options, grads, state, params, Given(weight, denominator, emit, extra_args))
        return close(options, state, full, grads, params, extra_args, in_place=True)
    given = {"weight": weight, "denominator": denominator, "emit": emit}  # for an `accumulate` inside
    given = {name: value for name, value in given.items() if value is not None}
    if given and not states_in(state):
        raise TypeError(
            f"expected tx to have an optaccum.accumulate inside, to take {min(given)}=; got a state of "
            f"{type(state).__name__} that holds none. Leave {min(given)}= out, or wrap the optimizer."
        )
    updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **given, **extra_args)
    return add_updates(params, updates), state
