"""What a loss function may return as its loss, as totals over weights."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaccum._dtypes import at_least_float32
from optaccum._scanning.reductions import WeightedMean, ratio

EXAMPLES = "examples"  # the name of the denominator that plain scalars share


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossTerms:
    """A micro-batch's loss, term by term."""

    totals: list[jax.Array]  # each shape=(), float32 or float64
    weights: list[jax.Array]  # each shape=(), float32 or float64
    # EXAMPLES, or the index of the first term that has the same array or number for its weight.
    same_as: tuple[str | int, ...] = dataclasses.field(metadata={"static": True})


class Terms(NamedTuple):
    """A loss as totals over weights, one pair for each distinct denominator."""

    totals: dict[str, jax.Array]  # each shape=(), float32 or float64
    weights: dict[str, jax.Array]  # each shape=(), float32 or float64


def loss_terms(loss: Any, mean_weight: float) -> LossTerms:
    """The terms of what a loss function returned.

    Args:
      loss: a scalar, a WeightedMean, or a dict of those.
      mean_weight: what a plain scalar, a mean over the micro-batch's examples, weighs.
    """
    totals, weights, same_as = [], [], []
    seen: dict[Any, int] = {}
    for path, term in _terms_by_path(loss).items():
        if isinstance(term, WeightedMean):
            weight = term.weight
            identity = ("number", weight) if isinstance(weight, int | float) else ("array", id(weight))
            same_as.append(seen.setdefault(identity, len(totals)))
            totals.append(_real_scalar(term.total, f"{path}.total"))
            weights.append(lax.stop_gradient(_real_scalar(weight, f"{path}.weight", or_integer=True)))
        else:
            total = _real_scalar(term, path)
            same_as.append(EXAMPLES)
            totals.append(total if mean_weight == 1 else total * mean_weight)
            weights.append(jnp.asarray(mean_weight, total.dtype))
    return LossTerms(totals, weights, tuple(same_as))


def denominators(traced: Sequence[LossTerms]) -> tuple[str, ...]:
    """A name for each term's weight: terms that have the same weight in all these share a name, and so one pass."""
    keys = list(zip(*(terms.same_as for terms in traced), strict=True))
    return tuple(EXAMPLES if EXAMPLES in key else f"weight{keys.index(key)}" for key in keys)


def add_terms(terms: LossTerms, names: tuple[str, ...]) -> Terms:
    """The totals of the terms that share a denominator, and that denominator."""
    sums = Terms({}, {})
    for total, weight, name in zip(terms.totals, terms.weights, names, strict=True):
        sums.totals[name] = sums.totals[name] + total if name in sums.totals else total
        sums.weights.setdefault(name, weight)
    return sums


def loss_value(loss: Any) -> jax.Array:
    """The scalar that a loss stands for."""
    terms = loss_terms(loss, 1.0)
    return total_ratio(add_terms(terms, denominators([terms])))


def total_ratio(terms: Terms) -> jax.Array:
    """The sum of the terms, each over its own weight; shape=()."""
    return functools.reduce(
        jnp.add, [ratio(terms.totals[name], terms.weights[name]) for name in terms.totals]
    )


def _terms_by_path(loss: Any) -> dict[str, Any]:
    if not isinstance(loss, dict):
        return {"loss": loss}
    if not loss:
        raise ValueError("expected at least one term in the dict that the loss function returns; got {}.")
    return {f"loss[{name!r}]": term for name, term in loss.items()}


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
