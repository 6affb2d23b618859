"""A function as what JAX traces of it, its closure made into arguments."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex_core
from jax.interpreters import partial_eval

from optaccum._tied import Tied, call_tied
from optaccum._varying import jaxpr_and_structs

PyTree = Any


class Traced(NamedTuple):
    """A function that has been traced once. It holds no tracer: what the function closed over comes in again."""

    call: Callable[..., Any]  # (consts, *args) -> what the function returns; leaves may be Tied
    structs: PyTree  # of what it returns
    # By name: the mesh and `vmap` axes that it communicates over, the types of other effects.
    effects: frozenset[str]
    has_scan: bool  # over layers, perhaps
    # Index of an output leaf -> for each leaf of the arguments, whether the output is computed from it.
    depends_on: Callable[[int], list[bool]]
    # (index of an output leaf, of an argument leaf, from the end where negative) -> whether the output is the argument.
    passes: Callable[[int, int], bool]
    # Whether a scan, or a jitted function, is handed one of the inputs of these dtypes, or a slice of one, twice.
    hands_twice: Callable[[set[Any]], bool]


def trace(fn: Callable[..., Any], *args: PyTree) -> tuple[Traced, list[Any]]:
    """The function as traced on these arguments, and what it closes over."""
    # Not `jax.closure_convert`, which leaves closed-over integers in the function.
    closed, structs = jaxpr_and_structs(fn, *args)
    jaxpr, structure, num_consts = hoisted(closed), jax.tree.structure(structs), len(closed.consts)
    call_flat = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(jaxpr, ()))

    def call(consts, *args):
        leaves = [*consts, *jax.tree.leaves(args)]
        is_tied = any(isinstance(x, Tied) for x in leaves)
        return jax.tree.unflatten(structure, call_tied(jaxpr, leaves) if is_tied else call_flat(*leaves))

    def depends_on(output):
        wanted = [i == output for i in range(structure.num_leaves)]
        return partial_eval.dce_jaxpr(jaxpr, wanted)[1][num_consts:]

    def passes(output, argument):
        source = jaxpr.outvars[output]
        return stopped.get(id(source), source) is jaxpr.invars[num_consts:][argument]

    stopped = {id(e.outvars[0]): e.invars[0] for e in jaxpr.eqns if e.primitive.name == "stop_gradient"}
    effects = frozenset(str(getattr(effect, "name", type(effect).__name__)) for effect in jaxpr.effects)
    twice = functools.partial(_hands_twice, jaxpr)
    return Traced(call, structs, effects, _has_scan(jaxpr), depends_on, passes, twice), list(closed.consts)


def hoisted(closed: Any) -> jex_core.Jaxpr:
    """A jaxpr of (*closed-over values, *arguments).

    A `custom_jvp` may not close over tracers, and a jaxpr may keep those it closed over alive (JAX 0.12).
    """
    jaxpr = closed.jaxpr
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    unnamed = jaxpr.debug_info._replace(arg_names=None)  # it names the arguments alone
    return jex_core.Jaxpr((), inputs, jaxpr.outvars, jaxpr.eqns, jaxpr.effects, unnamed)


def _has_scan(jaxpr: jex_core.Jaxpr) -> bool:
    return any(
        eqn.primitive.name == "scan" or any(map(_has_scan, jex_core.jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns
    )


def _hands_twice(jaxpr: jex_core.Jaxpr, dtypes: set[Any]) -> bool:
    def visit(jaxpr, roots):
        """`roots`: of the variables that are an input of the whole, or a slice of it, which."""
        for eqn in jaxpr.eqns:
            handed = [None if isinstance(x, jex_core.Literal) else roots.get(x) for x in eqn.invars]
            found = [root for root in handed if root is not None]
            for inner in jex_core.jaxprs_in_params(eqn.params) if found else ():
                if len(set(found)) < len(found):
                    return True
                # From the end: a branch is not handed its index.
                if visit(inner, dict(zip(reversed(inner.invars), reversed(handed), strict=False))):
                    return True
        return False

    return visit(jaxpr, {x: x for x in jaxpr.invars if getattr(x.aval, "dtype", None) in dtypes})
