"""Parameters sharded over the data axes (FSDP, ZeRO): gathered once per window, gradients reduce-scattered.

A layout tells for each dimension which mesh axes divide it: the data axes, manual in `over_devices`, apart from the
others (tensor parallel), which JAX places. By itself a collective over a data axis would lose these, JAX gathering over
them first; it runs in a `jax.shard_map` over the others, inside the one over the data axes.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optaccum._scanning.data_axes import in_float32
from optaccum._varying import names_of, sharding_of

PyTree = Any
Names = tuple[str, ...]


class Shard(NamedTuple):
    """How an array lies on the devices: the data axes that divide each dimension, and the other mesh axes."""

    data: tuple[Names, ...]
    other: tuple[Names, ...]

    @property
    def axes(self) -> Names:
        """The data axes that it is sharded over."""
        return sum(self.data, ())

    @property
    def spec(self) -> PartitionSpec:
        """The data axes alone, as `jax.shard_map` over them takes it."""
        return _spec(self.data)

    def gather(self, x: jax.Array) -> jax.Array:
        """The whole array from this device's part."""
        shape = [n * _num_devices(names) for n, names in zip(x.shape, self.data, strict=True)]

        def collect(x):
            for dim, names in reversed([*enumerate(self.data)]):
                if names:
                    x = lax.all_gather(x, names, axis=dim, tiled=not self.other[dim])
            # On GPUs a collective has its dimension outermost: laid out anew here, and not when the sums are there too.
            return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

        gathered = self._over_others(collect, _spec(self.other), self._apart_spec())(x)
        return _reshape(gathered, shape, self.other)

    def __call__(self, grad: jax.Array) -> jax.Array:
        """This device's part of the sum over the devices along these data axes."""

        def scatter(grad):
            for dim, names in enumerate(self.data):
                if names:
                    grad = lax.psum_scatter(grad, names, scatter_dimension=dim, tiled=not self.other[dim])
            return grad

        apart = []  # a dimension that other axes divide too comes as (devices along the data axes, part of each)
        for n, names, other in zip(grad.shape, *self, strict=True):
            num_devices = _num_devices(names)
            apart += [num_devices, n // num_devices] if names and other else [n]
        grad = _reshape(self._free(grad), apart, self._apart_spec())
        return in_float32(self._over_others(scatter, self._apart_spec(), _spec(self.other)), grad)

    def part(self, x: jax.Array) -> jax.Array:
        """This device's part of an array that is the same on all of them."""
        x = self._free(x)
        for dim, names in enumerate(self.data):
            if names:
                size = x.shape[dim] // _num_devices(names)
                x = lax.dynamic_slice_in_dim(x, lax.axis_index(names) * size, size, dim)
        return x

    def sliced(self) -> "Shard | None":
        """For a slice along the leading dimension; None where that is divided."""
        return None if self.data[0] else Shard(self.data[1:], self.other[1:])

    def _free(self, x: jax.Array) -> jax.Array:
        """With none of the Explicit axes that it is not told of."""
        shown = jax.typeof(x).sharding.spec
        kept = [own if set(names_of(own)) <= set(other) else None for own, other in zip(shown, self.other, strict=True)]
        return x if kept == [*shown] else jax.sharding.reshard(x, PartitionSpec(*kept))

    def _apart_spec(self) -> PartitionSpec:
        entries = []
        for names, other in zip(*self, strict=True):
            entries += [(), other] if names and other else [other]
        return _spec(entries)

    def _over_others(self, fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        others, mesh = {name for names in self.other for name in names}, jax.sharding.get_abstract_mesh()
        # JAX does not type a scatter beside an Explicit axis, whether that divides the array (0.10) or not (0.12).
        others |= {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
        if not others:
            return fn
        return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, axis_names=others, check_vma=False)


class Placement(NamedTuple):
    """Where a call runs, and how what is differentiated (flat) and its gradients lie there; hashable."""

    mesh: Any
    params: tuple[Shard, ...]
    grads: tuple[Shard, ...]
    specs: tuple[PartitionSpec | None, ...]  # of the gradients; None where only their data axes are known

    def beside(self, whole: list[jax.Array]) -> "Placement":
        """The same with more leaves, which lie whole on every device."""
        shards = tuple(Shard(((),) * jnp.ndim(x), ((),) * jnp.ndim(x)) for x in whole)
        return Placement(self.mesh, self.params + shards, self.grads + shards, self.specs + (None,) * len(shards))

    def of_gradients(self, chosen: list[bool]) -> "Placement":
        """The same with only some of the gradients."""
        grads, specs = (tuple(itertools.compress(xs, chosen)) for xs in (self.grads, self.specs))
        return self._replace(grads=grads, specs=specs)


def check_specs(specs: Any, name: str) -> None:
    """Raises for what is no pytree of PartitionSpecs."""
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=_is_spec):
        if not _is_spec(spec):
            raise TypeError(
                f"expected {name} to be a jax.sharding.PartitionSpec or a pytree of them; got {type(spec).__name__} "
                f"at {name}{jax.tree_util.keystr(path)}. Of a NamedSharding pass its spec."
            )


def check_gather_dtype(gather_dtype: Any) -> None:
    """Raises where it is no floating dtype, or None."""
    if gather_dtype is None:
        return
    try:
        is_floating = jnp.issubdtype(jnp.dtype(gather_dtype), jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise TypeError(f"expected gather_dtype to be a floating dtype or None; got {gather_dtype!r}.")


class Leaf(NamedTuple):
    """An array, and how it and its gradient are said to lie; None where nothing is said."""

    path: tuple[Any, ...]
    value: jax.Array
    spec: PartitionSpec | None
    grad_spec: PartitionSpec | None


def leaves_of(tree: PyTree, param_specs: Any, grad_specs: Any) -> list[Leaf]:
    """The leaves of a tree, with the PartitionSpecs of two prefixes of it."""
    specs = _broadcast(param_specs, tree, "param_specs"), _broadcast(grad_specs, tree, "grad_specs")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [Leaf(*leaf, *own) for leaf, *own in zip(leaves, *specs, strict=True)]


def place(mesh: Any, axes: Names, leaves: list[Leaf]) -> Placement:
    """The layouts as given, else as concrete arrays and the types of Explicit meshes show.

    Raises:
      ValueError: for a spec that does not fit its array, the mesh, or what shows.
    """
    params, grads = [], []
    for path, x, spec, grad_spec in leaves:
        name = f"argument{jax.tree_util.keystr(path)}"
        # JAX gathers integers, and keys, at the border.
        entries = _shown(x, mesh)[0] if jnp.issubdtype(x.dtype, jnp.inexact) else ((),) * x.ndim
        if spec is not None:
            entries = _agreed(_entries(spec, x, mesh, f"param_specs at {name}"), x, mesh, axes, name)
        params.append(entries)
        own = entries if grad_spec is None else _entries(grad_spec, x, mesh, f"grad_specs at {name}")
        if set(sum(own, ())) <= set(axes):  # of the data axes alone: others stay where these divide nothing
            own = tuple(a or tuple(axis for axis in b if axis not in axes) for a, b in zip(own, entries, strict=True))
        grads.append(own)

    others = set(mesh.axis_names) - set(axes)
    whole = any(others & set(sum(entries, ())) for entries in grads)  # where no spec names another axis, none may show
    specs = tuple(_spec(entries) if whole else None for entries in grads)
    return Placement(mesh, _shards(params, axes), _shards(grads, axes), specs)


def _shards(layouts: list[tuple[Names, ...]], axes: Names) -> tuple[Shard, ...]:
    def shard(entries):
        data, other = (
            [tuple(axis for axis in names if (axis in axes) is own) for names in entries] for own in (True, False)
        )
        return Shard(tuple(data), tuple(other))

    return tuple(map(shard, layouts))


def gather(diff: PyTree, placement: Placement, dtypes: list[Any]) -> PyTree:
    """Whole parameters from this device's parts; floating ones cast first, where a dtype is given."""
    leaves, structure = jax.tree.flatten(diff)

    def leaf(x, shard, dtype):
        x = cast(x, dtype)
        return shard.gather(x) if shard.axes else x

    return jax.tree.unflatten(structure, map(leaf, leaves, placement.params, dtypes))


def cast(x: jax.Array, dtype: Any) -> jax.Array:
    """A floating array in this dtype, others as they are; None: all."""
    return x if dtype is None or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)


def settle(grads: list[jax.Array], placement: Placement) -> list[jax.Array]:
    """The gradients as their specs say of other axes too, which JAX places, and of the order of axes in a dimension."""
    kinds = set(placement.mesh.axis_types)
    if len(kinds) > 1:  # neither of the two below takes both kinds of axes
        return grads
    constrain = jax.sharding.reshard if kinds == {AxisType.Explicit} else lax.with_sharding_constraint
    return [
        grad if spec is None else constrain(grad, NamedSharding(placement.mesh, spec))
        for grad, spec in zip(grads, placement.specs, strict=True)
    ]


def _broadcast(specs: Any, tree: PyTree, name: str) -> list[PartitionSpec | None]:
    """One spec for each leaf; None where the prefix has None."""

    def is_leaf(x):
        return x is None or _is_spec(x)

    found = []
    try:
        jax.tree.map(lambda x, own: found.extend([x] * len(jax.tree.leaves(own))), specs, tree, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(
            f"expected {name} to be a prefix of what is differentiated; got another structure. {error}"
        ) from error
    return found


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _entries(spec: PartitionSpec, x: jax.Array, mesh: Any, name: str) -> tuple[Names, ...]:
    """The axes of each dimension; raises where they are none, or do not divide it."""
    entries = tuple(map(names_of, spec))
    if len(entries) > x.ndim:
        raise ValueError(f"expected {name} to have at most {x.ndim} entries; got {spec}.")
    entries += ((),) * (x.ndim - len(entries))
    for dim, names in enumerate(entries):
        for axis in names:
            if axis not in mesh.shape:
                raise ValueError(f"expected {name} to name axes of the mesh, {mesh.axis_names}; got {axis!r}.")
        if x.shape[dim] % math.prod(mesh.shape[axis] for axis in names):
            raise ValueError(
                f"expected {name} to divide the array, {x.dtype}{list(x.shape)}; got {spec}: dimension {dim} does not "
                f"divide over {math.prod(mesh.shape[axis] for axis in names)} devices along {names}. Shard another "
                "dimension, or pad it."
            )
    return entries


def _shown(x: jax.Array, mesh: Any) -> tuple[tuple[Names, ...], Names]:
    """The axes of each dimension, as far as they show, and the axes that would show."""
    sharding = sharding_of(x)
    entries = () if sharding is None else tuple(map(names_of, sharding.spec))
    entries += ((),) * (x.ndim - len(entries))
    if isinstance(x, Tracer):
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        return entries, tuple(axis for axis, kind in kinds if kind == AxisType.Explicit)
    is_placed = isinstance(x.sharding, NamedSharding)
    return entries, tuple(mesh.axis_names) if is_placed else ()


def _agreed(given: tuple[Names, ...], x: jax.Array, mesh: Any, axes: Names, name: str) -> tuple[Names, ...]:
    """A spec as given, with what shows of other axes where it names the data axes alone; raises where they differ."""
    shown, visible = _shown(x, mesh)

    def only(entries, kept):
        return tuple(tuple(axis for axis in names if axis in kept) for names in entries)

    if only(given, visible) == shown:
        return given
    data_alone = only(given, axes) == given
    if data_alone and only(given, visible) == only(shown, axes):
        pairs = zip(given, shown, strict=True)
        return tuple(b if set(a) <= set(b) else a + tuple(axis for axis in b if axis not in axes) for a, b in pairs)
    raise ValueError(
        f"expected param_specs to be how the parameters are sharded, {_spec(shown)} at {name}; got {_spec(given)}. "
        "Leave param_specs out where the arrays show it, or place them so with jax.device_put."
    )


def _reshape(x: jax.Array, shape: list[int], entries: Any) -> jax.Array:
    """With the axes of each dimension afterwards, for those that the type shows (Explicit)."""
    if x.shape == tuple(shape):
        return x
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = [tuple(axis for axis in names_of(names) if kinds[axis] == AxisType.Explicit) for names in entries]
    if any(explicit):
        return lax.reshape(x, shape, out_sharding=_spec(explicit))
    return lax.with_sharding_constraint(x.reshape(shape), _spec(map(names_of, entries)))  # else it would be lost


def _spec(entries: Any) -> PartitionSpec:
    return PartitionSpec(*(names or None for names in entries))


def _num_devices(names: Names) -> int:
    return math.prod(lax.axis_size(name) for name in names)
