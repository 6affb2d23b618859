"""What leaves a micro-batch, and how it combines into what the whole batch would give."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaccum._data_axes import extreme, from_device
from optaccum._split import join

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
class _Mean:
    """What a bare float leaf stands for: a mean over examples. Unlike WeightedMean, a mean of nothing is NaN."""

    total: Any
    weight: Any


@dataclasses.dataclass(frozen=True)
class _Concat:
    """A leaf whose axis `axis` is the batch's."""

    value: Any
    axis: int


jax.tree_util.register_dataclass(_Concat, data_fields=["value"], meta_fields=["axis"])

WRAPPERS = (WeightedMean, Sum, Max, Min, Last, Stack)
_STACKED = (Stack, _Concat)
_CHOICES = "optaccum.WeightedMean, Sum, Max, Min, Last or Stack"


def at_least_float32(x: Any) -> jax.Array:
    """16-bit floats to float32, bools to integers: the dtype that sums are kept in."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x.astype(jnp.int32) if x.dtype == jnp.bool_ else x


def ratio(total: jax.Array, weight: jax.Array) -> jax.Array:
    """total / weight, and zero where the weight is zero, whatever the total."""
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


def _sum_across(x: jax.Array, axes: tuple[str, ...], _: jax.Array) -> jax.Array:
    return lax.psum(x, axes)


def _max_across(x: jax.Array, axes: tuple[str, ...], _: jax.Array) -> jax.Array:
    return extreme(x, axes, lax.pmax)


def _min_across(x: jax.Array, axes: tuple[str, ...], _: jax.Array) -> jax.Array:
    return extreme(x, axes, lax.pmin)


_SUM = _Reduction(jnp.zeros_like, jnp.add, _sum_across)
_REDUCTIONS: dict[type, _Reduction] = {
    WeightedMean: _SUM,
    _Mean: _SUM,
    Sum: _SUM,
    Max: _Reduction(lowest, jnp.maximum, _max_across),
    Min: _Reduction(_highest, jnp.minimum, _min_across),
    Last: _Reduction(jnp.zeros_like, lambda _, x: x, from_device),
}


def _is_wrapper(x: Any) -> bool:
    return isinstance(x, (*WRAPPERS, _Mean, _Concat))


def _map_wrappers(fn: Callable[..., Any], aux: PyTree, *rest: PyTree) -> PyTree:
    return jax.tree.map(fn, aux, *rest, is_leaf=_is_wrapper)


def _is_stacked(x: Any) -> bool:
    return isinstance(x, _STACKED)


# The aux of a micro-batch goes through these, in this order -------------------------------------------------------


class AuxLeaf(NamedTuple):
    """What is known of a bare leaf: its path, and how its shape and dtype depend on the micro-batch's size."""

    path: str
    shape: tuple[int, ...]
    doubled_shape: tuple[int, ...]  # its shape for twice the examples
    dtype: Any


def wrap_bare(aux: PyTree, leaves: list[AuxLeaf], num_examples: int, mean_allowed: bool) -> PyTree:
    """Wraps each bare leaf of one micro-batch's aux in what it stands for.

    Args:
      aux: the user's auxiliary output for one micro-batch.
      leaves: what is known of each bare leaf, in the tree's order.
      num_examples: the micro-batch's size.
      mean_allowed: whether a bare float leaf may stand for a mean over examples.

    Raises:
      TypeError: for a leaf that stands for nothing in particular; it names the leaf and the wrappers.
    """
    known = iter(leaves)

    def wrap(x):
        if _is_wrapper(x):
            return _prepare(x)
        leaf = next(known)
        if leaf.shape != leaf.doubled_shape:
            return _Concat(x, _batch_axis(leaf))
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"expected aux{leaf.path}, of dtype {leaf.dtype}, to be wrapped in {_CHOICES}.")
        if not mean_allowed:
            raise TypeError(
                f"expected aux{leaf.path} to be wrapped in {_CHOICES}: only under a loss that is a plain scalar, a mean "
                "over examples, does a bare float stand for such a mean too."
            )
        return _Mean(at_least_float32(x) * num_examples, jnp.float32(num_examples))

    return _map_wrappers(wrap, aux)


def describe_bare(call: Callable[[PyTree], PyTree], micro_batch: PyTree, aux: PyTree) -> list[AuxLeaf]:
    """What is known of each leaf of aux that no wrapper holds, from an abstract call with twice the examples.

    Args:
      call: micro-batch -> aux; not called where wrappers hold everything.
      micro_batch: one micro-batch.
      aux: the structs of `call(micro_batch)`.
    """
    bare = _bare_leaves(aux)
    if not bare:
        return []
    twice = jax.eval_shape(
        lambda batch: call(jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)), micro_batch
    )
    return [
        AuxLeaf(path, x.shape, doubled.shape, x.dtype)
        for (path, x), (_, doubled) in zip(bare, _bare_leaves(twice), strict=True)
    ]


def _bare_leaves(aux: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(aux, is_leaf=_is_wrapper)
    return [(jax.tree_util.keystr(path), x) for path, x in leaves if not _is_wrapper(x)]


def _batch_axis(leaf: AuxLeaf) -> int:
    """The one axis that doubles with the batch; `shape` and `doubled_shape` differ somewhere."""
    if len(leaf.shape) == len(leaf.doubled_shape):
        changed = [i for i, (a, b) in enumerate(zip(leaf.shape, leaf.doubled_shape, strict=True)) if a != b]
        if len(changed) == 1 and leaf.doubled_shape[changed[0]] == 2 * leaf.shape[changed[0]]:
            return changed[0]
    raise TypeError(
        f"expected aux{leaf.path} to have one axis that is the batch's, or none; its shape is {leaf.shape} and becomes "
        f"{leaf.doubled_shape} for twice the examples. Reduce it to a scalar, or wrap it in {_CHOICES}."
    )


def _prepare(wrapper: Any) -> Any:
    """A wrapper's arrays in the dtypes that they combine in."""
    if isinstance(wrapper, WeightedMean | Sum):
        return jax.tree.map(at_least_float32, wrapper)
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
    reduced = _map_wrappers(lambda x: None if _is_stacked(x) else x, aux)
    stacked = _map_wrappers(lambda x: x if _is_stacked(x) else None, aux)
    return reduced, stacked


def start(like: PyTree) -> PyTree:
    """The reduced aux before any micro-batch."""
    return _map_wrappers(lambda x: jax.tree.map(_REDUCTIONS[type(x)].start, x), like)


def add(acc: PyTree, x: PyTree) -> PyTree:
    """The reduced aux with one more micro-batch."""
    return _map_wrappers(lambda a, b: jax.tree.map(_REDUCTIONS[type(a)].add, a, b), acc, x)


def across(acc: PyTree, axes: tuple[str, ...], is_last: jax.Array) -> PyTree:
    """The reduced aux of all devices along these mesh axes; `is_last` on the one whose `Last` is kept."""
    return _map_wrappers(
        lambda a: jax.tree.map(lambda x: _REDUCTIONS[type(a)].across(x, axes, is_last), a), acc
    )


def finish(acc: PyTree) -> PyTree:
    """The bare values of the reduced aux."""

    def value(x):
        if isinstance(x, WeightedMean):
            return jax.tree.map(lambda total: ratio(total, x.weight), x.total)
        return x.total / x.weight if isinstance(x, _Mean) else x.value

    return _map_wrappers(value, acc)


def rows(stacks: list[PyTree]) -> PyTree:
    """The stacked aux of one or two scans with its rows in front, in the batch's own order."""

    def gather(*parts):
        if isinstance(parts[0], Stack):
            return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
        axis = parts[0].axis
        return _Concat(join([jnp.moveaxis(part.value, axis + 1, 1) for part in parts]), axis)

    return _map_wrappers(gather, *stacks)


def merge_aux(reduced: PyTree, stacked: PyTree) -> PyTree:
    """The whole aux from finished reductions and from `rows`."""

    def value(rows_or_none, other):
        if isinstance(rows_or_none, _Concat):
            return jnp.moveaxis(rows_or_none.value, 0, rows_or_none.axis)
        return rows_or_none.value if isinstance(rows_or_none, Stack) else other

    return jax.tree.map(value, stacked, reduced, is_leaf=lambda x: x is None or _is_wrapper(x))


# The loss ------------------------------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """A micro-batch's loss as totals over weights, one pair for each distinct denominator."""

    totals: dict[str, jax.Array]  # each shape=(), float32 or float64
    weights: dict[str, jax.Array]  # each shape=(), float32 or float64


EXAMPLES = "examples"  # the name of the denominator that plain scalars share


def loss_terms(loss: Any, mean_weight: float) -> Terms:
    """A loss as totals over weights; terms that share a weight share a total, so that one pass does for them.

    Args:
      loss: a scalar, a WeightedMean, or a dict of those.
      mean_weight: what a plain scalar, a mean over the micro-batch's examples, weighs.
    """
    terms = Terms({}, {})
    names: dict[
        Any, str
    ] = {}  # of the weights seen so far: one that came as the same array is the same weight
    for path, term in _terms_by_path(loss).items():
        if isinstance(term, WeightedMean):
            total, weight = _real_scalar(term.total, f"{path}.total"), term.weight
            identity = ("number", weight) if isinstance(weight, int | float) else ("array", id(weight))
            name = names.setdefault(identity, f"weight{len(names)}")
            weight = lax.stop_gradient(_real_scalar(weight, f"{path}.weight", integers=True))
        else:
            total, weight, name = _real_scalar(term, path), jnp.float32(mean_weight), EXAMPLES
            total = total if mean_weight == 1 else total * mean_weight
        terms.totals[name] = terms.totals[name] + total if name in terms.totals else total
        terms.weights[name] = weight
    return terms


def loss_value(loss: Any) -> jax.Array:
    """The scalar that a loss stands for."""
    terms = loss_terms(loss, 1.0)
    return total_ratio(terms)


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


def _real_scalar(x: Any, name: str, integers: bool = False) -> jax.Array:
    kinds = (jnp.floating, jnp.integer) if integers else (jnp.floating,)
    try:
        dtype, shape = jnp.result_type(x), jnp.shape(x)
    except (TypeError, ValueError) as e:
        raise TypeError(
            f"expected {name} to be a scalar, an optaccum.WeightedMean, or a dict of those; got {type(x).__name__}. "
            "With auxiliary outputs, pass has_aux=True."
        ) from e
    if shape != () or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        raise TypeError(
            f"expected {name} to be a real floating scalar; got shape {shape} and dtype {dtype}. Take the mean over the "
            "examples, or return optaccum.WeightedMean(total, weight)."
        )
    return jnp.asarray(x).astype(jnp.promote_types(dtype, jnp.float32))
