"""Outputs of the whole batch, one micro-batch at a time, for losses that do not split."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaccum._scanning import reductions
from optaccum._scanning.bare_aux import AuxLeaf, describe_bare, wrap_bare
from optaccum._scanning.call import (
    Call,
    Layout,
    Roles,
    as_index,
    as_indices,
    check_function,
    fold_in,
    jit_call,
    join_call,
    split_call,
)
from optaccum._scanning.data_axes import zeros_of
from optaccum._scanning.split import (
    batch_size_of,
    check_split_options,
    resolve_num_microbatches,
    size_and_count,
    split,
    take,
)

PyTree = Any


def chunked(
    fn: Callable[..., Any],
    *,
    num_microbatches: int | None = None,
    microbatch_size: int | None = None,
    batch_argnums: int | Sequence[int] = 1,
    key_argnum: int | None = None,
) -> Callable[..., Any]:
    """`fn` on the whole batch with one micro-batch's activations, in the forward and in the backward pass.

    For losses that need all examples' outputs at once, such as a contrastive loss or statistics of the
    outputs: the outputs are kept, what led to them is computed again in the backward pass (`jax.checkpoint`),
    one micro-batch at a time (`jax.lax.scan`). Differentiating through it, in either mode, is exact.

    Args:
      fn: returns a pytree. A leaf with one axis that is the batch's is concatenated in the batch's own order;
        any other is wrapped in :class:`WeightedMean`, :class:`Sum`, :class:`Max`, :class:`Min`, :class:`Last`
        or :class:`Stack`. `fn` may not mix examples, as BatchNorm in training does.
      num_microbatches: n. Exactly one of this and the next.
      microbatch_size: at most this many examples at once.
      batch_argnums: the positional argument or arguments to split; every leaf leads with the batch axis.
      key_argnum: a PRNG key, or a pytree of them; micro-batch i gets `jax.random.fold_in(key, i)`.

    Returns:
      A function of `fn`'s arguments that returns what `fn` returns on the whole batch.

    Raises:
      ValueError, TypeError: here or at the first call, for arguments and outputs that do not fit.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaccum
      >>> encode = optaccum.chunked(lambda w, x: jnp.tanh(x * w), microbatch_size=2)
      >>> def loss_fn(w, x):  # the variance over the whole batch does not split
      ...     return jnp.var(encode(w, x))
      >>> x = jnp.arange(5.0)
      >>> bool(jnp.allclose(jax.grad(loss_fn)(0.3, x), jax.grad(lambda w: jnp.var(jnp.tanh(x * w)))(0.3)))
      True
    """
    check_function(fn, "fn")
    num_microbatches, microbatch_size = check_split_options(num_microbatches, microbatch_size)
    roles = Roles(
        diff=(),
        batch=as_indices(batch_argnums, "batch_argnums"),
        key=as_index(key_argnum, "key_argnum"),
        carry=None,
    )

    def whole_batch(layout: Layout, n: int, call: Call) -> PyTree:
        def call_fn(micro_batch, index):
            key = jax.tree.map(lambda key: fold_in(key, index), call.key)
            args, kwargs = join_call(layout, call._replace(batch=micro_batch, key=key))
            return fn(*args, **kwargs)

        return _map_groups(call_fn, split(call.batch, n))

    compiled = jit_call(whole_batch)

    @functools.wraps(fn, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def chunked_fn(*args: Any, **kwargs: Any) -> Any:
        call, layout = split_call(roles, args, kwargs)
        n = resolve_num_microbatches(batch_size_of(call.batch), num_microbatches, microbatch_size)
        return compiled(layout, n, call)

    return chunked_fn


def _map_groups(call_fn: Callable[[PyTree, jax.Array], PyTree], groups: list[PyTree]) -> PyTree:
    """Scans `call_fn(micro_batch, index)` over one or two groups of micro-batches."""

    def call_first(micro_batch: PyTree) -> PyTree:
        return call_fn(micro_batch, jnp.int32(0))

    outputs = [jax.eval_shape(call_first, take(group, 0)) for group in groups]
    reductions.check_one_shape(outputs)
    reduced, stacked, first = None, [], 0
    for group, output in zip(groups, outputs, strict=True):
        bare = describe_bare(call_first, take(group, 0), output)
        _check_rows(bare)

        # Inside a scan nothing can be merged across the recomputation: no need to prevent it.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def wrapped(i, group=group, bare=bare, first=first):
            return reductions.divide_aux(wrap_bare(call_fn(take(group, i), first + i), bare, False))

        def step(acc, i, wrapped=wrapped):
            new, rows = wrapped(i)
            return reductions.add(acc, new), rows

        if reduced is None:
            structs, _ = jax.eval_shape(wrapped, jnp.int32(0))
            reduced = reductions.start(zeros_of(structs))
        _, count = size_and_count(group)
        reduced, rows = lax.scan(step, reduced, jnp.arange(count, dtype=jnp.int32))
        stacked.append(rows)
        first += count
    return reductions.merge_aux(reductions.finish(reduced), reductions.rows(stacked))


def _check_rows(bare: list[AuxLeaf]) -> None:
    """Raises for an output that says nothing of how it combines."""
    for leaf in bare:
        if leaf.shape == leaf.doubled_shape:
            raise TypeError(
                "expected every output to have one axis that is the batch's, or to be wrapped in "
                f"{reductions.CHOICES}; output{leaf.path} has shape {leaf.shape} for any number of examples."
            )
