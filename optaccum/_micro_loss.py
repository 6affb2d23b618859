"""The loss on one micro-batch, traced once for each size of micro-batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from optaccum._bare_aux import check_one_shape, describe_bare, wrap_bare
from optaccum._loss import EXAMPLES, LossTerms, add_terms, denominators
from optaccum._split import size_and_count, take

PyTree = Any
Scalars = dict[str, jax.Array]


class MicroLoss(NamedTuple):
    """The loss on the micro-batches of one group."""

    # (diff, micro-batch, key, index, carry, *consts) -> (totals, (weights, carry, aux)): the loss's terms, the new
    # carry, and the auxiliary outputs, each in a wrapper.
    call: Callable[..., tuple[Scalars, tuple[Scalars, PyTree, PyTree]]]
    consts: list[Any]  # what the loss function closes over
    structs: PyTree  # of what `call` returns
    num_examples: int
    num_microbatches: int
    # By name: the mesh and `vmap` axes that it communicates over, the types of other effects.
    effects: frozenset[str]
    has_scan: bool  # over layers, perhaps


class _Traced(NamedTuple):
    call: Callable[..., tuple[LossTerms, PyTree, PyTree]]
    consts: list[Any]
    structs: tuple[LossTerms, PyTree, PyTree]
    effects: frozenset[str]
    has_scan: bool


def trace_loss(
    call_loss: Callable[..., tuple[LossTerms, PyTree, PyTree]],
    groups: Sequence[PyTree],
    diff: list[jax.Array],
    key: PyTree,
    carry: PyTree,
) -> list[MicroLoss]:
    """Traces the loss for each group's micro-batches, and for twice as many examples where aux has bare leaves.

    Args:
      call_loss: (diff, micro-batch, key, index, carry) -> (terms, new carry, aux).
      groups: leaves of shape (num_examples, num_microbatches, ...).
      diff: what is differentiated, flat.
      key: the batch's.
      carry: the first micro-batch's.
    """
    micro_batches = [take(group, 0) for group in groups]
    rest = (key, jnp.int32(0), carry)
    traced = [_trace(call_loss, diff, micro_batch, *rest) for micro_batch in micro_batches]
    names = denominators([t.structs[0] for t in traced])

    def micro_loss(group, micro_batch, traced):
        bare = describe_bare(lambda batch: call_loss(diff, batch, *rest)[2], micro_batch, traced.structs[2])

        def combine(terms, carry, aux):
            sums = add_terms(terms, names)
            return sums.totals, (sums.weights, carry, wrap_bare(aux, bare, set(names) == {EXAMPLES}))

        def call(*args):
            return combine(*traced.call(*args))

        structs = jax.eval_shape(combine, *traced.structs)
        num_examples, num_microbatches = size_and_count(group)
        sizes = num_examples, num_microbatches
        return MicroLoss(call, traced.consts, structs, *sizes, traced.effects, traced.has_scan)

    losses = [micro_loss(*each) for each in zip(groups, micro_batches, traced, strict=True)]
    check_one_shape([loss.structs[1][2] for loss in losses])
    return losses


def _trace(call_loss: Callable[..., Any], *args: PyTree) -> _Traced:
    # Not `jax.closure_convert`, which leaves closed-over integers in the function.
    closed, structs = jax.make_jaxpr(call_loss, return_shape=True)(*args)

    def call(*args_and_consts):
        args, consts = args_and_consts[:num_args], args_and_consts[num_args:]
        flat = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(closed.jaxpr, consts))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(structs), flat)

    num_args = len(args)
    effects = frozenset(str(getattr(effect, "name", type(effect).__name__)) for effect in closed.effects)
    return _Traced(call, list(closed.consts), structs, effects, _has_scan(closed.jaxpr))


def _has_scan(jaxpr: jex_core.Jaxpr) -> bool:
    return any(
        eqn.primitive.name == "scan" or any(map(_has_scan, jex_core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )
