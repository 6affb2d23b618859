"""How far apart two gradients are, leaf by leaf, where rounding must raise no alarm."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaccum._dtypes import as_summand

PyTree = Any


class Sizes(NamedTuple):
    """What a value, and a gradient leaf, count for at least, however much of them cancels."""

    value: float
    leaf: float


def least_sizes(fraction: float, whole: PyTree, part: PyTree = (), params: PyTree = ()) -> Sizes:
    """A fraction of how large things are before they cancel.

    Args:
      fraction: of the sizes below.
      whole: the whole batch's value and gradients: a leaf counts for a fraction of the whole gradient.
      part: one micro-batch's, or nothing: so does what cancels between micro-batches.
      params: what is differentiated, or nothing: a value counts for a fraction of |gradient| |params|.
    """
    (_, *grads), part, params = (
        [float(x) for x in _norms(jax.tree.leaves(tree))] for tree in (whole, part, params)
    )
    part_value, *part_grads = part or [0.0]
    gradient = max(math.hypot(*grads), math.hypot(*part_grads))
    return Sizes(fraction * max(part_value, gradient * math.hypot(*params)), fraction * gradient)


def relative_errors(
    accumulated: tuple[Any, PyTree], whole: tuple[Any, PyTree], least: Sizes
) -> tuple[float, dict[str, float]]:
    """|accumulated - whole| / |whole| for the value and for each gradient leaf by its path."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(accumulated[1])]
    expected = jax.tree.leaves(whole)
    pairs = zip(jax.tree.leaves(accumulated), expected, strict=True)
    # The two may be laid out over a mesh in different ways.
    differences = _distances([jax.device_put(x, y.sharding) for x, y in pairs], expected)
    value, *grads = (float(x) for x in _norms(expected))
    sizes = [max(value, least.value), *(max(size, least.leaf) for size in grads)]
    value_error, *errors = (_ratio(float(d), size) for d, size in zip(differences, sizes, strict=True))
    return value_error, dict(zip(names, errors, strict=True))


def _norm(x: jax.Array) -> jax.Array:
    """|x| in the 2-norm, without underflow or overflow; NaN where x is not finite."""
    size = jnp.abs(as_summand(x))
    largest = jnp.max(size, initial=0)
    return largest * jnp.sqrt(jnp.sum(jnp.square(size / jnp.where(largest > 0, largest, 1))))


@jax.jit
def _norms(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_norm(x) for x in leaves]


@jax.jit
def _distances(leaves: list[jax.Array], others: list[jax.Array]) -> list[jax.Array]:
    return [_norm(as_summand(x) - as_summand(y)) for x, y in zip(leaves, others, strict=True)]


def _ratio(difference: float, size: float) -> float:
    if math.isnan(difference) or math.isnan(size):
        return float("nan")
    return difference / size if size else (0.0 if difference == 0 else float("inf"))
