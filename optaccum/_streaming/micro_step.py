"""What one call brings to the window: a gradient that fits the state, its weight, extra args to average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class MicroStep(NamedTuple):
    """One micro-batch's contribution. Where its weight is zero, so is all that counts."""

    grads: optax.Updates  # dtypes as they came; float0 replaced
    unmasked_grads: optax.Updates  # the same, whatever the weight
    weight: jax.Array  # shape=(), float32: the weight or the denominator
    scale: bool  # the gradient is still to be multiplied by it
    extra_terms: dict[str, jax.Array]  # each shape=(), float32: what averaged extra args add to their sums


def make_micro_step(
    grads: optax.Updates,
    grad_sum: optax.Updates,
    params: optax.Params | None,
    weight: Any,
    denominator: Any,
    averaged_extra_args: tuple[str, ...],
    extra_args: dict[str, Any],
) -> MicroStep:
    """Checks what came against the state, and masks it where its weight is zero."""
    if weight is not None and denominator is not None:
        raise TypeError(
            "expected weight= (grads of the micro-batch's mean loss) or denominator= (grads of its summed "
            "loss), got both: leave out the one that does not describe the loss."
        )
    check_gradients(grads, grad_sum)
    grads = without_float0(grads, params)
    name, given = ("weight", weight) if denominator is None else ("denominator", denominator)
    values = {key: _averaged(key, extra_args) for key in averaged_extra_args}
    if given is None:
        return MicroStep(grads, grads, jnp.ones([], jnp.float32), False, values)
    count = _scalar(name, given)

    def where_counted(x):
        return jnp.where(count != 0, x, jnp.zeros_like(x))

    masked, values = jax.tree.map(where_counted, (grads, values))
    if weight is None:
        return MicroStep(masked, grads, count, False, values)
    return MicroStep(masked, grads, count, True, {key: count * value for key, value in values.items()})


def check_gradients(grads: optax.Updates, grad_sum: optax.Updates) -> None:
    """Raises, naming the leaf, where the gradients are not shaped as the parameters that init was given."""
    came, came_structure = jax.tree.flatten_with_path(grads)
    expected, expected_structure = jax.tree.flatten_with_path(grad_sum)
    if came_structure != expected_structure:
        raise ValueError(_structure_message(dict(came), dict(expected), came_structure, expected_structure))
    for (path, grad), (_, total) in zip(came, expected, strict=True):
        if jnp.shape(grad) != total.shape:
            raise ValueError(
                f"the gradient at {_name(path)} has shape {jnp.shape(grad)}, the state {total.shape}: "
                "pass gradients of the parameters that init was given."
            )
        dtype = _dtype(grad)
        if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.iscomplexobj(total):
            raise ValueError(
                f"the gradient at {_name(path)} is {dtype}, its accumulator {total.dtype} would lose the "
                "imaginary part: initialise with complex parameters, or give accumulator_dtype a function "
                "that returns a complex dtype for this leaf."
            )


def without_float0(grads: optax.Updates, params: optax.Params | None) -> optax.Updates:
    """`grads` with zeros of the parameter's dtype for float0, the gradient of an integer parameter."""
    if params is None:
        return jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.int8) if is_float0(g) else jnp.asarray(g), grads)

    def replaced(grad, param):
        if grad is None:
            return None
        return jnp.zeros_like(param) if is_float0(grad) else jnp.asarray(grad)

    return jax.tree.map(replaced, grads, params, is_leaf=lambda g: g is None)


def is_float0(leaf: Any) -> bool:
    """Whether JAX gave this gradient to an integer, bool or key parameter."""
    return _dtype(leaf) == jax.dtypes.float0


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _averaged(name: str, extra_args: dict[str, Any]) -> jax.Array:
    if extra_args.get(name) is None:
        raise TypeError(
            f"averaged_extra_args names {name!r}: every call expects a scalar {name}=..., got none among "
            f"{sorted(extra_args)}."
        )
    return _scalar(name, extra_args[name])


def _scalar(name: str, value: Any) -> jax.Array:
    """`value` as a float32 scalar."""
    try:
        shape, dtype = jnp.shape(value), _dtype(value)
    except TypeError as error:
        raise TypeError(f"{name} expects a real scalar, got {type(value).__name__}.") from error
    if shape != ():
        raise ValueError(f"{name} expects a scalar, got shape {shape}: reduce it over the micro-batch first.")
    if not (jnp.issubdtype(dtype, np.number) or dtype == jnp.bool_) or jnp.issubdtype(
        dtype, jnp.complexfloating
    ):
        raise TypeError(f"{name} expects a real scalar, got dtype {dtype}.")
    return jnp.asarray(value).astype(jnp.float32)


def _structure_message(came: dict[Any, Any], expected: dict[Any, Any], *structures: Any) -> str:
    intro = "the gradients do not match the state that init made from the parameters: "
    for path in expected:
        if path not in came:
            return f"{intro}{_name(path)} is missing, or not an array. Pass a gradient for each parameter."
    for path in came:
        if path not in expected:
            return f"{intro}{_name(path)} was not among the parameters. Initialise with all of them."
    return f"{intro}expected {structures[1]}, got {structures[0]}."


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path) or "the root"
