"""What leaves a micro-batch, and how it combines into what the whole batch would give."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaccum._dtypes import at_least_float32
from optaccum._scanning.data_axes import extreme, from_device, psum
from optaccum._scanning.split import join

PyTree = Any


def _pytree(cls: type) -> type:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
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


@_pytree
class Sum:
    """Auxiliary output that is summed over the micro-batches (bools are counted, 16-bit floats summed in float32)."""

    value: Any


@_pytree
class Max:
    """Auxiliary output of which the elementwise maximum over the micro-batches is kept."""

    value: Any


@_pytree
class Min:
    """Auxiliary output of which the elementwise minimum over the micro-batches is kept."""

    value: Any


@_pytree
class Last:
    """Auxiliary output of which the last micro-batch's value is kept (across devices, the last device's)."""

    value: Any


@_pytree
class Stack:
    """Auxiliary output of which every micro-batch's value is kept, along a new leading axis.

    Of shape (num_microbatches, ...); across `data_axes`, (devices * num_microbatches, ...), device by device.
    """

    value: Any


@_pytree
class Mean:
    """What a bare float leaf stands for: a mean over examples. Unlike WeightedMean, a mean of nothing is NaN."""

    total: Any
    weight: Any


@_pytree
class Concat:
    """A leaf whose axis `axis` is the batch's."""

    value: Any
    axis: int = dataclasses.field(metadata={"static": True})


CHOICES = "optaccum.WeightedMean, Sum, Max, Min, Last or Stack"


def as_summand(x: Any) -> jax.Array:
    """16-bit floats to float32, bools to integers: the dtype that sums are kept in."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return x.astype(at_least_float32(x.dtype))
    return x.astype(jnp.int32) if x.dtype == jnp.bool_ else x


def ratio(total: jax.Array, weight: jax.Array, *, may_be_zero: bool = True) -> jax.Array:
    """Total / weight; where the weight may be zero, zero there, whatever the total."""
    dtype = at_least_float32(total.dtype)
    total, weight = total.astype(dtype), weight.astype(dtype)
    if not may_be_zero:
        return total / weight
    return jnp.where(weight != 0, total / jnp.where(weight != 0, weight, 1), 0)


class _Reduction(NamedTuple):
    """How one kind of auxiliary output combines; each function works on one array."""

    start: Callable[[jax.Array], jax.Array]  # an array like the first value -> the value before any
    add: Callable[[jax.Array, jax.Array], jax.Array]
    # over the devices of these mesh axes, of which the last with a micro-batch knows itself
    across: Callable[[jax.Array, tuple[str, ...], jax.Array], jax.Array]


def lowest(x: jax.Array) -> jax.Array:
    """What `jnp.maximum` with anything leaves that thing."""
    if x.dtype == jnp.bool_:
        return jnp.zeros_like(x)
    return jnp.full_like(x, -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min)


def _highest(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return jnp.ones_like(x)
    return jnp.full_like(x, jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max)


_SUM = _Reduction(jnp.zeros_like, jnp.add, lambda x, axes, _: psum(x, axes))
_REDUCTIONS: dict[type, _Reduction] = {
    WeightedMean: _SUM,
    Mean: _SUM,
    Sum: _SUM,
    Max: _Reduction(lowest, jnp.maximum, lambda x, axes, _: extreme(x, axes, lax.pmax)),
    Min: _Reduction(_highest, jnp.minimum, lambda x, axes, _: extreme(x, axes, lax.pmin)),
    Last: _Reduction(jnp.zeros_like, lambda _, x: x, from_device),
}


def is_wrapper(x: Any) -> bool:
    return type(x) in _REDUCTIONS or _is_stacked(x)


def map_wrappers(fn: Callable[..., Any], aux: PyTree, *rest: PyTree) -> PyTree:
    return jax.tree.map(fn, aux, *rest, is_leaf=is_wrapper)


def _is_stacked(x: Any) -> bool:
    return isinstance(x, Stack | Concat)


def check_one_shape(auxes: Sequence[PyTree]) -> None:
    """Raises where what a wrapper holds is of another shape in micro-batches of another size: rows, perhaps."""
    first, *others = [jax.tree_util.tree_leaves_with_path(aux, is_leaf=is_wrapper) for aux in auxes]
    for other in others:
        for (path, x), (_, y) in zip(first, other, strict=False):  # where they differ the loop says so
            shapes = [jax.tree.map(jnp.shape, wrapper) for wrapper in (x, y)]
            if is_wrapper(x) and shapes[0] != shapes[1]:
                raise TypeError(
                    f"expected what {type(x).__name__} holds in aux{jax.tree_util.keystr(path)} to have one shape for "
                    f"micro-batches of all sizes; got {shapes[0]} and {shapes[1]}. Leave rows of the batch bare, "
                    "to be concatenated, or reduce over them first."
                )


def prepare(wrapper: Any) -> Any:
    """A wrapper's arrays in the dtypes that they combine in."""
    if isinstance(wrapper, WeightedMean | Sum):
        return jax.tree.map(as_summand, wrapper)
    wrapper = jax.tree.map(jnp.asarray, wrapper)
    if isinstance(wrapper, Max | Min):
        for x in jax.tree.leaves(wrapper):
            if jnp.issubdtype(x.dtype, jnp.complexfloating):
                raise TypeError(
                    f"expected a real array in {type(wrapper).__name__}; got one of dtype {x.dtype}."
                )
    return wrapper


def divide_aux(aux: PyTree) -> tuple[PyTree, PyTree]:
    """Splits wrapped aux into what is reduced in the loop's carry and what is stacked; None in the other's place."""
    reduced = map_wrappers(lambda x: None if _is_stacked(x) else x, aux)
    stacked = map_wrappers(lambda x: x if _is_stacked(x) else None, aux)
    return reduced, stacked


def start(like: PyTree) -> PyTree:
    """The reduced aux before any micro-batch."""
    return map_wrappers(lambda x: jax.tree.map(_REDUCTIONS[type(x)].start, x), like)


def add(acc: PyTree, x: PyTree) -> PyTree:
    """The reduced aux with one more micro-batch."""
    return map_wrappers(lambda a, b: jax.tree.map(_REDUCTIONS[type(a)].add, a, b), acc, x)


def across(acc: PyTree, axes: tuple[str, ...], is_last: jax.Array) -> PyTree:
    """The reduced aux of all devices along these mesh axes; `is_last` on the one whose `Last` is kept."""
    return map_wrappers(
        lambda a: jax.tree.map(lambda x: _REDUCTIONS[type(a)].across(x, axes, is_last), a), acc
    )


def finish(acc: PyTree) -> PyTree:
    """The bare values of the reduced aux."""

    def value(x):
        if isinstance(x, WeightedMean):
            return jax.tree.map(lambda total: ratio(total, x.weight), x.total)
        return ratio(x.total, x.weight, may_be_zero=False) if isinstance(x, Mean) else x.value

    return map_wrappers(value, acc)


def rows(stacks: list[PyTree]) -> PyTree:
    """The stacked aux of one or two scans with its rows in front, in the batch's own order."""

    def gather(*parts):
        if isinstance(parts[0], Stack):
            return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
        axis = parts[0].axis
        return Concat(join([jnp.moveaxis(part.value, axis + 1, 1) for part in parts]), axis)

    return map_wrappers(gather, *stacks)


def merge_aux(reduced: PyTree, stacked: PyTree) -> PyTree:
    """The whole aux from finished reductions and from `rows`."""

    def value(rows_or_none, other):
        if isinstance(rows_or_none, Concat):
            return jnp.moveaxis(rows_or_none.value, 0, rows_or_none.axis)
        return rows_or_none.value if isinstance(rows_or_none, Stack) else other

    return jax.tree.map(value, stacked, reduced, is_leaf=lambda x: x is None or is_wrapper(x))
