"""The whole batch's value, gradients and auxiliary outputs from its micro-batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from optaccum._dtypes import accumulator_dtype_of
from optaccum._loss import EXAMPLES, loss_value, ratio
from optaccum._noise_scale import NoiseEstimates, estimate_noise, squared_norm
from optaccum._run_if import run_if
from optaccum._scanning import reductions
from optaccum._scanning.call import Call, Layout
from optaccum._scanning.data_axes import carry_across, of_several, over_devices, pmax, psum
from optaccum._scanning.loop import Loop, Operands, Outputs, SumOf, Sums, choose_form, run_loop, sum_weights
from optaccum._scanning.micro_loss import as_it_came, stop_gradient, trace_loss
from optaccum._scanning.options import Options
from optaccum._scanning.sharded import Placement, gather, settle
from optaccum._scanning.split import Group, batch_size_of, join, num_and_size_of, resolve_num_microbatches, split
from optaccum._varying import vary, varying_axes

PyTree = Any


class Info(NamedTuple):
    """What `return_info=True` adds to the results: what a window learns about itself.

    Attributes:
      weight: what the gradient is a mean over: the loss's total weight, where it has one, else the number of
        examples; what was dropped is left out. shape=(), float32.
      num_skipped: micro-batches dropped by `skip_nonfinite`, summed over `data_axes`. shape=(), int32.
      noise: with `track_noise_scale`, the window's two raw estimates `gradient_sq_norm` and `gradient_variance`
        (McCandlish et al., 2018, https://arxiv.org/abs/1812.06162, appendix A.1), NaN for a window of one
        micro-batch; else None.
    """

    weight: jax.Array
    num_skipped: jax.Array
    noise: NoiseEstimates | None


def whole_batch(
    loss_fn: Callable[..., Any], options: Options, layout: Layout, placement: Placement | None, call: Call
) -> tuple[jax.Array, PyTree, PyTree, Info]:
    """(value, aux, gradients, info) of the whole batch, from one device's loop or from all devices'."""
    leaves, structure = jax.tree.flatten_with_path(call.diff)
    sums_of = make_sums_of(options, [(path[options.one_argnum :], x) for path, x in leaves], placement)
    if not sums_of:
        raise ValueError("expected at least one array to differentiate; got none. Check argnums.")

    def one_device(groups, call):
        if placement is not None:
            dtypes = [None if sum_of.is_max else options.gather_dtype for sum_of in sums_of]
            call = call._replace(diff=gather(call.diff, placement, dtypes))
        return _one_device(loss_fn, options, layout, sums_of, groups, call)

    (value, aux, grads, info), (rows, _) = divide_batch(one_device, options, placement, call)
    grads = structure.unflatten(grads)
    return value, reductions.merge_aux(aux, rows), grads[0] if options.one_argnum else grads, info


def divide_batch(
    one_device: Callable[[list[Group], Call], tuple[Any, PyTree]],
    options: Options,
    placement: Placement | None,
    call: Call,
) -> tuple[Any, PyTree]:
    """`one_device(micro-batches, call)`, on each device's own rows where there is a placement.

    It returns (value, aux, flat gradients, info), and what leads with rows. With a placement what is differentiated
    comes, and gradients leave, as that says.
    """
    n = None  # the micro-batches are the caller's
    if options.presplit:
        num_and_size_of(call.batch)
    else:
        batch_size = batch_size_of(call.batch)
        n = resolve_num_microbatches(batch_size, options.num_microbatches, options.microbatch_size)

    def with_groups(batch, others):
        return one_device([Group(batch, axis=0)] if n is None else split(batch, n), others)

    others = call._replace(batch=())
    if placement is None:
        return with_groups(call.batch, others)
    params, grads = ([shard.spec for shard in shards] for shards in (placement.params, placement.grads))
    whole = PartitionSpec()
    in_specs: Any = dict.fromkeys(Call._fields, whole)
    in_specs["diff"] = jax.tree.structure(call.diff).unflatten(params)
    mapped = over_devices(
        with_groups,
        placement.mesh,
        options.data_axes,
        batch_axis=int(options.presplit),
        in_specs=Call(**in_specs),
        out_specs=(whole, whole, grads, whole),
    )
    (value, aux, grads, info), rows = mapped(call.batch, others)
    return (value, aux, settle(grads, placement), info), rows


def _one_device(
    loss_fn: Callable[..., Any], options: Options, layout: Layout, sums_of: list[SumOf], groups: list[Group], call: Call
) -> tuple[tuple[jax.Array, PyTree, list[jax.Array], Info], PyTree]:
    """`run_window` with one device's rows."""
    leaves, structure = jax.tree.flatten(call.diff)
    diff = differ(leaves, (groups, call))

    def with_diff(diff):
        return call._replace(diff=jax.tree.unflatten(structure, diff))

    call_loss, losses, consts = trace_loss(loss_fn, options, layout, groups, with_diff, diff)
    loop = Loop(losses, sums_of, options.skip_nonfinite, options.track_noise_scale, options.unroll)
    operands = Operands(diff, groups, call.key, call.carry, consts, call.limit, cotangents=None)
    return run_window(options, loop, operands, leaves, call_loss)


def differ(diff: list[jax.Array], others: PyTree) -> list[jax.Array]:
    """In someone's own `shard_map`: what is differentiated, as what differs between devices.

    So the sums stay on each device until they have been divided by its weights, and cross devices once.
    """
    return vary(diff, frozenset().union(*map(varying_axes, jax.tree.leaves(others))))


def run_window(
    options: Options,
    loop: Loop,
    operands: Operands,
    likes: list[jax.Array],
    call_loss: Callable[..., Any] | None = None,
) -> tuple[tuple[jax.Array, PyTree, list[jax.Array], Info], tuple[PyTree, list[jax.Array]]]:
    """The results of all micro-batches, on all devices; what leads with rows comes apart: aux, and their gradients.

    `likes`: what is differentiated, before `differ`. `call_loss`: the loss as it was before it was traced, if its
    closure may stay.
    """
    losses, groups = loop.losses, operands.groups
    limit = None if options.roles.limit is None else jnp.clip(operands.limit, max=groups[0].count)
    operands = operands._replace(limit=limit)
    in_place = bool(operands.diff) and choose_form(options.in_place, loop, operands)
    if len(losses[0].structs[0]) > 1:
        operands = operands._replace(cotangents=_cotangents(options, loop, operands))
    sums, outputs = run_loop(loop, call_loss, operands, in_place)
    sums = _across(sums, loop.sums_of, options) if options.data_axes else sums
    parts = zip(*(output.row_grads for output in outputs), strict=True)
    row_grads = [stacks[0].swapaxes(0, 1) if options.presplit else join(stacks) for stacks in parts]
    sums = sums._replace(grads=[*sums.grads, *row_grads], carry=as_it_came(losses, operands.carry, sums.carry))
    sums_of = [*loop.sums_of, *(SumOf(x.dtype) for x in row_grads)]
    value, grads, info = _finish(sums, options, sums_of, in_place, max(group.size for group in groups))
    aux, rows = _finish_aux(sums, outputs, options)
    num = len(loop.sums_of)
    own = [_unvary(*leaf) for leaf in zip(grads[:num], likes, loop.sums_of, strict=True)]
    return (value, aux, own, info), (rows, grads[num:])


def make_sums_of(options: Options, leaves: list[tuple[Any, jax.Array]], placement: Placement | None) -> list[SumOf]:
    """How the gradients of each leaf, given with its key path, are kept."""
    sums_of = []
    shards = [None] * len(leaves) if placement is None else placement.grads
    for (path, leaf), shard in zip(leaves, shards, strict=True):
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"expected floating or complex arrays to differentiate; got dtype {leaf.dtype} at argument{name}. "
                "Pass what is not trained as another argument, or as carry_argnum."
            )
        reduction = "mean" if options.grad_reduction_fn is None else options.grad_reduction_fn(path, leaf)
        if reduction not in ("mean", "max"):
            raise ValueError(f'expected grad_reduction_fn to return "mean" or "max"; got {reduction!r} for {name}.')
        is_max = reduction == "max"
        dtype = leaf.dtype if is_max else accumulator_dtype_of(options.accumulator_dtype, path, leaf)
        shard = shard if shard is not None and shard.axes else None
        sums_of.append(SumOf(dtype, is_max, shard, options.shard_sums and shard is not None and not is_max))
    return sums_of


def _cotangents(options: Options, loop: Loop, operands: Operands) -> dict[str, jax.Array]:
    """What each term's total is differentiated with: one over its weight in the whole batch."""
    if options.skip_nonfinite:
        raise ValueError(
            "expected a loss of one weight with skip_nonfinite; got several: dropping a micro-batch changes every "
            "denominator, which the gradients before it have been divided by already. Add the totals up over one "
            "weight, or drop micro-batches by streaming: optaccum.accumulate(..., "
            "should_skip_update_fn=optax.skip_not_finite)."
        )
    weights = lax.stop_gradient(sum_weights(loop, jax.tree.map(stop_gradient, operands)))
    weights = lax.psum(weights, options.data_axes) if options.data_axes else weights
    terms, *_ = loop.losses[0].structs
    return {name: ratio(jnp.ones([], terms[name].total.dtype), weight) for name, weight in weights.items()}


def _across(sums: Sums, sums_of: list[SumOf], options: Options) -> Sums:
    """The sums of all devices; the gradients cross here, and nowhere else."""
    axes = of_several(options.data_axes)
    summed = [None if s.is_max or s.shard else g for g, s in zip(sums.grads, sums_of, strict=True)]
    # Counts go as float32, for arrays of one dtype cross together.
    totals = (sums.num_examples, sums.num_skipped, sums.num_weighted, sums.sq_norm_sum)
    totals = [x.astype(jnp.float32) for x in totals]
    summed, terms, aux, totals = psum((summed, sums.terms, sums.aux, totals), axes)
    num_examples, num_skipped, num_weighted, sq_norm_sum = totals
    return Sums(
        grads=[
            _across_by_itself(own, sum_of, axes) if total is None else total
            for own, total, sum_of in zip(sums.grads, summed, sums_of, strict=True)
        ],
        terms=terms,
        num_examples=num_examples,
        aux=aux,
        carry=carry_across(sums.carry, axes, options.skip_nonfinite),
        num_skipped=num_skipped.astype(jnp.int32),
        num_weighted=num_weighted.astype(jnp.int32),
        sq_norm_sum=sq_norm_sum,
    )


def _across_by_itself(own: jax.Array, sum_of: SumOf, axes: tuple[str, ...]) -> jax.Array:
    """A maximum, or a sum that leaves sharded."""
    shard = sum_of.shard
    if sum_of.is_max:
        largest = jnp.max(reductions.gather(own, axes), 0)
        return shard.part(largest) if shard else largest
    own = own if sum_of.in_parts else shard(own)
    others = tuple(axis for axis in axes if axis not in shard.axes)
    return psum(own, others) if others else own


def _finish(
    sums: Sums, options: Options, sums_of: list[SumOf], in_place: bool, num_rows: int
) -> tuple[jax.Array, list[jax.Array], Info]:
    """Divides the sums by their weights: value, flat gradients, info."""
    name, *several = sums.terms
    weight = jnp.float32(1) if several else sums.terms[name].weight
    none_left = sums.num_examples == 0  # every micro-batch was dropped, or none ran
    # XLA holds the sums in other buffers where the weight is checked: unrolled layers took 1.05 times as long.
    may_be_zero = options.skip_nonfinite or options.roles.limit is not None or name != EXAMPLES

    def mean(grad, sum_of):
        if sum_of.is_max:
            return jnp.where(none_left, jnp.zeros_like(grad), grad)
        return ratio(grad, weight, may_be_zero=may_be_zero).astype(grad.dtype)

    def means(grads):
        return [mean(*leaf) for leaf in zip(grads, sums_of, strict=True)]

    grads = sums.grads
    if not several:  # otherwise the cotangents were divided
        # Left to itself XLA writes some of the quotients to new buffers. A loop works in place, if the compiler
        # cannot see that it takes one trip.
        once = lax.optimization_barrier(jnp.bool_(True))
        grads = run_if(once, means, grads) if in_place else means(grads)
    value = loss_value(sums.terms)
    if options.skip_nonfinite:
        value = jnp.where(none_left & (sums.num_skipped > 0), jnp.full_like(value, jnp.nan), value)
    by_examples = bool(several) or name == EXAMPLES
    info_weight = (sums.num_examples if by_examples else weight).astype(jnp.float32)
    noise = None
    if options.track_noise_scale:
        scale = 1.0
        if several:  # the gradients were divided by the whole batch's weights: times N they are means again
            scale = jnp.square(sums.num_examples)
        elif by_examples:  # the largest micro-batch weighed 1
            scale = num_rows
        sq_norm = sum(
            squared_norm([g]) if sum_of.shard is None else lax.psum(squared_norm([g]), sum_of.shard.axes)
            for g, sum_of in zip(grads, sums_of, strict=True)
            if not sum_of.is_max
        )
        noise = estimate_noise(sums.num_weighted, sums.sq_norm_sum * scale, sq_norm, info_weight)
    return value, grads, Info(info_weight, sums.num_skipped, noise)


def _finish_aux(sums: Sums, outputs: list[Outputs], options: Options) -> tuple[PyTree, PyTree]:
    """The aux of the whole batch, and what of it leads with rows, each with the carry if there is one."""
    stacks, kept, _ = zip(*outputs, strict=True)
    kept = None if kept[0] is None else jnp.concatenate(kept)
    aux, rows = reductions.finish(sums.aux, stacks, kept, options.data_axes)
    return (aux, rows) if options.roles.carry is None else ((sums.carry, aux), (None, rows))


def _unvary(grad: jax.Array, like: jax.Array, sum_of: SumOf) -> jax.Array:
    """A gradient over the mesh axes that what is differentiated does not vary over."""
    axes = tuple(varying_axes(grad) - varying_axes(like))
    if not axes:
        return grad
    return pmax(grad, axes) if sum_of.is_max else psum(grad, axes)
