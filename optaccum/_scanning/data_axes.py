"""One cross-device reduction per window: the micro-batch loop under `jax.shard_map` over the data axes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optaccum._dtypes import at_least_float32
from optaccum._varying import vary_like

PyTree = Any


def zeros_of(structs: PyTree) -> PyTree:
    """Zeros for what `jax.eval_shape` returned, with its sharding and its varying axes."""

    def zeros(s):
        if jnp.issubdtype(s.dtype, jax.dtypes.prng_key):
            return jnp.zeros_like(s)
        return jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding)

    return vary_like(jax.tree.map(zeros, structs), structs)


def _sharding(x: jax.Array) -> NamedSharding:
    """A concrete array's own where it names a mesh, else what its type shows."""
    if not isinstance(x, Tracer) and isinstance(x.sharding, NamedSharding):
        return x.sharding
    return jax.typeof(x).sharding


def find_mesh(args: PyTree, axes: tuple[str, ...]) -> Any:
    """The mesh that has all these axes: that of the arguments, else the one that `jax.set_mesh` set.

    Raises:
      ValueError: where there is none, it lacks an axis, or an axis is manual already.
    """
    if len(set(axes)) < len(axes):
        raise ValueError(f"expected data_axes to name each mesh axis once; got {axes}.")
    meshes = []
    for x in jax.tree.leaves(args):
        if isinstance(x, jax.Array):
            meshes.append(_sharding(x).mesh)
    meshes.append(jax.sharding.get_abstract_mesh())
    meshes = [mesh for mesh in meshes if not mesh.empty]
    for mesh in meshes:
        if set(axes) <= set(mesh.axis_names):
            return _check_not_manual(mesh, axes)
    found = ", ".join(str(mesh.axis_names) for mesh in dict.fromkeys(meshes)) or "no mesh"
    raise ValueError(
        f"expected a mesh with the axes data_axes={axes}; found {found}. Place the batch on a mesh with "
        "jax.device_put(batch, jax.NamedSharding(mesh, ...)), or call under jax.set_mesh(mesh)."
    )


def _check_not_manual(mesh: Any, axes: tuple[str, ...]) -> Any:
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    manual = tuple(axis for axis in axes if kinds[axis] == AxisType.Manual)
    if manual:
        raise ValueError(
            f"expected a call from outside any jax.shard_map over data_axes={axes}; {manual} are manual axes "
            "here: each device has its own rows already. Leave data_axes out, and average with jax.lax.pmean."
        )
    return mesh


def as_axes(data_axes: Any) -> tuple[str, ...]:
    """One name, several or None as a tuple of mesh axis names."""
    axes = (
        (data_axes,)
        if isinstance(data_axes, str) or not isinstance(data_axes, Iterable)
        else tuple(data_axes)
    )
    axes = () if data_axes is None else axes
    if not all(isinstance(axis, str) for axis in axes):
        raise TypeError(f"expected data_axes to name one mesh axis or several; got {data_axes!r}.")
    return axes


def check_layout(replicated: dict[str, PyTree], batch_size: int, mesh: Any, axes: tuple[str, ...]) -> None:
    """Raises where rows do not divide over the devices, or what is not the batch is seen to be sharded over them."""
    num_devices = math.prod(mesh.shape[axis] for axis in axes)
    if batch_size % num_devices:
        raise ValueError(
            f"expected the batch to divide over the {num_devices} devices along data_axes={axes}; got "
            f"{batch_size} rows. Pad the batch with rows of weight 0, or leave data_axes out."
        )
    for (name, *path), x in jax.tree_util.tree_leaves_with_path(replicated):
        if not isinstance(x, jax.Array):
            continue
        spec = _sharding(x).spec
        if set(axes) & {name for entry in spec for name in _names(entry)}:
            raise ValueError(
                f"expected only the batch to be sharded over data_axes={axes}; got {spec} at "
                f"{name.key}{jax.tree_util.keystr(tuple(path))}. With parameters sharded over a data axis (FSDP), "
                "leave data_axes out."
            )


def over_devices(fn: Callable[..., Any], mesh: Any, axes: tuple[str, ...]) -> Callable[..., Any]:
    """`fn(batch, *replicated) -> (replicated, rows)`, each device with its own rows of the batch.

    Outputs in the first place must be equal on all devices; those in the second lead with rows, which come
    back in device order.
    """
    by_rows = PartitionSpec(axes)

    def mapped(batch, *replicated):
        in_specs = (by_rows, *(PartitionSpec(),) * len(replicated))
        # `check_vma` would type each array by whether it differs between devices. Then a gradient with
        # respect to a parameter, the same everywhere, crosses devices where it arises, in the loop; a loss
        # written for one device may fail to type (a loop that starts from zeros). Without it each device
        # differentiates its own copy, and collectives in the loss transpose for the sum of all losses.
        return jax.shard_map(
            fn,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=(PartitionSpec(), by_rows),
            axis_names=set(axes),
            check_vma=False,
        )(jax.tree.map(lambda x: _shard_rows(x, mesh, axes), batch), *replicated)

    return mapped


def _shard_rows(x: jax.Array, mesh: Any, axes: tuple[str, ...]) -> jax.Array:
    """An array whose type carries its sharding, with its rows over these axes first; others as they are."""
    explicit = {
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    }
    if not explicit & set(axes):
        return x
    spec = [*jax.typeof(x).sharding.spec, *(None,) * x.ndim][: x.ndim]
    rows, *others = [tuple(name for name in _names(entry) if name not in axes) or None for entry in spec]
    rows = (*(axis for axis in axes if axis in explicit), *(rows or ()))
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(rows, *others)))


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def psum(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """`lax.psum`, in float32 for 16-bit floats on CPU.

    There XLA (JAX 0.10 and 0.12) aborts on a 16-bit all-reduce over some axes of a mesh, the others being left to
    the compiler: "Invalid binary instruction opcode copy". It would convert them to float32 itself.
    """

    def widen(x):
        return x.astype(at_least_float32(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def on_cpu(tree):
        return jax.tree.map(
            lambda total, x: total.astype(x.dtype), lax.psum(jax.tree.map(widen, tree), axes), tree
        )

    if all(widen(x).dtype == x.dtype for x in jax.tree.leaves(tree)):
        return lax.psum(tree, axes)
    return lax.platform_dependent(tree, cpu=on_cpu, default=lambda tree: lax.psum(tree, axes))


def is_last_device(axes: tuple[str, ...], counts: jax.Array | None) -> jax.Array:
    """Whether this device is the last along the data axes, of those where `counts` holds; shape=(), bool."""
    index = lax.axis_index(axes)
    last = lax.axis_size(axes) - 1 if counts is None else lax.pmax(jnp.where(counts, index, -1), axes)
    return index == last


def from_device(x: jax.Array, axes: tuple[str, ...], is_source: jax.Array) -> jax.Array:
    """The array of the one device where `is_source` holds, on all."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        key_data = from_device(jax.random.key_data(x), axes, is_source)
        return jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(x))
    as_number = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
    return psum(jnp.where(is_source, as_number, jnp.zeros_like(as_number)), axes).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def extreme(x: jax.Array, axes: tuple[str, ...], reduce: Callable[..., jax.Array]) -> jax.Array:
    """`lax.pmax` or `lax.pmin`, made to take bools, to keep NaN, and to have a derivative (ties share it)."""
    if x.dtype == jnp.bool_:
        return reduce(x.astype(jnp.int32), axes).astype(x.dtype)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return reduce(x, axes)
    # An all-reduce's maximum of NaN and a number may be the number (as on CPUs).
    wide = x.astype(at_least_float32(x.dtype))  # as in `psum`
    has_nan = jnp.isnan(wide).astype(wide.dtype)
    out, nan = reduce(jnp.stack([wide, has_nan if reduce is lax.pmax else -has_nan]), axes)
    return jnp.where(nan != 0, jnp.nan, out).astype(x.dtype)


@extreme.defjvp
def _extreme_jvp(axes, reduce, primals, tangents):
    (x,), (tangent,) = primals, tangents
    out = extreme(x, axes, reduce)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return out, tangent
    is_out = x == out
    return out, psum(jnp.where(is_out, tangent, 0), axes) / psum(is_out.astype(x.dtype), axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replicated:
    """A part of a carry that every device computes alike, such as the counts of random draws."""

    value: Any


def average_carry(carry: PyTree, axes: tuple[str, ...]) -> PyTree:
    """A carry's mean over the devices; what is Replicated stays as it is.

    Raises:
      TypeError: for a leaf that is not floating, of which there is no mean.
    """

    def average(path, x):
        if isinstance(x, Replicated):
            return x
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(
                f"expected a floating carry{jax.tree_util.keystr(path)} to average over data_axes={axes}; "
                f"got dtype {x.dtype}. Return it in aux instead, wrapped in optaccum.Last or optaccum.Sum."
            )
        return lax.pmean(x.astype(at_least_float32(x.dtype)), axes).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(average, carry, is_leaf=lambda x: isinstance(x, Replicated))
