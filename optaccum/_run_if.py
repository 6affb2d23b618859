"""Run a function once or not at all, in place: the one control-flow primitive of streaming."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core

Carry = TypeVar("Carry")


def run_if(predicate: Any, fn: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """`fn(carry)` where `predicate` holds, `carry` itself where it does not.

    Unlike `lax.cond`, whose branches copy what they pass through, it works in place: where the buffers of
    `carry` are donated, none is copied, and where `predicate` is false none is touched. It is a
    `lax.while_loop` of zero or one trip; differentiated, in either mode and to any order, it is the
    `lax.cond`.

    Args:
      predicate: a scalar bool. A concrete one (outside jit) is branched on in Python, without compiling
        anything.
      fn: from the carry to the next carry, of the same structure, shapes and dtypes. It may close over
        anything, tracers of any transformation included.
      carry: a pytree of arrays.

    Returns:
      A pytree like `carry`.
    """
    if not isinstance(predicate, jax.core.Tracer):
        return fn(carry) if predicate else carry
    leaves, treedef = jax.tree.flatten(carry)
    trace = jax.make_jaxpr(lambda *leaves: treedef.flatten_up_to(fn(treedef.unflatten(leaves))))
    closed = trace(*leaves)
    while (varied := _vary_like(leaves, closed.out_avals)) is not leaves:
        leaves, closed = varied, trace(*varied)
    return treedef.unflatten(_run_jaxpr_if(closed.jaxpr, predicate, leaves, closed.consts))


def _run_jaxpr_if(jaxpr: Any, predicate: Any, leaves: list[Any], consts: list[Any]) -> list[Any]:
    """`run_if` of a jaxpr, its closed-over values as arguments: a `custom_jvp` may not close over tracers."""

    def call(leaves, consts):
        return jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(jaxpr, consts))(*leaves)

    @jax.custom_jvp
    def in_place(predicate, leaves, consts):
        def body(state):
            return jnp.zeros_like(predicate), call(state[1], consts)

        return lax.while_loop(lambda state: state[0], body, (predicate, leaves))[1]

    @in_place.defjvp
    def _(primals, tangents):
        def branches(predicate, leaves, consts):
            return lax.cond(predicate, call, lambda leaves, _: leaves, leaves, consts)

        return jax.jvp(branches, primals, tangents)

    return in_place(predicate, leaves, consts)


def _vary_like(leaves: list[Any], avals: Any) -> list[Any]:
    """Inside `jax.shard_map`: `leaves`, varying over the mesh axes that what replaces them varies over."""
    pairs = list(zip(leaves, avals, strict=True))
    missing = [tuple(sorted(_varying_axes(aval) - _varying_axes(jax.typeof(leaf)))) for leaf, aval in pairs]
    if not any(missing):
        return leaves
    return [
        lax.pcast(leaf, axes, to="varying") if axes else leaf
        for leaf, axes in zip(leaves, missing, strict=True)
    ]


def _varying_axes(aval: Any) -> frozenset[str]:
    return getattr(getattr(aval, "manual_axis_type", None), "varying", frozenset())
