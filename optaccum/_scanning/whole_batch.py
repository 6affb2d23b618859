"""The whole batch's value, gradients and auxiliary outputs from its micro-batches."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaccum._dtypes import AccumulatorDType, accumulator_dtype_of
from optaccum._noise_scale import NoiseEstimates, estimate_noise, squared_norm
from optaccum._run_if import run_if
from optaccum._scanning import reductions
from optaccum._scanning.call import Call, Layout, Roles, fold_in, join_call
from optaccum._scanning.data_axes import average_carry, extreme, is_last_device, over_devices, psum
from optaccum._scanning.loop import LoopOptions, Operands, Sums, choose_form, run_loop, sum_weights
from optaccum._scanning.loss import EXAMPLES, loss_terms, total_ratio
from optaccum._scanning.micro_loss import MicroLoss, trace_loss
from optaccum._scanning.split import batch_size_of, resolve_num_microbatches, size_and_count, split
from optaccum._varying import vary, varying_axes

PyTree = Any


class Info(NamedTuple):
    """What `return_info=True` adds to the results: what a window learns about itself.

    Attributes:
      weight: what the gradient is a mean over: the loss's total weight, where its terms share one, else the number of
        examples; what was dropped is left out. shape=(), float32.
      num_skipped: micro-batches dropped by `skip_nonfinite`, summed over `data_axes`. shape=(), int32.
      noise: with `track_noise_scale`, the window's two raw estimates `gradient_sq_norm` and `gradient_variance`
        (McCandlish et al., 2018, https://arxiv.org/abs/1812.06162, appendix A.1), NaN for a window of one
        micro-batch; else None.
    """

    weight: jax.Array
    num_skipped: jax.Array
    noise: NoiseEstimates | None


class Options(NamedTuple):
    """The options of `value_and_grad`."""

    roles: Roles
    one_argnum: bool
    num_microbatches: int | None
    microbatch_size: int | None
    has_aux: bool
    accumulator_dtype: AccumulatorDType
    skip_nonfinite: bool
    data_axes: tuple[str, ...]
    in_place: bool | None
    grad_reduction_fn: Callable[[tuple[Any, ...], Any], str] | None
    return_info: bool
    track_noise_scale: bool
    unroll: int


class Results(NamedTuple):
    """What one window gives."""

    value: jax.Array
    aux: PyTree
    grads: PyTree
    info: Info


def whole_batch(
    loss_fn: Callable[..., Any], options: Options, layout: Layout, mesh: Any, call: Call
) -> Results:
    """The results on the whole batch, from one device's loop or from all devices'."""
    n = resolve_num_microbatches(batch_size_of(call.batch), options.num_microbatches, options.microbatch_size)
    one_device = functools.partial(_one_device, loss_fn, options, layout, n)
    if mesh is not None:
        one_device = over_devices(one_device, mesh, options.data_axes)
    results, rows = one_device(call.batch, call._replace(batch=()))
    return results._replace(aux=reductions.merge_aux(results.aux, rows))


def _one_device(
    loss_fn: Callable[..., Any], options: Options, layout: Layout, n: int, batch: PyTree, others: Call
) -> tuple[Results, PyTree]:
    """The results from one device's rows; the aux that leads with rows comes separately."""
    groups = split(batch, resolve_num_microbatches(batch_size_of(batch), n, None))
    leaves, structure = jax.tree.flatten(others.diff)
    loop_options = _loop_options(options, others.diff)
    # In someone's own `shard_map`: differentiated as what differs between devices, the sums stay on each device
    # until they have been divided by its weights, and cross devices once.
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves((batch, others))))
    diff = vary(leaves, axes)
    call_loss = functools.partial(_call_loss, loss_fn, options, layout, others, structure, _num_rows(groups))
    losses, consts = trace_loss(call_loss, groups, diff, others.key, others.carry)
    operands = Operands(diff, groups, others.key, others.carry, consts, cotangents=None)
    in_place = choose_form(options.in_place, losses, loop_options, operands)
    if len(losses[0].structs[0]) > 1:
        operands = operands._replace(cotangents=_cotangents(options, loop_options, losses, operands))

    sums, stacked = run_loop(losses, loop_options, operands, in_place)
    if options.data_axes:
        sums = _across(sums, loop_options, options.data_axes)
    results = _finish(sums, options, loop_options, in_place, _num_rows(groups))
    grads = jax.tree.map(_unvary, results.grads, leaves, list(loop_options.is_max))
    grads = jax.tree.unflatten(structure, grads)
    results = results._replace(grads=grads[0] if options.one_argnum else grads)
    rows = reductions.rows(stacked)
    if layout.roles.carry is None:
        return results, rows
    return results._replace(aux=(sums.carry, results.aux)), (None, rows)


def _loop_options(options: Options, diff: tuple[PyTree, ...]) -> LoopOptions:
    tree = diff[0] if options.one_argnum else diff
    sum_dtypes, is_max = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"expected floating or complex arrays to differentiate; got dtype {leaf.dtype} at argument{name}. "
                "Pass what is not trained as another argument, or as carry_argnum."
            )
        reduction = "mean" if options.grad_reduction_fn is None else options.grad_reduction_fn(path, leaf)
        if reduction not in ("mean", "max"):
            raise ValueError(
                f'expected grad_reduction_fn to return "mean" or "max"; got {reduction!r} for {name}.'
            )
        is_max.append(reduction == "max")
        sum_dtype = accumulator_dtype_of(options.accumulator_dtype, path, leaf)
        sum_dtypes.append(leaf.dtype if is_max[-1] else sum_dtype)
    if not sum_dtypes:
        raise ValueError("expected at least one array to differentiate; got none. Check argnums.")
    return LoopOptions(
        sum_dtypes=tuple(sum_dtypes),
        is_max=tuple(is_max),
        skip_nonfinite=options.skip_nonfinite,
        track_noise_scale=options.track_noise_scale,
        unroll=options.unroll,
    )


def _call_loss(
    loss_fn: Callable[..., Any],
    options: Options,
    layout: Layout,
    others: Call,
    structure: Any,
    num_rows: int,
    diff: list[jax.Array],
    micro_batch: PyTree,
    key: PyTree,
    index: jax.Array,
    carry: PyTree,
) -> tuple[Any, PyTree, PyTree]:
    """(terms, new carry, aux) of a micro-batch; a plain scalar weighs 1 for the largest, which has `num_rows`."""
    call = others._replace(
        diff=jax.tree.unflatten(structure, diff),
        batch=micro_batch,
        key=_fold_in(key, index, options.data_axes),
        carry=jax.tree.map(_stop_gradient, carry),
    )
    args, kwargs = join_call(layout, call)
    loss, new_carry, aux = _unpack(loss_fn(*args, **kwargs), options)
    return loss_terms(loss, batch_size_of(micro_batch) / num_rows), new_carry, aux


def _cotangents(
    options: Options, loop_options: LoopOptions, losses: list[MicroLoss], operands: Operands
) -> dict[str, jax.Array]:
    """What each term's total is differentiated with: one over its weight in the whole batch."""
    if options.skip_nonfinite:
        raise ValueError(
            "skip_nonfinite expects terms that share one weight: dropping a micro-batch changes every denominator, "
            "which the gradients before it have been divided by already. Give the terms one weight, or drop "
            "micro-batches by streaming: optaccum.accumulate(..., should_skip_update_fn=optax.skip_not_finite)."
        )
    weights = lax.stop_gradient(sum_weights(losses, loop_options, operands))
    weights = lax.psum(weights, options.data_axes) if options.data_axes else weights
    totals, _ = losses[0].structs
    return jax.tree.map(lambda t, w: reductions.ratio(jnp.ones([], t.dtype), w), totals, weights)


def _across(sums: Sums, loop_options: LoopOptions, axes: tuple[str, ...]) -> Sums:
    """The sums of all devices; the gradients cross here, and nowhere else."""
    summed = [None if m else g for g, m in zip(sums.grads, loop_options.is_max, strict=True)]
    # Counts go as float32, for arrays of one dtype cross together.
    totals = (sums.num_examples, sums.num_skipped, sums.num_weighted, sums.sq_norm_sum)
    totals = [x.astype(jnp.float32) for x in totals]
    summed, terms, totals = psum((summed, sums.terms, totals), axes)
    counts = sums.num_examples != 0 if loop_options.skip_nonfinite else None
    grads = [
        extreme(own, axes, lax.pmax) if total is None else total
        for own, total in zip(sums.grads, summed, strict=True)
    ]
    num_examples, num_skipped, num_weighted, sq_norm_sum = totals
    return Sums(
        grads=grads,
        terms=terms,
        num_examples=num_examples,
        aux=reductions.across(sums.aux, axes, is_last_device(axes, counts)),
        carry=average_carry(sums.carry, axes),
        num_skipped=num_skipped.astype(jnp.int32),
        num_weighted=num_weighted.astype(jnp.int32),
        sq_norm_sum=sq_norm_sum,
    )


def _finish(
    sums: Sums, options: Options, loop_options: LoopOptions, in_place: bool, num_rows: int
) -> Results:
    """Divides the sums by their weights; gradients are flat still."""
    name, *several = sums.terms.weights
    weight = jnp.float32(1) if several else sums.terms.weights[name]
    none_left = sums.num_examples == 0  # every micro-batch was dropped
    # XLA holds the sums in other buffers where the weight is checked: unrolled layers took 1.05 times as long.
    may_be_zero = options.skip_nonfinite or name != EXAMPLES

    def mean(grad, is_max):
        if is_max:
            return jnp.where(none_left, jnp.zeros_like(grad), grad)
        return reductions.ratio(grad, weight, may_be_zero=may_be_zero).astype(grad.dtype)

    def means(grads):
        return [mean(*leaf) for leaf in zip(grads, loop_options.is_max, strict=True)]

    grads = sums.grads
    if not several:  # otherwise the cotangents were divided
        # Left to itself XLA writes some of the quotients to new buffers. A loop works in place, if the compiler
        # cannot see that it takes one trip.
        once = lax.optimization_barrier(jnp.bool_(True))
        grads = run_if(once, means, grads) if in_place else means(grads)
    value = total_ratio(sums.terms)
    if options.skip_nonfinite:
        value = jnp.where(none_left, jnp.full_like(value, jnp.nan), value)
    by_examples = bool(several) or name == EXAMPLES
    info_weight = (sums.num_examples if by_examples else weight).astype(jnp.float32)
    noise = None
    if options.track_noise_scale:
        scale = 1.0
        if several:  # the gradients were divided by the whole batch's weights: times N they are means again
            scale = jnp.square(sums.num_examples)
        elif by_examples:  # the largest micro-batch weighed 1
            scale = num_rows
        summed = [g for g, is_max in zip(grads, loop_options.is_max, strict=True) if not is_max]
        noise = estimate_noise(sums.num_weighted, sums.sq_norm_sum * scale, squared_norm(summed), info_weight)
    return Results(value, reductions.finish(sums.aux), grads, Info(info_weight, sums.num_skipped, noise))


def _unvary(grad: jax.Array, like: jax.Array, is_max: bool) -> jax.Array:
    """A gradient over the mesh axes that what is differentiated does not vary over."""
    axes = tuple(varying_axes(grad) - varying_axes(like))
    if not axes:
        return grad
    return extreme(grad, axes, lax.pmax) if is_max else psum(grad, axes)


def _unpack(out: Any, options: Options) -> tuple[Any, PyTree, PyTree]:
    """(loss, carry, aux) of what the loss function returned."""

    def pair(x, expected):
        if not isinstance(x, tuple | list) or len(x) != 2:
            raise TypeError(f"expected the loss function to return {expected}; got {type(x).__name__}.")
        return x

    loss, aux = pair(out, "(loss, aux), as has_aux=True says") if options.has_aux else (out, ())
    if options.roles.carry is None:
        return loss, (), aux
    return loss, *pair(aux, "(loss, (new_carry, rest)), as carry_argnum says")


def _fold_in(key: PyTree, index: jax.Array, axes: tuple[str, ...]) -> PyTree:
    """The micro-batch's own keys, and on several devices the device's own."""

    def fold(key):
        key = fold_in(key, index)
        return jax.random.fold_in(key, lax.axis_index(axes)) if axes else key

    return jax.tree.map(fold, key)


def _stop_gradient(x: jax.Array) -> jax.Array:
    return lax.stop_gradient(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def _num_rows(groups: list[PyTree]) -> int:
    """The size of the largest micro-batch."""
    return max(size_and_count(group)[0] for group in groups)
