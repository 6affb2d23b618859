"""The loss on one micro-batch, traced once for each size of micro-batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from optaccum._run_if import hoist
from optaccum._scanning.bare_aux import describe_bare, wrap_bare
from optaccum._scanning.loss import EXAMPLES, LossTerms, add_terms, denominators
from optaccum._scanning.reductions import check_one_shape
from optaccum._scanning.split import take

PyTree = Any
Scalars = dict[str, jax.Array]


class MicroLoss(NamedTuple):
    """The loss on the micro-batches of one group."""

    # (diff, micro-batch, key, index, carry, *consts) -> (totals, (weights, carry, aux)): the loss's terms, the new
    # carry, and the auxiliary outputs, each in a wrapper.
    call: Callable[..., Any]
    structs: PyTree  # of what `call` returns
    # By name: the mesh and `vmap` axes that it communicates over, the types of other effects.
    effects: frozenset[str]
    has_scan: bool  # over layers, perhaps


def trace_loss(
    call_loss: Callable[..., tuple[LossTerms, PyTree, PyTree]],
    groups: Sequence[PyTree],
    diff: list[jax.Array],
    key: PyTree,
    carry: PyTree,
) -> tuple[list[MicroLoss], list[list[Any]]]:
    """Traces the loss for each group's micro-batches, and for twice as many examples where aux has bare leaves.

    What the loss closes over comes apart: it may be traced, and a MicroLoss outlives the trace.

    Args:
      call_loss: (diff, micro-batch, key, index, carry) -> (terms, new carry, aux).
      groups: leaves of shape (num_examples, num_microbatches, ...).
      diff: what is differentiated, flat.
      key: the batch's.
      carry: the first micro-batch's.
    """
    micro_batches = [take(group, 0) for group in groups]
    rest = (key, jnp.int32(0), carry)
    pairs = [_trace(call_loss, diff, micro_batch, *rest) for micro_batch in micro_batches]
    traced, consts = [list(each) for each in zip(*pairs, strict=True)]
    check_one_shape([t.structs[2] for t in traced])
    names = denominators([t.structs[0] for t in traced])

    def micro_loss(micro_batch, traced):
        bare = describe_bare(lambda batch: call_loss(diff, batch, *rest)[2], micro_batch, traced.structs[2])

        def combine(terms, carry, aux):
            sums = add_terms(terms, names)
            return sums.totals, (sums.weights, carry, wrap_bare(aux, bare, set(names) == {EXAMPLES}))

        def call(*args):
            return combine(*traced.call(*args))

        return traced._replace(call=call, structs=jax.eval_shape(combine, *traced.structs))

    return [micro_loss(*each) for each in zip(micro_batches, traced, strict=True)], consts


def _trace(call_loss: Callable[..., Any], *args: PyTree) -> tuple[MicroLoss, list[Any]]:
    """The loss as it is, whose `call` returns (terms, new carry, aux), and what it closes over."""
    # Not `jax.closure_convert`, which leaves closed-over integers in the function.
    closed, structs = jax.make_jaxpr(call_loss, return_shape=True)(*args)
    call_flat = hoist(closed, jax.tree.leaves(args))

    def call(*args_and_consts):
        args, consts = args_and_consts[:num_args], args_and_consts[num_args:]
        flat = call_flat(*consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(structs), flat)

    num_args = len(args)
    effects = frozenset(str(getattr(effect, "name", type(effect).__name__)) for effect in closed.effects)
    return MicroLoss(call, structs, effects, _has_scan(closed.jaxpr)), list(closed.consts)


def _has_scan(jaxpr: jex_core.Jaxpr) -> bool:
    return any(
        eqn.primitive.name == "scan" or any(map(_has_scan, jex_core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )
