"""Sums into which the backward pass adds by itself: when references can be used, and how they stay unseen."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaccum._trace import Traced
from optaccum._varying import lead

PyTree = Any


def references(
    starts: Sequence[jax.Array | None],
) -> tuple[Callable[..., list[Any]], Callable[[list[Any]], list[jax.Array]]]:
    """References that hold `starts`, where it is not None, and two functions that use them.

    `backward(vjp, cotangents, xs)` adds the gradient with respect to xs to them, and returns None for those leaves; for
    the others, and for those of xs beyond them, it returns the gradient. `totals(leaves)` gives what they hold at last,
    with `leaves` for the others.
    """
    refs = [None if x is None else jax.new_ref(x) for x in starts]

    def backward(vjp, cotangents, xs):
        shared = [*refs, *[None] * (len(xs) - len(refs))]
        # What stays apart needs each gradient by itself: a reference of its own.
        filled = [jax.new_ref(jnp.zeros_like(x)) if r is None else r for r, x in zip(shared, xs, strict=True)]
        vjp.with_refs(filled)(cotangents)
        return [jax.freeze(new) if r is None else None for r, new in zip(shared, filled, strict=True)]

    def totals(leaves):
        return [x if r is None else jax.freeze(r) for r, x in zip(refs, leaves, strict=True)]

    return backward, totals


def why_not_in_place(
    losses: Sequence[Traced], dtypes: Sequence[tuple[Any, Any]], run: Callable[[PyTree], PyTree], operands: PyTree
) -> tuple[str, Exception | None]:
    """Why references cannot be used, and JAX's own error if it is that; empty where they can.

    Args:
      losses: what is differentiated.
      dtypes: of each parameter and of its sum.
      run: the form with references.
      operands: what it is run on.
    """
    for own, total in dtypes:
        if not np.can_cast(own, total):
            return f"a {total} sum is narrower than its {own} parameter", None
    # JAX 0.10 would add to copies of a reference that a scan or a jitted function has twice, and keep one, silently.
    # Where the sum has another dtype the reference goes another way (`call_tied`, or a cast).
    if any(loss.hands_twice({own for own, total in dtypes if own == total}) for loss in losses):
        return "the loss hands one array to a scan, a jitted function or a branch twice", None
    # Effects do not show through `run_as`, and its rule for vmap does not know the axis by name.
    effects = {effect for loss in losses for effect in loss.effects}
    effects -= set(jax.sharding.get_abstract_mesh().axis_names)
    if effects:
        names = ", ".join(sorted(effects))
        return f"the loss has effects, or communicates over an axis of jax.vmap ({names})", None
    try:
        jax.eval_shape(run, operands)
    except Exception as error:  # whatever the running JAX raises where it cannot pass references through
        return "this JAX cannot pass gradient references through the loss", error
    return "", None


def run_as(fast: Callable[[PyTree], PyTree], plain: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """`fast`, which every transformation takes for `plain`.

    For two functions of one pytree of arrays that compute the same, of which `fast` uses references. References do
    not go through all of `jax.vmap` and differentiation: some fail, and reverse mode inside an outer `lax.scan` gives
    wrong gradients without an error (JAX 0.10 and 0.12; of the kind of https://github.com/jax-ml/jax/issues/32411). So
    `jax.vmap` and derivatives of either mode and any order see `plain` alone; nesting follows, in any order and through
    `jax.jit`.

    Args:
      fast: what runs where nothing transforms it; it may close over no tracer.
      plain: what is transformed; it may close over no tracer either.
    """

    # A `custom_jvp` whose function shows the effects of references cannot be lowered ("No state discharge rule",
    # https://github.com/jax-ml/jax/pull/13837).
    # `linear_call`, here linear in nothing, is a call that shows none, and is lowered with its references by itself.
    def opaque(operands):
        leaves, structure = jax.tree.flatten(operands)
        outputs = jax.custom_derivatives.linear_call(
            lambda leaves, _: fast(jax.tree.unflatten(structure, leaves)), _never, leaves, ()
        )
        leaves.clear()  # JAX 0.12 keeps them, for a transposition that never comes, and would leak tracers
        return outputs

    def leading(operands):
        return lead(plain(operands))

    unbatched = jax.custom_batching.custom_vmap(opaque)

    @unbatched.def_vmap
    def _(axis_size, in_batched, operands):
        in_axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
        vmapped = functools.partial(jax.vmap, in_axes=in_axes, axis_size=axis_size)
        batched = _which_are_batched(vmapped, plain, operands)
        out_axes = jax.tree.map(lambda batched: 0 if batched else None, batched)
        return vmapped(leading, out_axes=out_axes)(operands), batched

    function = jax.custom_jvp(unbatched)
    function.defjvp(lambda primals, tangents: jax.jvp(leading, primals, tangents))
    return function


def _which_are_batched(vmapped: Callable[..., Any], plain: Callable[[PyTree], PyTree], operands: PyTree) -> PyTree:
    """Whether each output of `plain` differs along the axis of `vmapped`, as JAX has it for the derivative too.

    It takes the one for the other where a call is batched, then differentiated.
    """
    found = set()

    def look(path, x):
        seen = jax.custom_batching.custom_vmap(lambda x: x)
        seen.def_vmap(lambda _, batched, x: (x, not found.add(path)))  # called for what is batched
        return seen(x)

    structs = jax.eval_shape(vmapped(lambda operands: jax.tree.map_with_path(look, plain(operands))), operands)
    return jax.tree.map_with_path(lambda path, _: path in found, structs)


def _never(*_: Any) -> Any:
    raise AssertionError("the custom_jvp around it leaves nothing to transpose")
