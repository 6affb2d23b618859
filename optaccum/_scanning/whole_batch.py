"""The whole batch's value, gradients and auxiliary outputs from its micro-batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaccum._dtypes import AccumulatorDType, accumulator_dtype_of
from optaccum._loss import EXAMPLES, Terms, loss_terms, loss_value, ratio
from optaccum._noise_scale import NoiseEstimates, estimate_noise, squared_norm
from optaccum._run_if import run_if
from optaccum._scanning import reductions
from optaccum._scanning.call import Call, Layout, Roles, fold_in, join_call
from optaccum._scanning.data_axes import carry_across, over_devices, pmax, psum
from optaccum._scanning.loop import (
    Loop,
    MicroLoss,
    Operands,
    SumOf,
    Sums,
    choose_form,
    run_loop,
    sum_weights,
)
from optaccum._scanning.split import Group, batch_size_of, resolve_num_microbatches, split
from optaccum._trace import Traced, trace
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


class Options(NamedTuple):
    """The options of `value_and_grad`, checked."""

    roles: Roles
    one_argnum: bool
    num_microbatches: int | None
    microbatch_size: int | None
    has_aux: bool
    accumulator_dtype: AccumulatorDType
    skip_nonfinite: bool
    presplit: bool
    data_axes: tuple[str, ...]
    in_place: bool | None
    grad_reduction_fn: Callable[[tuple[Any, ...], Any], str] | None
    return_info: bool
    track_noise_scale: bool
    unroll: int


def whole_batch(
    loss_fn: Callable[..., Any], options: Options, layout: Layout, mesh: Any, call: Call
) -> tuple[jax.Array, PyTree, PyTree, Info]:
    """(value, aux, gradients, info) of the whole batch, from one device's loop or from all devices'."""
    n = None  # the micro-batches are the caller's
    if not options.presplit:
        batch_size = batch_size_of(call.batch)
        n = resolve_num_microbatches(batch_size, options.num_microbatches, options.microbatch_size)

    def one_device(batch, others):
        groups = [Group(batch, axis=0)] if n is None else split(batch, n)
        return _one_device(loss_fn, options, layout, groups, others)

    if mesh is not None:
        one_device = over_devices(one_device, mesh, options.data_axes, batch_axis=int(options.presplit))
    (value, aux, grads, info), rows = one_device(call.batch, call._replace(batch=()))
    return value, reductions.merge_aux(aux, rows), grads, info


def _one_device(
    loss_fn: Callable[..., Any], options: Options, layout: Layout, groups: list[Group], call: Call
) -> tuple[tuple[jax.Array, PyTree, PyTree, Info], PyTree]:
    """The results from one device's rows; the aux that leads with rows comes separately."""
    num_rows = max(group.size for group in groups)
    leaves, structure = jax.tree.flatten(call.diff)
    # In someone's own `shard_map`: differentiated as what differs between devices, the sums stay on each device
    # until they have been divided by its weights, and cross devices once.
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves((groups, call))))

    def call_loss(diff, micro_batch, key, index, carry):
        """(terms, new carry, aux) of a micro-batch; a plain scalar weighs 1 for the largest."""
        key = fold_in(key, index)
        if options.data_axes:
            key = fold_in(key, lax.axis_index(options.data_axes))
        diff, carry = jax.tree.unflatten(structure, diff), jax.tree.map(_stop_gradient, carry)
        args, kwargs = join_call(layout, call._replace(diff=diff, batch=micro_batch, key=key, carry=carry))
        loss, carry, aux = _unpack(loss_fn(*args, **kwargs), options)
        return loss_terms(loss, batch_size_of(micro_batch) / num_rows), carry, aux

    losses, consts = _trace_loss(call_loss, options, groups, vary(leaves, axes), call.key, call.carry)
    limit = None if layout.roles.limit is None else jnp.clip(call.limit, 0, groups[0].count)
    operands = Operands(vary(leaves, axes), groups, call.key, call.carry, consts, limit, cotangents=None)
    sums_of = _sums_of(options, call.diff[0] if options.one_argnum else call.diff)
    loop = Loop(losses, sums_of, options.skip_nonfinite, options.track_noise_scale, options.unroll)
    in_place = choose_form(options.in_place, loop, operands)
    if len(losses[0].structs[0]) > 1:
        operands = operands._replace(cotangents=_cotangents(options, loop, operands))

    sums, stacked, kept = run_loop(loop, call_loss, operands, in_place)
    if options.data_axes:
        sums = _across(sums, sums_of, options)
    value, grads, info = _finish(sums, options, sums_of, in_place, num_rows)
    grads = jax.tree.map(_unvary, grads, leaves, [sum_of.is_max for sum_of in sums_of])
    grads = jax.tree.unflatten(structure, grads)
    aux, rows = reductions.finish(sums.aux, stacked, kept, options.data_axes)
    if layout.roles.carry is not None:
        aux, rows = (sums.carry, aux), (None, rows)
    return (value, aux, grads[0] if options.one_argnum else grads, info), rows


def _trace_loss(
    call_loss: Callable[..., tuple[Terms, PyTree, PyTree]],
    options: Options,
    groups: list[Group],
    diff: list[jax.Array],
    key: PyTree,
    carry: PyTree,
) -> tuple[list[MicroLoss], list[list[Any]]]:
    """Traces the loss for each group's micro-batches, and for twice as many examples where aux has bare arrays.

    What the loss closes over comes apart: it may be traced, and a MicroLoss outlives the trace.
    """
    rest = (key, jnp.int32(0), carry)
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
    return [micro_loss(*each) for each in zip(sizes, micro_batches, traced, strict=True)], list(consts)


def _sums_of(options: Options, tree: PyTree) -> list[SumOf]:
    """How each leaf's gradients are kept."""
    sums_of = []
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
        is_max = reduction == "max"
        dtype = leaf.dtype if is_max else accumulator_dtype_of(options.accumulator_dtype, path, leaf)
        sums_of.append(SumOf(dtype, is_max))
    if not sums_of:
        raise ValueError("expected at least one array to differentiate; got none. Check argnums.")
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
    weights = lax.stop_gradient(sum_weights(loop, jax.tree.map(_stop_gradient, operands)))
    weights = lax.psum(weights, options.data_axes) if options.data_axes else weights
    terms, *_ = loop.losses[0].structs
    return {name: ratio(jnp.ones([], terms[name].total.dtype), weight) for name, weight in weights.items()}


def _across(sums: Sums, sums_of: list[SumOf], options: Options) -> Sums:
    """The sums of all devices; the gradients cross here, and nowhere else."""
    axes = options.data_axes
    summed = [None if s.is_max else g for g, s in zip(sums.grads, sums_of, strict=True)]
    # Counts go as float32, for arrays of one dtype cross together.
    totals = (sums.num_examples, sums.num_skipped, sums.num_weighted, sums.sq_norm_sum)
    totals = [x.astype(jnp.float32) for x in totals]
    summed, terms, aux, totals = psum((summed, sums.terms, sums.aux, totals), axes)
    num_examples, num_skipped, num_weighted, sq_norm_sum = totals
    return Sums(
        grads=[
            jnp.max(reductions.gather(own, axes), 0) if sum_of.is_max else total
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
        summed = [g for g, sum_of in zip(grads, sums_of, strict=True) if not sum_of.is_max]
        noise = estimate_noise(sums.num_weighted, sums.sq_norm_sum * scale, squared_norm(summed), info_weight)
    return value, grads, Info(info_weight, sums.num_skipped, noise)


def _unvary(grad: jax.Array, like: jax.Array, is_max: bool) -> jax.Array:
    """A gradient over the mesh axes that what is differentiated does not vary over."""
    axes = tuple(varying_axes(grad) - varying_axes(like))
    if not axes:
        return grad
    return pmax(grad, axes) if is_max else psum(grad, axes)


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


def _check_carry(before: PyTree, after: PyTree) -> None:
    """Raises unless a micro-batch's carry comes back as it went in."""
    expected, came = jax.tree.structure(before), jax.tree.structure(after)
    if expected != came:
        raise TypeError(
            f"expected the carry that the loss function returns to have the structure that it came with, {expected}; "
            f"got {came}. Return (new_carry, rest) as aux."
        )
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
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


def _stop_gradient(x: Any) -> Any:
    return lax.stop_gradient(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x
