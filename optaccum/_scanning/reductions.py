"""What leaves a micro-batch beside its gradient, and how it combines into what the whole batch would give.

Sums are added up in the loop. All else is stacked, and looked at when the loop is over.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaccum._dtypes import as_summand
from optaccum._loss import WeightedMean, ratio
from optaccum._scanning.split import join

PyTree = Any


def _pytree(cls: type) -> type:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
class Sum:
    """Auxiliary output that is summed over the micro-batches (bools are counted, 16-bit floats summed in float32)."""

    value: Any


@_pytree
class Max:
    """Auxiliary output of which the elementwise maximum over the micro-batches is kept.

    Every micro-batch's value is held until the loop is over. The maximum of none is -inf, or the least integer.
    """

    value: Any


@_pytree
class Min:
    """Auxiliary output of which the elementwise minimum over the micro-batches is kept; held as by :class:`Max`."""

    value: Any


@_pytree
class Last:
    """Auxiliary output of which the last micro-batch's value is kept (across devices, the last device's).

    Held as by :class:`Max`: something large is better off as a carry.
    """

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
class Rows:
    """A leaf whose axis `axis` is the batch's, concatenated; or of micro-batches that stay apart, stacked."""

    value: Any
    axis: int = dataclasses.field(metadata={"static": True})
    apart: bool = dataclasses.field(metadata={"static": True})


_SUMMED = (WeightedMean, Mean, Sum)
_STACKED = (Max, Min, Last, Stack, Rows)
CHOICES = "optaccum.WeightedMean, Sum, Max, Min, Last or Stack"


def is_wrapper(x: Any) -> bool:
    return isinstance(x, _SUMMED + _STACKED)


def map_wrappers(fn: Callable[..., Any], aux: PyTree, *rest: PyTree) -> PyTree:
    return jax.tree.map(fn, aux, *rest, is_leaf=is_wrapper)


def bare_leaves(aux: PyTree) -> list[tuple[str, Any]]:
    """The leaves that no wrapper holds, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(aux, is_leaf=is_wrapper)
    return [(jax.tree_util.keystr(path), x) for path, x in leaves if not is_wrapper(x)]


def doubled_shapes(call: Callable[[PyTree], PyTree], micro_batch: PyTree, aux: PyTree) -> list[tuple[int, ...]]:
    """The shapes that the bare leaves of aux have for twice the examples: which axis is the batch's?

    Args:
      call: micro-batch -> aux; not called where no bare leaf has an axis.
      micro_batch: one micro-batch.
      aux: the structs of `call(micro_batch)`.
    """
    bare = bare_leaves(aux)
    if not any(jnp.ndim(x) for _, x in bare):
        return [()] * len(bare)
    try:
        twice = bare_leaves(
            jax.eval_shape(lambda batch: call(jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)), micro_batch)
        )
    except Exception as error:
        size = jax.tree.leaves(micro_batch)[0].shape[0]
        error.add_note(
            f"optaccum traced the loss with {2 * size} examples instead of {size}, to see which axis of aux{bare[0][0]}"
            f" is the batch's. Wrap the bare leaves of aux in {CHOICES}, and it need not."
        )
        raise
    if [path for path, _ in bare] != [path for path, _ in twice]:
        raise TypeError(f"expected the same aux whatever the batch's size; aux{bare[0][0]} came and went.")
    return [jnp.shape(x) for _, x in twice]


def wrap(aux: PyTree, num_examples: int, doubled: list[tuple[int, ...]] | None, mean_allowed: bool) -> PyTree:
    """Every leaf of one micro-batch's aux in a wrapper, bare ones in what they stand for.

    Args:
      aux: the user's auxiliary output for one micro-batch of `num_examples`.
      num_examples: of the micro-batch.
      doubled: the bare leaves' shapes for twice the examples; None where micro-batches stay apart.
      mean_allowed: whether a bare float leaf may stand for a mean over examples.

    Raises:
      TypeError: for a leaf that stands for nothing in particular; it names the leaf and the wrappers.
    """
    shapes = iter(doubled or ())

    def wrap_leaf(path, x):
        if is_wrapper(x):
            return _prepare(x)
        name, shape, dtype = "aux" + jax.tree_util.keystr(path), jnp.shape(x), jnp.result_type(x)
        if doubled is None and shape:
            return Rows(x, 0, apart=True)
        if doubled is not None and (shape_of_twice := next(shapes)) != shape:
            return Rows(x, _batch_axis(name, num_examples, shape, shape_of_twice), apart=False)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"expected {name}, of dtype {dtype}, to be wrapped in {CHOICES}.")
        if not mean_allowed:
            raise TypeError(
                f"expected {name} to be wrapped in {CHOICES}: only under a loss that is a plain scalar, a mean "
                "over examples, does a bare float stand for such a mean too."
            )
        return Mean(as_summand(x) * num_examples, jnp.float32(num_examples))

    return jax.tree_util.tree_map_with_path(wrap_leaf, aux, is_leaf=is_wrapper)


def _batch_axis(name: str, num_examples: int, shape: tuple[int, ...], doubled: tuple[int, ...]) -> int:
    """The one axis that is as long as the batch; the two shapes differ somewhere."""
    if len(shape) == len(doubled):
        changed = [axis for axis, sizes in enumerate(zip(shape, doubled, strict=True)) if sizes[0] != sizes[1]]
        if len(changed) == 1 and (shape[changed[0]], doubled[changed[0]]) == (num_examples, 2 * num_examples):
            return changed[0]
    raise TypeError(
        f"expected {name} to have one axis that is the batch's, or none; its shape is {shape} for {num_examples} "
        f"examples and becomes {doubled} for twice as many. Reduce it to a scalar, or wrap it in {CHOICES}."
    )


def _prepare(wrapper: Any) -> Any:
    """A wrapper's arrays in the dtypes that they combine in."""
    kind = type(wrapper).__name__
    for x in jax.tree.leaves(vars(wrapper), is_leaf=is_wrapper):
        if is_wrapper(x):
            raise TypeError(f"expected arrays in {kind}; got {type(x).__name__} in it. One wrapper a leaf.")
        if isinstance(wrapper, Max | Min) and jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
            raise TypeError(f"expected a real array in {kind}; got one of dtype {jnp.result_type(x)}.")
    return jax.tree.map(as_summand if isinstance(wrapper, _SUMMED) else jnp.asarray, wrapper)


def check_one_shape(auxes: Sequence[PyTree]) -> None:
    """Raises where what a wrapper holds is of another shape in micro-batches of another size: rows, perhaps."""
    first, *others = [jax.tree_util.tree_leaves_with_path(aux, is_leaf=is_wrapper) for aux in auxes]
    for other in others:
        for (path, x), (_, y) in zip(first, other, strict=False):  # where they differ the loop says so
            shapes = [jax.tree.map(jnp.shape, wrapper) for wrapper in (x, y)]
            if is_wrapper(x) and not isinstance(x, Rows) and shapes[0] != shapes[1]:
                raise TypeError(
                    f"expected what {type(x).__name__} holds in aux{jax.tree_util.keystr(path)} to have one shape for "
                    f"micro-batches of all sizes; got {shapes[0]} and {shapes[1]}. Leave rows of the batch bare, "
                    "to be concatenated, or reduce over them first."
                )


def divide_aux(aux: PyTree) -> tuple[PyTree, PyTree]:
    """Splits wrapped aux into what is summed in the loop's carry and what is stacked; None in the other's place."""
    summed = map_wrappers(lambda x: x if isinstance(x, _SUMMED) else None, aux)
    stacked = map_wrappers(lambda x: x if isinstance(x, _STACKED) else None, aux)
    return summed, stacked


def finish(
    summed: PyTree, stacks: Sequence[PyTree], kept: jax.Array | None, axes: tuple[str, ...]
) -> tuple[PyTree, PyTree]:
    """The values of the wrapped aux, and what leads with the batch's rows; None in the other's place.

    Args:
      summed: over all micro-batches and devices.
      stacks: of the one or two loops of this device, leaves of shape (count, ...).
      kept: whether each micro-batch of this device counts, shape (num_microbatches,), bool; None: all do.
      axes: the mesh axes over which devices differ.
    """

    def value(x, *parts):
        if isinstance(x, WeightedMean):
            return jax.tree.map(lambda total: ratio(total, x.weight), x.total)
        if isinstance(x, Mean):
            return ratio(x.total, x.weight, may_be_zero=False)
        if isinstance(x, Sum):
            return x.value
        if not isinstance(parts[0], Max | Min | Last):
            return None
        xs = jax.tree.map(lambda *xs: jnp.concatenate(xs), *(part.value for part in parts))
        return jax.tree.map(lambda x: _over_devices(type(parts[0]), x, kept, axes), xs)

    def rows(*parts):
        if isinstance(parts[0], Stack):
            return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
        if not isinstance(parts[0], Rows):
            return None
        axis, apart = parts[0].axis, parts[0].apart
        if apart:  # the devices' parts are to be joined along the second axis
            return Rows(parts[0].value.swapaxes(0, 1), axis, apart)
        return Rows(join([jnp.moveaxis(part.value, axis + 1, 1) for part in parts]), axis, apart)

    return _map_places(value, summed, *stacks), map_wrappers(rows, *stacks)


def _over_devices(kind: type, x: jax.Array, kept: jax.Array | None, axes: tuple[str, ...]) -> jax.Array:
    own = _reduce(kind, x, kept)
    if not axes:
        return own
    return _reduce(kind, gather(own, axes), None if kept is None else lax.all_gather(kept.any(), axes))


def _reduce(kind: type, x: jax.Array, kept: jax.Array | None) -> jax.Array:
    """The largest, the least or the last of x, shape (m, ...), among those kept, shape (m,)."""
    if kept is None:
        return x[-1] if kind is Last else (jnp.max if kind is Max else jnp.min)(x, axis=0)
    if kind is Last:
        last = jnp.max(jnp.where(kept, jnp.arange(len(x)), 0))
        return jnp.where(kept.any(), lax.dynamic_index_in_dim(x, last, keepdims=False), jnp.zeros_like(x[0]))
    kept = kept.reshape(-1, *(1,) * (x.ndim - 1))
    return _reduce(kind, jnp.where(kept, x, lowest(x) if kind is Max else _highest(x)), None)


def gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Every device's array, along a new leading axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(gather(jax.random.key_data(x), axes), impl=jax.random.key_impl(x))
    return lax.all_gather(x[None], axes, tiled=True)  # else JAX moves no sharding of an Explicit axis to the right


def lowest(x: jax.Array) -> jax.Array:
    """What `jnp.maximum` with anything leaves that thing."""
    if x.dtype == jnp.bool_:
        return jnp.zeros_like(x)
    return jnp.full_like(x, -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min)


def _highest(x: jax.Array) -> jax.Array:
    return ~lowest(x) if not jnp.issubdtype(x.dtype, jnp.floating) else -lowest(x)


def merge_aux(aux: PyTree, rows: PyTree) -> PyTree:
    """The whole aux from what `finish` returned."""

    def value(x, other):
        if isinstance(x, Rows):
            return x.value.swapaxes(0, 1) if x.apart else jnp.moveaxis(x.value, 0, x.axis)
        return x.value if isinstance(x, Stack) else other

    return _map_places(value, rows, aux)


def _map_places(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps over the wrappers of a tree and the places where it holds None."""
    return jax.tree.map(fn, tree, *rest, is_leaf=lambda x: x is None or is_wrapper(x))
