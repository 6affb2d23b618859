"""Outputs of the whole batch, one micro-batch at a time, for losses that do not split."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaccum._checks import check_function
from optaccum._scanning import reductions
from optaccum._scanning.call import Call, Layout, fold_in, join_call, make_roles
from optaccum._scanning.data_axes import as_axes, compile_call, of_several, over_devices, psum
from optaccum._scanning.split import Group, batch_size_of, check_split_options, resolve_num_microbatches, split
from optaccum._varying import zeros_of

PyTree = Any


def chunked(
    fn: Callable[..., Any],
    *,
    num_microbatches: int | None = None,
    microbatch_size: int | None = None,
    batch_argnums: int | Sequence[int] = 1,
    key_argnum: int | None = None,
    data_axes: str | Sequence[str] | None = None,
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
      data_axes: mesh axes that the batch is sharded over, as for :func:`value_and_grad`: no collective in the loops,
        and outputs that lead with rows stay sharded. Other arguments are gathered once.

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
    roles, axes = make_roles(..., batch_argnums, key_argnum), as_axes(data_axes)

    def whole_batch(layout: Layout, mesh: Any, call: Call) -> PyTree:
        n = resolve_num_microbatches(batch_size_of(call.batch), num_microbatches, microbatch_size)

        def one_device(batch, others):
            def call_fn(micro_batch, index):
                key = fold_in(others.key, index)
                key = fold_in(key, lax.axis_index(axes)) if axes else key
                args, kwargs = join_call(layout, others._replace(batch=micro_batch, key=key))
                return fn(*args, **kwargs)

            return _map_groups(call_fn, split(batch, n), axes)

        if mesh is not None:
            one_device = over_devices(one_device, mesh, axes, batch_axis=0)
        return reductions.merge_aux(*one_device(call.batch, call._replace(batch=())))

    compiled = compile_call(whole_batch, roles, axes)

    @functools.wraps(fn, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def chunked_fn(*args: Any, **kwargs: Any) -> Any:
        return compiled(args, kwargs)

    return chunked_fn


def _map_groups(
    call_fn: Callable[[PyTree, jax.Array], PyTree], groups: list[Group], axes: tuple[str, ...]
) -> tuple[PyTree, PyTree]:
    """Scans `call_fn(micro_batch, index)` over one or two groups of micro-batches."""

    def call_first(micro_batch: PyTree) -> PyTree:
        return call_fn(micro_batch, jnp.int32(0))

    outputs = [jax.eval_shape(call_first, group.take(0)) for group in groups]
    reductions.check_one_shape(outputs)
    summed, stacks, first = None, [], 0
    for group, output in zip(groups, outputs, strict=True):
        doubled = reductions.doubled_shapes(call_first, group.take(0), output)
        _check_rows(output, doubled)

        # Inside a scan nothing can be merged across the recomputation: no need to prevent it.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def wrapped(i, group=group, doubled=doubled, first=first):
            aux = reductions.wrap(call_fn(group.take(i), first + i), group.size, doubled, mean_allowed=False)
            return reductions.divide_aux(aux)

        def step(total, i, wrapped=wrapped):
            new, rows = wrapped(i)
            return jax.tree.map(jnp.add, total, new), rows

        if summed is None:
            summed = zeros_of(jax.eval_shape(wrapped, jnp.int32(0))[0])
        summed, rows = lax.scan(step, summed, jnp.arange(group.count, dtype=jnp.int32))
        stacks.append(rows)
        first += group.count
    return reductions.finish(psum(summed, of_several(axes)), stacks, None, axes)


def _check_rows(output: PyTree, doubled: list[tuple[int, ...]]) -> None:
    """Raises for an output that says nothing of how it combines."""
    for (path, x), shape in zip(reductions.bare_leaves(output), doubled, strict=True):
        if jnp.shape(x) == shape:
            raise TypeError(
                "expected every output to have one axis that is the batch's, or to be wrapped in "
                f"{reductions.CHOICES}; output{path} has shape {shape} for any number of examples."
            )
