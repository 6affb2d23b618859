"""A loss is a dict of totals over weights."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaccum._dtypes import at_least_float32

EXAMPLES = "examples"  # the name of the one term that a plain scalar is: a mean over examples


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedMean:
    """A ratio of sums over the whole batch: `sum(total) / sum(weight)`.

    As a loss, or as a term of one, its gradient is exact however the weight is spread over the micro-batches; the
    weight is a constant to differentiation. A total weight of zero gives zero.

    Attributes:
      total: the sum over the micro-batch's examples or tokens, not their mean; as a loss a real scalar, shape ().
      weight: what the sum is over: a number of examples or tokens, or a sum of fractional weights, shape ().

    Example:
      >>> import jax.numpy as jnp
      >>> import optaccum
      >>> def loss_fn(scale, batch):
      ...     losses = scale * batch["x"]
      ...     return optaccum.WeightedMean((losses * batch["mask"]).sum(), batch["mask"].sum())
      >>> batch = {"x": jnp.arange(4.0), "mask": jnp.array([1.0, 1.0, 0.0, 1.0])}
      >>> loss, grads = optaccum.value_and_grad(loss_fn, num_microbatches=2)(3.0, batch)
      >>> round(float(loss), 3), round(float(grads), 3)  # 3 * (0 + 1 + 3) / 3, and its derivative
      (4.0, 1.333)
    """

    total: Any
    weight: Any


Terms = dict[str, WeightedMean]
"""A loss, term by term: totals and weights of shape (), float32 or float64."""


def loss_terms(loss: Any, mean_weight: float) -> Terms:
    """The terms of what a loss function returned, each with its own denominator.

    Args:
      loss: a scalar, a WeightedMean, or a dict of WeightedMeans.
      mean_weight: what a plain scalar, a mean over the micro-batch's examples, weighs.
    """
    if isinstance(loss, WeightedMean):
        return {"loss": _term(loss, "loss")}
    if not isinstance(loss, dict):
        total = _real_scalar(loss, "the loss")
        weighted = total if mean_weight == 1 else total * mean_weight
        return {EXAMPLES: WeightedMean(weighted, jnp.asarray(mean_weight, total.dtype))}
    if not loss:
        raise ValueError("expected at least one term in the dict that the loss function returns; got {}.")
    for name, term in loss.items():
        if not isinstance(term, WeightedMean):
            raise TypeError(
                f"expected every term of a loss that is a dict to be a WeightedMean; got {type(term).__name__} "
                f"at loss[{name!r}]. A mean over examples is WeightedMean(x.sum(), x.size); metrics go into aux, with "
                "has_aux=True."
            )
    return {path: _term(term, path) for path, term in ((f"loss[{n!r}]", t) for n, t in loss.items())}


def loss_value(terms: Terms) -> jax.Array:
    """The scalar that a loss stands for: the sum of its terms, each over its own weight; shape=()."""
    return functools.reduce(jnp.add, [ratio(term.total, term.weight) for term in terms.values()])


def ratio(total: jax.Array, weight: jax.Array, *, may_be_zero: bool = True) -> jax.Array:
    """Total / weight; where the weight may be zero, zero there, whatever the total."""
    dtype = at_least_float32(total.dtype)
    total, weight = total.astype(dtype), weight.astype(dtype)
    if not may_be_zero:
        return total / weight
    return jnp.where(weight != 0, total / jnp.where(weight != 0, weight, 1), 0)


def _term(term: WeightedMean, path: str) -> WeightedMean:
    weight = _real_scalar(term.weight, f"{path}.weight", or_integer=True)
    return WeightedMean(_real_scalar(term.total, f"{path}.total"), lax.stop_gradient(weight))


def _real_scalar(x: Any, name: str, or_integer: bool = False) -> jax.Array:
    """A real scalar in float32 at least."""
    kinds = (jnp.floating, jnp.integer) if or_integer else (jnp.floating,)
    try:
        dtype, shape = jax.typeof(x).dtype, jax.typeof(x).shape  # None has none
    except (TypeError, ValueError) as e:
        raise TypeError(
            f"expected {name} to be a scalar, an optaccum.WeightedMean, or a dict of those; got {type(x).__name__}. "
            "With auxiliary outputs, pass has_aux=True."
        ) from e
    if shape != () or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        raise TypeError(
            f"expected {name} to be a real {'' if or_integer else 'floating '}scalar; got shape {shape} and dtype "
            f"{dtype}. Take the mean over the examples, or return optaccum.WeightedMean(total, weight)."
        )
    return jnp.asarray(x).astype(at_least_float32(dtype))
