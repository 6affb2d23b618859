"""The wrapped optimizer's update, as the window's end calls it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optaccum._avals import keep_avals
from optaccum._streaming.check_state import explain_inner_state
from optaccum._streaming.micro_step import is_float0, without_float0

InnerUpdate = Callable[
    [optax.Updates, optax.OptState, optax.Params | None, dict[str, jax.Array]],
    tuple[optax.Updates, optax.OptState],
]
"""(gradient, inner_state, params, averaged extra args) -> (updates, inner_state)."""

_TOO_WIDE = (
    "The inner optimizer takes the gradients that came, but not their mean, which is wider. Give "
    "optaccum.accumulate accumulator_dtype=None, or keep the parameters in float32."
)


def make_inner_update(
    inner: optax.GradientTransformationExtraArgs,
    grads: optax.Updates,
    inner_state: optax.OptState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[InnerUpdate, optax.Updates]:
    """`inner.update` for gradients wider than `grads`, and what its updates look like.

    The updates get the structure and dtypes that `inner` itself gives for `grads`, found without running it.
    A leaf with a float0 gradient stays where it is, whatever weight decay would do to it.

    Returns:
      The function, and a pytree of `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: `inner_state` is not `inner`'s; it says where. At the first call, not when a window ends.
    """
    has_float0 = any(map(is_float0, jax.tree.leaves(grads)))
    like = without_float0(grads, params)

    def update(gradient, inner_state, params, extra_args):
        updates, inner_state = inner.update(gradient, inner_state, params, **extra_args)
        if has_float0:
            updates = jax.tree.map(lambda g, zero, u: zero if is_float0(g) else u, grads, like, updates)
        return updates, inner_state

    def strongly_typed_updates(gradient, inner_state, params):
        updates, new_inner_state = update(gradient, inner_state, params, extra_args)
        keep_avals(new_inner_state, inner_state, "the inner optimizer's state")
        return jax.tree.map(lambda u: lax.convert_element_type(u, jnp.result_type(u)), updates)

    try:
        updates_like = jax.eval_shape(strongly_typed_updates, like, inner_state, params)
    except Exception as error:
        if (difference := explain_inner_state(inner, inner_state, params)) is None:
            raise
        raise ValueError(
            f"the inner optimizer's state is not one that it makes for these parameters: {difference}. "
            "Restore it with the optimizer that it was saved with, or start from init."
        ) from error

    def inner_update(gradient, inner_state, params, averages):
        try:
            updates, inner_state = update(gradient, inner_state, params, extra_args | averages)
        except TypeError as error:
            if jax.tree.map(jnp.result_type, gradient) != jax.tree.map(jnp.result_type, like):
                error.add_note(_TOO_WIDE)
            raise
        return keep_avals(updates, updates_like, "the inner optimizer's updates"), inner_state

    return inner_update, updates_like
