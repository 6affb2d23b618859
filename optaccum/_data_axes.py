"""One cross-device reduction per window: the micro-batch loop under `jax.shard_map` over the data axes alone."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

PyTree = Any


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes along which an array differs from device to device."""
    return jax.typeof(x).manual_axis_type.varying


def vary(tree: PyTree, axes: Sequence[str] | frozenset[str]) -> PyTree:
    """Types arrays inside `shard_map` as differing from device to device along these mesh axes.

    A gradient with respect to an argument that is typed as the same everywhere is summed over the devices where it
    arises, which is in the loop; with respect to a varying one it stays local.
    """

    def cast(x):
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if axes else tree


def vary_like(tree: PyTree, structs: PyTree) -> PyTree:
    """Arrays typed as varying wherever their `jax.ShapeDtypeStruct` is."""

    def cast(x, s):
        manual = getattr(s, "manual_axis_type", None)
        return vary(x, manual.varying) if manual else x

    return jax.tree.map(cast, tree, structs)


def zeros_of(structs: PyTree) -> PyTree:
    """Zeros for what `jax.eval_shape` returned, with its sharding and its varying axes."""

    def zeros(s):
        if jnp.issubdtype(s.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                jnp.zeros(jax.eval_shape(jax.random.key_data, s).shape, jnp.uint32),
                impl=jax.random.key_impl(s),
            )
        return jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding)

    return vary_like(jax.tree.map(zeros, structs), structs)


def find_mesh(args: PyTree, axes: tuple[str, ...]) -> Any:
    """The mesh that has all these axes: that of the arguments, else the one that `jax.set_mesh` set.

    Raises:
      ValueError: where there is none, or it lacks an axis.
    """
    meshes = []
    for x in jax.tree.leaves(args):
        if isinstance(x, jax.Array):
            sharding = jax.typeof(x).sharding
            if isinstance(getattr(x, "sharding", None), NamedSharding) and not isinstance(x, jax.core.Tracer):
                sharding = x.sharding
            meshes.append(sharding.mesh)
    meshes.append(jax.sharding.get_abstract_mesh())
    meshes = [mesh for mesh in meshes if not mesh.empty]
    for mesh in meshes:
        if set(axes) <= set(mesh.axis_names):
            return mesh
    found = ", ".join(str(mesh.axis_names) for mesh in dict.fromkeys(meshes)) or "no mesh"
    raise ValueError(
        f"expected a mesh with the axes data_axes={axes}; found {found}. Place the batch on a mesh with "
        "jax.device_put(batch, jax.NamedSharding(mesh, ...)), or call under jax.set_mesh(mesh)."
    )


def check_layout(replicated: PyTree, batch_size: int, mesh: Any, axes: tuple[str, ...]) -> int:
    """The number of devices along the data axes.

    Raises:
      ValueError: where the rows do not divide over them, or an argument other than the batch is seen to be sharded
        over one of them.
    """
    num_devices = math.prod(mesh.shape[axis] for axis in axes)
    if batch_size % num_devices:
        raise ValueError(
            f"expected the batch to divide over the {num_devices} devices along data_axes={axes}; got {batch_size} "
            "rows. Pad the batch with rows of weight 0, or drop data_axes."
        )
    for path, x in jax.tree_util.tree_leaves_with_path(replicated):
        if not isinstance(x, jax.Array):
            continue
        concrete = not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, NamedSharding)
        spec = x.sharding.spec if concrete else jax.typeof(x).sharding.spec
        if set(axes) & {name for entry in spec for name in _names(entry)}:
            raise ValueError(
                f"expected only the batch to be sharded over data_axes={axes}; got {spec} at "
                f"{jax.tree_util.keystr(path)}. With parameters sharded over a data axis (FSDP), leave data_axes out."
            )
    return num_devices


def over_devices(fn: Callable[..., Any], mesh: Any, axes: tuple[str, ...]) -> Callable[..., Any]:
    """`fn(batch, *replicated) -> (replicated, rows)`, each device with its own rows of the batch.

    Outputs in the first place must be equal on all devices; those in the second lead with rows, which come back in
    device order.
    """
    by_rows = PartitionSpec(axes)

    def mapped(batch, *replicated):
        in_specs = (by_rows, *(PartitionSpec(),) * len(replicated))
        # `check_vma` would type each array by whether it differs between devices. Then a gradient with respect to a
        # parameter, the same everywhere, crosses devices where it arises, in the loop; and a loss function that was
        # written for one device may fail to type (a loop that starts from zeros). Without it each device
        # differentiates its own copy, and collectives in the loss transpose for the sum of all devices' losses.
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


def device_index(axes: tuple[str, ...]) -> jax.Array:
    """This device's index along the data axes, shape=(), int32."""
    return lax.axis_index(axes)


def average_carry(carry: PyTree, axes: tuple[str, ...]) -> PyTree:
    """A carry's mean over the devices.

    Raises:
      TypeError: for a leaf that is not floating, of which there is no mean.
    """

    def average(path, x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(
                f"expected a floating carry{jax.tree_util.keystr(path)} to average over data_axes={axes}; got dtype "
                f"{x.dtype}. Keep it out of the carry, or return it in aux, wrapped in optaccum.Last or optaccum.Sum."
            )
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return lax.pmean(wide, axes).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(average, carry)
