"""A parameter tied to a sum of its gradients that has another dtype, or is sharded, where the program uses it.

Where a 16-bit parameter's gradients are summed in float32, a cast between the parameter and a scan over layers keeps
the backward pass from adding to the sum layer by layer: it makes the gradient of all layers first. Tied inside the
scan, each layer's slice of the parameter has its own slice of the sum. So a layer's gradient can be reduced over
devices by itself, too.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core


class Across(Protocol):
    """From a gradient of the whole to a summand of the sum, such as a reduction over devices; hashable."""

    def __call__(self, grad: jax.Array) -> jax.Array:
        """The summand."""
        ...

    def sliced(self) -> "Across | None":
        """The same for a slice along the leading axis; None where that cannot be."""
        ...


@dataclasses.dataclass(frozen=True)
class Tied:
    """What stands for a parameter among a function's arguments; a leaf, not a pytree.

    Attributes:
      value: the parameter, a constant to differentiation.
      total: what to differentiate with respect to instead: any array of the sum's shape and dtype.
      across: from the parameter's gradient to the sum's; None: nothing but a cast.
    """

    value: jax.Array
    total: jax.Array
    across: Across | None


def call_tied(jaxpr: jex_core.Jaxpr, args: Sequence[Any]) -> list[jax.Array]:
    """Evaluates a jaxpr on (*constants, *arguments). Those that are Tied are followed into what they are handed to."""
    env, used = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True)), {}

    def read(var):
        return var.val if isinstance(var, jex_core.Literal) else env[var]

    def use(var):
        if not isinstance(read(var), Tied):
            return read(var)
        if var not in used:  # so that gradients of several uses add up first
            used[var] = _use(read(var))
        return used[var]

    unnamed = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    for eqn in jaxpr.eqns:
        args, follow, outs = [read(var) for var in eqn.invars], _FOLLOW.get(eqn.primitive.name), None
        if follow is not None and any(isinstance(x, Tied) for x in args):
            outs = follow(eqn, args, use)
        if outs is None:
            outs = _call_eqn(eqn, [use(var) for var in eqn.invars], unnamed)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [use(var) for var in jaxpr.outvars]


def _use(tied: Tied) -> jax.Array:
    return _tie(tied.across, tied.value, tied.total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tie(across: Across | None, value: jax.Array, total: jax.Array) -> jax.Array:
    del across, total
    return value


def _tie_forward(across, value, total):
    return value, jnp.zeros([], total.dtype)


def _tie_backward(across, like, grad):
    grad = grad.astype(like.dtype)
    return None, grad if across is None else across(grad)


_tie.defvjp(_tie_forward, _tie_backward)


def _call_eqn(eqn: Any, args: list[jax.Array], debug_info: Any) -> list[jax.Array]:
    arrays = {var: x for var, x in zip(eqn.invars, args, strict=True) if not isinstance(var, jex_core.Literal)}
    jaxpr = jex_core.Jaxpr((), list(arrays), eqn.outvars, [eqn], eqn.effects, debug_info)
    return jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(jaxpr, ()))(*arrays.values())


def _follow_jit(eqn: Any, args: list[Any], use: Callable[[Any], jax.Array]) -> list[jax.Array]:
    del use
    closed = eqn.params["jaxpr"]
    return call_tied(closed.jaxpr, [*closed.consts, *args])


def _follow_checkpoint(eqn: Any, args: list[Any], use: Callable[[Any], jax.Array]) -> list[jax.Array]:
    del use
    arrays, tie = _apart(args)
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(lambda arrays: call_tied(eqn.params["jaxpr"], tie(arrays)), **options)(arrays)


def _follow_scan(eqn: Any, args: list[Any], use: Callable[[Any], jax.Array]) -> list[jax.Array] | None:
    """None where nothing that it scans over is tied, and can be by slices."""
    closed, params = eqn.params["jaxpr"], eqn.params

    # By their shapes: JAX 0.10 and 0.12 hold these numbers in different ways.
    def num_stacked(outer, inner):
        return sum(a.aval.shape != b.aval.shape for a, b in zip(outer, inner, strict=True))

    num_xs = num_stacked(eqn.invars, closed.jaxpr.invars)
    num_carry = len(eqn.outvars) - num_stacked(eqn.outvars, closed.jaxpr.outvars)
    num_consts = len(eqn.invars) - num_xs - num_carry

    def can_slice(i, x):
        is_tied = isinstance(x, Tied) and i >= num_consts + num_carry
        # The second time as any other use: JAX 0.10 would add to two copies of the sum, and keep one.
        return is_tied and all(x is not y for y in args[:i]) and (x.across is None or x.across.sliced() is not None)

    if not any(can_slice(i, x) for i, x in enumerate(args)):
        return None
    args = [x if can_slice(i, x) else use(var) for i, (x, var) in enumerate(zip(args, eqn.invars, strict=True))]
    consts, carry, xs = args[:num_consts], args[num_consts:-num_xs], args[-num_xs:]
    arrays, tie = _apart(xs, sliced=True)

    def body(carry, arrays):
        outs = call_tied(closed.jaxpr, [*closed.consts, *consts, *carry, *tie(arrays)])
        return outs[:num_carry], outs[num_carry:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, carry, arrays, **options)
    return [*carry, *ys]


_FOLLOW = {
    "jit": _follow_jit,
    "pjit": _follow_jit,
    "checkpoint": _follow_checkpoint,
    "remat2": _follow_checkpoint,
    "scan": _follow_scan,
}


def _apart(args: list[Any], *, sliced: bool = False) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    """Arguments as a pytree of arrays, and what ties such arrays again, or their slices."""

    def tie_one(arg, x):
        if not isinstance(arg, Tied):
            return x
        across = arg.across.sliced() if sliced and arg.across is not None else arg.across
        return Tied(x[0], x[1], across)

    def tie(arrays):
        return [tie_one(*pair) for pair in zip(args, arrays, strict=True)]

    return [(x.value, x.total) if isinstance(x, Tied) else x for x in args], tie
