"""A batch into micro-batches and back.

Micro-batch i of n is `batch[i::n]`. For rows that n divides it is column i of the batch reshaped to (rows, n): nothing
is copied, and where the batch is sharded over devices each keeps its own rows, whereas contiguous slices would gather
them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from optaccum._varying import names_of

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Group:
    """Micro-batches of one size, which a loop takes one after the other."""

    rows: PyTree  # leaves of shape (size, count, ...), or (count, size, ...)
    axis: int = dataclasses.field(metadata={"static": True})  # that of the micro-batches, 1 or 0

    @property
    def count(self) -> int:
        """The number of micro-batches."""
        return jax.tree.leaves(self.rows)[0].shape[self.axis]

    @property
    def size(self) -> int:
        """The examples in each."""
        return jax.tree.leaves(self.rows)[0].shape[1 - self.axis]

    def take(self, index: jax.Array | int) -> PyTree:
        """Micro-batch `index`: leaves of shape (size, ...).

        A loop that takes its own column needs no copy of the batch; scanned over, the columns would be two.
        """
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, axis=self.axis, keepdims=False), self.rows)


def resolve_num_microbatches(batch_size: int, num_microbatches: int | None, microbatch_size: int | None) -> int:
    """How many micro-batches: as given, or as few as keep each at `microbatch_size` examples at most.

    Raises:
      ValueError: where that is more than there are examples (on one device, where data_axes splits each device's).
    """
    n = num_microbatches if num_microbatches is not None else -(-batch_size // (microbatch_size or 1))
    if n > batch_size:
        raise ValueError(
            f"expected at most as many micro-batches as examples; got {n} micro-batches for {batch_size} examples on "
            "each device. Lower num_microbatches, or raise microbatch_size."
        )
    return n


def check_split_options(
    num_microbatches: int | None, microbatch_size: int | None, presplit: bool = False
) -> tuple[int | None, int | None]:
    """The two as ints; raises unless exactly one of the three is given, and is an int >= 1."""
    given = {"num_microbatches": num_microbatches, "microbatch_size": microbatch_size}
    given = {name: size for name, size in given.items() if size is not None}
    if len(given) + presplit != 1:
        raise ValueError(
            "expected exactly one of num_microbatches, microbatch_size and presplit=True; "
            f"got num_microbatches={num_microbatches}, microbatch_size={microbatch_size}, presplit={presplit}."
        )
    for name, size in given.items():
        check_positive_int(size, name)
    as_int = {name: int(size) for name, size in given.items()}
    return as_int.get("num_microbatches"), as_int.get("microbatch_size")


def check_positive_int(size: Any, name: str) -> None:
    """Raises for what is no int >= 1."""
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"expected {name} to be an int >= 1; got {size!r} of type {type(size).__name__}.")
    if int(size) < 1:
        raise ValueError(f"expected {name} to be an int >= 1; got {size!r}.")


def batch_size_of(batch: PyTree) -> int:
    """The leading size that all leaves of a batch agree on."""
    return _leading_sizes(batch, 1, "Rows on another axis: move them to the front, or split yourself (presplit=True)")[
        0
    ]


def num_and_size_of(batch: PyTree) -> tuple[int, int]:
    """The micro-batches of the caller and their size, on which all leaves of the batch agree."""
    num, size = _leading_sizes(batch, 2, "With presplit=True leaves have shape (num_microbatches, size, ...)")
    return num, size


def _leading_sizes(batch: PyTree, num_axes: int, advice: str) -> tuple[int, ...]:
    sizes: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = "batch" + jax.tree_util.keystr(path)
        if jnp.ndim(leaf) < num_axes:
            what = "a scalar" if not jnp.ndim(leaf) else f"shape {jnp.shape(leaf)}"
            raise ValueError(
                f"expected every leaf of the batch to lead with the batch axis; got {what} at {name}. Pass what is "
                f"not split as another argument or a keyword argument. {advice}."
            )
        sizes[name] = jnp.shape(leaf)[:num_axes]
    if not sizes:
        raise ValueError("expected a batch with at least one array; got none. Check batch_argnums.")
    if len(set(sizes.values())) > 1:
        raise ValueError(
            "expected every leaf of the batch to have the same leading size; got "
            f"{ {name: size if num_axes > 1 else size[0] for name, size in sizes.items()} }. Pass what is not split "
            f"as another argument or a keyword argument. {advice}."
        )
    size = next(iter(sizes.values()))
    if 0 in size:
        raise ValueError(f"expected at least one example; got a batch of size {' x '.join(map(str, size))}.")
    return size


def split(batch: PyTree, num_microbatches: int) -> list[Group]:
    """Groups a batch's rows into one or two sets of equal micro-batches.

    Args:
      batch: leaves of shape (B, ...), those of one device.
      num_microbatches: n, at most B.

    Returns:
      The micro-batches in order: one group of all n where n divides B; otherwise the first B mod n, of ceil(B / n)
      rows, then the rest, of floor(B / n) rows.
    """
    batch_size = batch_size_of(batch)
    n = resolve_num_microbatches(batch_size, num_microbatches, None)
    rows, extra = divmod(batch_size, n)
    batch = jax.tree.map(lambda x: _unshard_if_uneven(jnp.asarray(x), n), batch)
    if not extra:
        return [Group(jax.tree.map(lambda x: _to_columns(x, n), batch), axis=1)]

    even = jax.tree.map(lambda x: _to_columns(x[: rows * n], n), batch)
    longer = jax.tree.map(lambda e, x: jnp.concatenate([e[:, :extra], x[rows * n :][None]]), even, batch)
    return [Group(longer, axis=1), Group(jax.tree.map(lambda e: e[:, extra:], even), axis=1)]


def join(stacks: Sequence[jax.Array]) -> jax.Array:
    """What the micro-batches of one or two groups gave, (count, size, ...), as rows (B, ...) in the batch's order."""
    if len(stacks) == 1:
        return _stack_to_rows(stacks[0])
    longer, shorter = stacks
    rows = shorter.shape[1]
    even = _stack_to_rows(jnp.concatenate([longer[:, :rows], shorter]))
    return jnp.concatenate([even, longer[:, rows]])


def _explicit_spec(x: jax.Array) -> tuple[Any, list[Any]] | None:
    """The mesh and the full list of partitions of an array whose type carries its sharding."""
    sharding = jax.typeof(x).sharding
    if not any(axis is not None for axis in sharding.spec):
        return None
    return sharding.mesh, [*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))]


def unshard_rows(x: jax.Array) -> jax.Array:
    """Gathers the first axis of an array whose type carries its sharding; others stay as they are."""
    if (explicit := _explicit_spec(x)) is None:
        return x
    mesh, (_, *others) = explicit
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(None, *others)))


def _unshard_if_uneven(x: jax.Array, n: int) -> jax.Array:
    """Gathers the batch axis of an Explicit array whose rows on each device n does not divide."""
    if (explicit := _explicit_spec(x)) is None:
        return x
    mesh, (batch_axes, *_) = explicit
    num_devices = math.prod(mesh.shape[name] for name in names_of(batch_axes))
    return unshard_rows(x) if x.shape[0] % (num_devices * n) else x


def _to_columns(x: jax.Array, n: int) -> jax.Array:
    shape = (x.shape[0] // n, n, *x.shape[1:])
    if (explicit := _explicit_spec(x)) is None:
        return x.reshape(shape)
    mesh, (batch_axes, *others) = explicit
    out_sharding = NamedSharding(mesh, PartitionSpec(batch_axes, None, *others))
    return lax.reshape(x, shape, out_sharding=out_sharding)


def _stack_to_rows(x: jax.Array) -> jax.Array:
    x = x.swapaxes(0, 1)
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    if (explicit := _explicit_spec(x)) is None:
        return x.reshape(shape)
    mesh, (batch_axes, _, *others) = explicit
    out_sharding = NamedSharding(mesh, PartitionSpec(batch_axes, *others))
    return lax.reshape(x, shape, out_sharding=out_sharding)
