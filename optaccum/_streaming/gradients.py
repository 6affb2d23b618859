"""Which parameters have a gradient. JAX's is float0 for integers; None stands where the parameter is none of ours."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaccum._dtypes import dtype_of, is_float0, is_numeric, keep_sharding, leaf_name

PyTree = Any


def moving(grads: optax.Updates, tree: PyTree) -> PyTree:
    """The leaves of `tree` that have a gradient, None for the others."""
    return jax.tree.map(lambda g, x: None if g is None or is_float0(g) else x, grads, tree, is_leaf=_is_none)


def put_back(some: PyTree, tree: PyTree) -> PyTree:
    """`tree`, with those of `some` that are not None."""
    return jax.tree.map(lambda new, x: x if new is None else new, some, tree, is_leaf=_is_none)


def as_arrays(grads: optax.Updates, grad_sum: optax.Updates) -> optax.Updates:
    """The gradients laid out as their sums; zeros for those that are float0."""

    def as_array(grad, total):
        if is_float0(grad):
            return jnp.zeros_like(total)
        grad = jnp.asarray(grad)
        return keep_sharding(lax.convert_element_type(grad, grad.dtype), total)  # strongly typed

    return jax.tree.map(as_array, grads, grad_sum)


def still(grads: optax.Updates, updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
    """The updates, zero where the gradient is float0: weight decay, for one, would move an integer."""
    if not any(map(is_float0, jax.tree.leaves(grads))):
        return updates

    def stay(grad, update, param):
        if grad is None or not is_float0(grad):
            return update
        return jnp.zeros_like(update, dtype=jnp.int8) if param is grad else jnp.zeros_like(param)

    return jax.tree.map(stay, grads, updates, grads if params is None else params, is_leaf=_is_none)


def add_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """`optax.apply_updates`, for which parameters without an update may be anything."""

    def add(update, param):
        if update is None or param is None:
            return param
        return jnp.asarray(param + update).astype(jnp.asarray(param).dtype)

    return jax.tree.map(add, updates, params, is_leaf=_is_none)


def gradient_like(param: Any) -> Any:
    """What `jax.grad` gives for this parameter: a `jax.ShapeDtypeStruct`, a float0, or None for what is no array."""
    if not is_numeric(param):
        return None
    if jnp.issubdtype(jnp.result_type(param), jnp.inexact):
        return jax.ShapeDtypeStruct(jnp.shape(param), jnp.result_type(param))
    return np.zeros(jnp.shape(param), jax.dtypes.float0)


def gradients_like(params: optax.Params, grad_sum: optax.Updates) -> optax.Updates:
    """What `jax.grad` gives for the parameters that have a sum, likewise; None for the others."""

    def like(total, param):
        return None if total is None else gradient_like(param)

    try:
        grads = jax.tree.map(like, grad_sum, params, is_leaf=_is_none)
    except ValueError as error:
        error.add_note("The parameters are not those that init was given.")
        raise
    check_gradients(grads, grad_sum)
    return grads


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
    for (path, grad), total in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(grad_sum), strict=True):
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


def _is_none(x: Any) -> bool:
    return x is None
