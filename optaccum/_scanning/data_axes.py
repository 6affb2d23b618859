"""One cross-device reduction per window: the micro-batch loop under `jax.shard_map` over the data axes."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optaccum._dtypes import at_least_float32
from optaccum._scanning.call import Roles, split_call
from optaccum._scanning.split import batch_size_of, num_and_size_of
from optaccum._varying import names_of, sharding_of

PyTree = Any


def find_mesh(args: PyTree, axes: tuple[str, ...]) -> Any:
    """The mesh that has all these axes: that of the arguments, else the one that `jax.set_mesh` set.

    Raises:
      ValueError: where there is none, it lacks an axis, or an axis is manual already.
    """
    meshes = []
    for x in jax.tree.leaves(args):
        if isinstance(x, jax.Array):
            meshes.append(sharding_of(x).mesh)
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
    axes = (data_axes,) if isinstance(data_axes, str) or not isinstance(data_axes, Iterable) else tuple(data_axes)
    axes = () if data_axes is None else axes
    if not all(isinstance(axis, str) for axis in axes):
        raise TypeError(f"expected data_axes to name one mesh axis or several; got {data_axes!r}.")
    if len(set(axes)) < len(axes):
        raise ValueError(f"expected data_axes to name each mesh axis once; got {axes}.")
    return axes


def check_rows(batch_size: int, mesh: Any, axes: tuple[str, ...]) -> None:
    """Raises where rows do not divide over the devices."""
    num_devices = math.prod(mesh.shape[axis] for axis in axes)
    if batch_size % num_devices:
        raise ValueError(
            f"expected the batch to divide over the {num_devices} devices along data_axes={axes}; got "
            f"{batch_size} rows. Pad the batch with rows of weight 0, or leave data_axes out."
        )


def compile_call(
    fn: Callable[..., Any], roles: Roles, axes: tuple[str, ...], presplit: bool = False, place: Any = None
) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """`fn(layout, mesh, call)` as a function of args and kwargs, compiled once for each layout, mesh and shapes.

    In place of the mesh comes what `place(mesh, layout, call)` returns, if it is given.
    """
    compiled = jax.jit(fn, static_argnums=(0, 1))

    def call_fn(args, kwargs):
        call, layout = split_call(roles, args, kwargs)
        mesh = find_mesh(call, axes) if axes else None
        if mesh is not None:
            num_rows = num_and_size_of(call.batch)[1] if presplit else batch_size_of(call.batch)
            check_rows(num_rows, mesh, axes)
            mesh = mesh if place is None else place(mesh, layout, call)
        return compiled(layout, mesh, call)

    return call_fn


def over_devices(
    fn: Callable[..., Any],
    mesh: Any,
    axes: tuple[str, ...],
    batch_axis: int,
    in_specs: PyTree = PartitionSpec(),  # noqa: B008
    out_specs: PyTree = PartitionSpec(),  # noqa: B008
) -> Callable[..., Any]:
    """`fn(batch, others) -> (results, rows)`, each device with its own rows of the batch.

    The others come, and results leave, as their specs say (prefixes, of these axes alone): whole, unless told
    otherwise, and results equal on all devices. `rows` lead with rows, which come back in device order. `batch_axis`:
    the axis of the batch's leaves that is divided.
    """
    by_rows = PartitionSpec(*(None,) * batch_axis, axes)

    def mapped(batch, others):
        specs = by_rows, in_specs
        # `check_vma` would type each array by whether it differs between devices. Then a gradient with
        # respect to a parameter, the same everywhere, crosses devices where it arises, in the loop; a loss
        # written for one device may fail to type (a loop that starts from zeros). Without it each device
        # differentiates its own copy, and collectives in the loss transpose for the sum of all losses.
        return jax.shard_map(
            fn,
            mesh=mesh,
            in_specs=specs,
            out_specs=(out_specs, PartitionSpec(axes)),
            axis_names=set(axes),
            check_vma=False,
        )(*place_args((batch, others), specs, mesh, axes))

    return mapped


def place_args(args: PyTree, specs: PyTree, mesh: Any, axes: tuple[str, ...]) -> PyTree:
    """Arrays whose types carry their sharding, with these axes where the specs (a prefix) say; others as they are."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = {axis for axis in axes if kinds[axis] == AxisType.Explicit}
    if not explicit:
        return args

    def place(spec, x):
        old = [*jax.typeof(x).sharding.spec, *(None,) * x.ndim][: x.ndim]
        new = [*spec, *(None,) * x.ndim][: x.ndim]
        entries = [
            tuple(name for name in names_of(entry) if name in explicit)
            + tuple(name for name in names_of(before) if name not in axes)
            for entry, before in zip(new, old, strict=True)
        ]
        entries = PartitionSpec(*(entry or None for entry in entries))
        return jax.sharding.reshard(x, NamedSharding(mesh, entries))

    def is_spec(x):
        return isinstance(x, PartitionSpec)

    return jax.tree.map(lambda spec, tree: jax.tree.map(lambda x: place(spec, x), tree), specs, args, is_leaf=is_spec)


def of_several(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of these axes along which there are several devices."""
    # XLA fails on an all-reduce over one device of what another axis divides (JAX 0.10 and 0.12): "Cross-partition
    # allreduce must be in (partial) manual partitioning mode".
    return tuple(axis for axis in axes if lax.axis_size(axis) > 1)


def psum(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """`lax.psum`, whatever the dtypes."""
    return in_float32(lambda tree: lax.psum(tree, axes), tree)


def in_float32(reduce: Callable[[PyTree], PyTree], tree: PyTree) -> PyTree:
    """`reduce(tree)` over devices, in float32 for 16-bit floats on CPU.

    There XLA (JAX 0.10 and 0.12) aborts on a 16-bit all-reduce over some axes of a mesh, the others being left to
    the compiler: "Invalid binary instruction opcode copy". It would convert them to float32 itself.
    """

    def widen(x):
        return x.astype(at_least_float32(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def on_cpu(tree):
        totals = reduce(jax.tree.map(widen, tree))
        return jax.tree.map(lambda total, x: total.astype(x.dtype), totals, tree)

    if all(widen(x).dtype == x.dtype for x in jax.tree.leaves(tree)):
        return reduce(tree)
    return lax.platform_dependent(tree, cpu=on_cpu, default=reduce)


def pmax(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`lax.pmax` that keeps NaN, where an all-reduce's maximum of it and a number may be the number (on CPUs)."""
    if x.dtype == jnp.bool_:
        return lax.pmax(x.astype(jnp.int32), axes).astype(x.dtype)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return lax.pmax(x, axes)
    wide = x.astype(at_least_float32(x.dtype))  # as in `psum`
    has_nan = lax.pmax(jnp.isnan(wide).astype(jnp.int32), axes)
    return jnp.where(has_nan != 0, jnp.nan, lax.pmax(wide, axes)).astype(x.dtype)


def carry_across(carry: PyTree, axes: tuple[str, ...], skips: bool) -> PyTree:
    """One carry from all devices': floating leaves averaged, others as they are, for they are alike.

    Where a device may have dropped what another kept (`skips`), the largest count stands.
    """

    def across(x):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return lax.pmean(x.astype(at_least_float32(x.dtype)), axes).astype(x.dtype)
        return pmax(x, axes) if skips and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(across, carry)
