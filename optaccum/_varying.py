"""Where an array is: along which mesh axes of a `jax.shard_map` it differs; zeros that are where another is."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding

PyTree = Any


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def sharding_of(x: jax.Array) -> NamedSharding:
    """A concrete array's own where it names a mesh, else what its type shows."""
    if not isinstance(x, Tracer) and isinstance(x.sharding, NamedSharding):
        return x.sharding
    return jax.typeof(x).sharding


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes along which an array differs from device to device."""
    return jax.typeof(x).manual_axis_type.varying


def vary(tree: PyTree, axes: Sequence[str] | frozenset[str]) -> PyTree:
    """Types arrays inside `shard_map` as differing from device to device along these mesh axes.

    For a loop within someone's own `shard_map`: its sums start from zeros, which differ nowhere, and must be
    typed as what is added to them.
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


def lead(tree: PyTree) -> PyTree:
    """The same arrays, with the axis of a `jax.vmap` first, wherever it was.

    For what a `custom_jvp` or `custom_vjp` returns: where `vmap` comes between the derivative and a `jax.jit` that it
    is called in, JAX (0.10 and 0.12) takes the axes of the function for those of its rule, silently.
    """
    return jax.tree.map(lambda x: jnp.squeeze(x[None], 0), tree)


def jaxpr_and_structs(fn: Callable[..., PyTree], *args: PyTree) -> tuple[Any, PyTree]:
    """A function's closed jaxpr, and the structs of what it returns.

    JAX's own, of `jax.eval_shape` too, do not say how an array lies on a mesh that has Auto axes beside Explicit ones.
    """
    closed, structs = jax.make_jaxpr(fn, return_shape=True)(*args)

    def known(s, aval):
        return s if s.sharding or not any(aval.sharding.spec) else s.update(sharding=aval.sharding)

    return closed, jax.tree.map(known, structs, jax.tree.unflatten(jax.tree.structure(structs), closed.out_avals))


def zeros_of(structs: PyTree, beside: PyTree = ()) -> PyTree:
    """Zeros for what `jax.eval_shape` returned, with its sharding and its varying axes.

    Outside `jax.jit` and `jax.set_mesh` its sharding names no devices: they are those of the arrays `beside` it.
    """
    arrays = [x for x in jax.tree.leaves(beside) if isinstance(x, jax.Array) and not isinstance(x, Tracer)]
    meshes = [sharding_of(x).mesh for x in arrays if any(jax.typeof(x).sharding.spec)]

    def zeros(s):
        if jnp.issubdtype(s.dtype, jax.dtypes.prng_key):
            return jnp.zeros_like(s)
        if meshes and jax.sharding.get_abstract_mesh().empty:
            return jnp.zeros(s.shape, s.dtype, device=NamedSharding(meshes[0], s.sharding.spec))
        return jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding)

    return vary_like(jax.tree.map(zeros, structs), structs)


def zeros_like(x: jax.Array, dtype: Any) -> jax.Array:
    """An empty sum for `x`: sharded as it is, also where only the compiler knows how, in `jax.jit` on Auto axes."""
    zeros = jnp.zeros_like(x, dtype)
    is_known = not isinstance(x, Tracer) or not jnp.issubdtype(x.dtype, jnp.inexact)
    if is_known or jax.typeof(x).memory_space != jax.typeof(zeros).memory_space:
        return zeros
    never = lax.optimization_barrier(jnp.bool_(False))
    return lax.select(never, lax.convert_element_type(x, zeros.dtype), zeros)
