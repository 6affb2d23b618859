"""What the auxiliary outputs that no wrapper holds stand for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaccum._scanning.reductions import CHOICES, Concat, Mean, as_summand, is_wrapper, map_wrappers, prepare

PyTree = Any


class AuxLeaf(NamedTuple):
    """What is known of a bare leaf: its path, and how its shape and dtype depend on the micro-batch's size."""

    path: str
    num_examples: int
    shape: tuple[int, ...]
    doubled_shape: tuple[int, ...]  # its shape for twice the examples
    dtype: Any


def wrap_bare(aux: PyTree, leaves: list[AuxLeaf], mean_allowed: bool) -> PyTree:
    """Wraps each bare leaf of one micro-batch's aux in what it stands for.

    Args:
      aux: the user's auxiliary output for one micro-batch.
      leaves: what is known of each bare leaf, in the tree's order.
      mean_allowed: whether a bare float leaf may stand for a mean over examples.

    Raises:
      TypeError: for a leaf that stands for nothing in particular; it names the leaf and the wrappers.
    """
    known = iter(leaves)

    def wrap(x):
        if is_wrapper(x):
            return prepare(x)
        leaf = next(known)
        if leaf.shape != leaf.doubled_shape:
            return Concat(x, _batch_axis(leaf))
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"expected aux{leaf.path}, of dtype {leaf.dtype}, to be wrapped in {CHOICES}.")
        if not mean_allowed:
            raise TypeError(
                f"expected aux{leaf.path} to be wrapped in {CHOICES}: only under a loss that is a plain scalar, a mean "
                "over examples, does a bare float stand for such a mean too."
            )
        return Mean(as_summand(x) * leaf.num_examples, jnp.float32(leaf.num_examples))

    return map_wrappers(wrap, aux)


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
    size = jax.tree.leaves(micro_batch)[0].shape[0]
    try:
        twice = _bare_leaves(
            jax.eval_shape(
                lambda batch: call(jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)), micro_batch
            )
        )
    except Exception as error:
        error.add_note(
            f"optaccum traced the loss with {2 * size} examples instead of {size}, to see which axis of aux{bare[0][0]}"
            f" is the batch's. Wrap the bare leaves of aux in {CHOICES}, and it need not."
        )
        raise
    if [path for path, _ in bare] != [path for path, _ in twice]:
        raise TypeError(f"expected the same aux whatever the batch's size; aux{bare[0][0]} came and went.")
    return [
        AuxLeaf(path, size, x.shape, doubled.shape, x.dtype)
        for (path, x), (_, doubled) in zip(bare, twice, strict=True)
    ]


def _bare_leaves(aux: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(aux, is_leaf=is_wrapper)
    return [(jax.tree_util.keystr(path), x) for path, x in leaves if not is_wrapper(x)]


def _batch_axis(leaf: AuxLeaf) -> int:
    """The one axis that is as long as the batch; `shape` and `doubled_shape` differ somewhere."""
    if len(leaf.shape) == len(leaf.doubled_shape):
        sizes = list(zip(leaf.shape, leaf.doubled_shape, strict=True))
        changed = [axis for axis, (size, doubled) in enumerate(sizes) if size != doubled]
        if len(changed) == 1 and sizes[changed[0]] == (leaf.num_examples, 2 * leaf.num_examples):
            return changed[0]
    raise TypeError(
        f"expected aux{leaf.path} to have one axis that is the batch's, or none; its shape is {leaf.shape} for "
        f"{leaf.num_examples} examples and becomes {leaf.doubled_shape} for twice as many. Reduce it to a scalar, or "
        f"wrap it in {CHOICES}."
    )
