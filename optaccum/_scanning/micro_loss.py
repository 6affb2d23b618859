"""The loss on one micro-batch: called as the user wrote it, traced once for each size of micro-batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaccum._loss import EXAMPLES, Terms, loss_terms
from optaccum._scanning import reductions
from optaccum._scanning.call import Call, Layout, fold_in, join_call
from optaccum._scanning.options import Options
from optaccum._scanning.split import Group, batch_size_of
from optaccum._trace import Traced, trace

PyTree = Any


class MicroLoss(NamedTuple):
    """The loss on the micro-batches of one group, traced."""

    traced: Traced  # (diff, micro-batch, key, limit, index, carry) -> (terms, carry, aux)
    wrap: Callable[..., tuple[Terms, PyTree, PyTree]]  # of these three, the same with each leaf of aux in a wrapper
    structs: tuple[Terms, PyTree, PyTree]  # of what `wrap` returns


def trace_loss(
    loss_fn: Callable[..., Any],
    options: Options,
    layout: Layout,
    groups: list[Group],
    with_diff: Callable[[list[jax.Array]], Call],
    diff: list[jax.Array],
) -> tuple[Callable[..., Any], list[MicroLoss], list[list[Any]]]:
    """The loss on a micro-batch: as a function, traced for each group's micro-batches, and what it closes over.

    The closure comes apart: it may be traced, and a MicroLoss outlives the trace. Where aux has bare arrays the loss is
    traced for twice as many examples too.

    Args:
      loss_fn: the user's.
      options: of `value_and_grad`.
      layout: of the call.
      groups: the micro-batches.
      with_diff: the call, given what is differentiated, but for its batch.
      diff: what is differentiated, flat.
    """
    num_rows = max(group.size for group in groups)

    def call_loss(diff, micro_batch, key, limit, index, carry):
        """(terms, new carry, aux) of a micro-batch; a plain scalar weighs 1 for the largest."""
        key = fold_in(key, index)
        if options.data_axes:
            key = fold_in(key, lax.axis_index(options.data_axes))
        carry = jax.tree.map(stop_gradient, carry)
        call = with_diff(diff)._replace(batch=micro_batch, key=key, carry=carry, limit=limit)
        args, kwargs = join_call(layout, call)
        loss, carry, aux = unpack(loss_fn(*args, **kwargs), options)
        return loss_terms(loss, batch_size_of(micro_batch) / num_rows), carry, aux

    call = with_diff(diff)
    key, carry = call.key, call.carry
    rest = (key, call.limit, jnp.int32(0), carry)
    micro_batches = [group.take(0) for group in groups]
    pairs = [trace(call_loss, diff, micro_batch, *rest) for micro_batch in micro_batches]
    reductions.check_one_shape([traced.structs[2] for traced, _ in pairs])

    def micro_loss(size, micro_batch, traced):
        terms, new_carry, aux = traced.structs
        _check_carry(carry, new_carry)
        if options.data_axes:
            _check_alike(traced, terms, new_carry, diff, (micro_batch, key))
        doubled = None
        if not options.presplit:
            doubled = reductions.doubled_shapes(lambda x: call_loss(diff, x, *rest)[2], micro_batch, aux)

        def wrap(terms, carry, aux):
            return terms, carry, reductions.wrap(aux, size, doubled, mean_allowed=EXAMPLES in terms)

        return MicroLoss(traced, wrap, jax.eval_shape(wrap, *traced.structs))

    traced, consts = zip(*pairs, strict=True)
    sizes = [group.size for group in groups]
    losses = [micro_loss(*each) for each in zip(sizes, micro_batches, traced, strict=True)]
    return call_loss, losses, list(consts)


def as_it_came(losses: list[MicroLoss], before: PyTree, after: PyTree) -> PyTree:
    """The new carry, with what the loss hands on untouched as it was before: frozen parameters cross no devices."""
    old, (new, structure) = jax.tree.leaves(before), jax.tree.flatten(after)
    first = len(jax.tree.leaves(losses[0].traced.structs[0]))  # behind the terms; among the arguments, last

    def is_untouched(i):
        return all(loss.traced.passes(first + i, i - len(old)) for loss in losses)

    return structure.unflatten([stop_gradient(old[i]) if is_untouched(i) else x for i, x in enumerate(new)])


def unpack(out: Any, options: Options) -> tuple[Any, PyTree, PyTree]:
    """(loss, carry, aux) of what the loss function returned."""

    def pair(x, expected):
        if not isinstance(x, tuple | list) or len(x) != 2:
            raise TypeError(f"expected the loss function to return {expected}; got {type(x).__name__}.")
        return x

    loss, aux = pair(out, "(loss, aux), as has_aux=True says") if options.has_aux else (out, ())
    if options.roles.carry is None:
        return loss, (), aux
    return loss, *pair(aux, "(loss, (new_carry, rest)), as carry_argnum says")


def _check_carry(before: PyTree, after: PyTree) -> None:
    """Raises unless a micro-batch's carry comes back as it went in."""
    expected, came = jax.tree.structure(before), jax.tree.structure(after)
    if expected != came:
        raise TypeError(
            f"expected the carry that the loss function returns to have the structure that it came with, {expected}; "
            f"got {came}. Return (new_carry, rest) as aux."
        )
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise TypeError(
                f"expected the carry to keep its shapes and dtypes; carry{jax.tree_util.keystr(path)} came with "
                f"{old.dtype}{list(old.shape)} and returns as {new.dtype}{list(new.shape)}. Cast it back."
            )


def _check_alike(traced: Traced, terms: Terms, carry: PyTree, diff: PyTree, own: PyTree) -> None:
    """Raises for a carry's integer, bool or key that devices do not compute alike: from their own rows or keys."""
    first, start = len(jax.tree.leaves(terms)), len(jax.tree.leaves(diff))
    stop = start + len(jax.tree.leaves(own))
    for i, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(carry), first):
        if not jnp.issubdtype(x.dtype, jnp.inexact) and any(traced.depends_on(i)[start:stop]):
            raise TypeError(
                f"expected carry{jax.tree_util.keystr(path)}, of dtype {x.dtype}, to be alike on every device; "
                "it depends on the rows, or on key_argnum. Count what a micro-batch brings with optaccum.Sum in aux."
            )


def stop_gradient(x: Any) -> Any:
    return lax.stop_gradient(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x
