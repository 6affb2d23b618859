"""`value_and_grad` over micro-batches."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaccum import _reductions as reductions
from optaccum._call import Call, Layout, Roles, as_indices, jit_call, join_call, split_call
from optaccum._data_axes import (
    average_carry,
    check_layout,
    device_index,
    extreme,
    find_mesh,
    is_last_device,
    over_devices,
)
from optaccum._dtypes import AccumulatorDType, accumulator_dtype_of
from optaccum._noise_scale import NoiseEstimates, estimate_noise, squared_norm
from optaccum._run_if import run_if
from optaccum._scan import LoopOptions, MicroFn, Operands, Sums, in_place_form, run_loop, sum_weights
from optaccum._split import batch_size_of, check_split_options, resolve_num_microbatches, split

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


class _Options(NamedTuple):
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


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    num_microbatches: int | None = None,
    microbatch_size: int | None = None,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    key_argnum: int | None = None,
    carry_argnum: int | None = None,
    accumulator_dtype: AccumulatorDType = jnp.float32,
    skip_nonfinite: bool = False,
    data_axes: str | Sequence[str] | None = None,
    in_place: bool | None = None,
    grad_reduction_fn: Callable[[tuple[Any, ...], Any], str] | None = None,
    return_info: bool = False,
    track_noise_scale: bool = False,
    unroll: int = 1,
) -> Callable[..., Any]:
    r"""`jax.value_and_grad`, one micro-batch at a time: the whole batch's numbers with one micro-batch's activations.

    A compiled `jax.lax.scan` over micro-batches `batch[i::n]`, whose sizes differ by at most one. For a loss that is
    a mean over examples, with :math:`m_i` of them in micro-batch i,

    .. math:: L = \frac{\sum_i m_i L_i}{\sum_i m_i}, \qquad \nabla L = \frac{\sum_i m_i \nabla L_i}{\sum_i m_i};

    for one of :class:`WeightedMean` terms, :math:`L = \sum_t \sum_i T_{t,i} / \sum_i W_{t,i}`.

    Args:
      loss_fn: returns a scalar, the mean over its examples; a :class:`WeightedMean`; or a dict of those, which add
        up, each with its own denominator (then a first pass sums the weights, free where they depend on the batch
        only); with `has_aux` a pair of that and any pytree.
      num_microbatches: n. Exactly one of this and the next.
      microbatch_size: at most this many examples at once, over all devices: n = ceil(batch size / microbatch_size).
      argnums: the positional argument or arguments to differentiate, as in `jax.value_and_grad`.
      batch_argnums: those to split; every leaf leads with the batch axis.
      has_aux: whether `loss_fn` returns (loss, aux). :class:`WeightedMean`, :class:`Sum`, :class:`Max`,
        :class:`Min`, :class:`Last` and :class:`Stack` say how a leaf combines. A bare leaf with one axis that is the
        batch's is concatenated in the batch's order; any other bare float is a mean over examples, under a loss
        that is one too.
      key_argnum: a PRNG key, or a pytree of them; micro-batch i gets `jax.random.fold_in(key, i)`.
      carry_argnum: state threaded from each micro-batch to the next, such as BatchNorm statistics; aux is then
        (new_carry, rest), and no gradient flows along the carry.
      accumulator_dtype: of the gradients' sums and of the gradients returned: a dtype, taken for real leaves other
        than float64; None, for each gradient's own; or a function (key path, leaf) -> dtype. Parameters in bf16 thus
        get float32 gradients: initialise a bare optimizer on `optax.tree.cast(params, jnp.float32)`, or let
        :func:`accumulate` wrap it.
      skip_nonfinite: drop a micro-batch whose loss or gradient is not finite, its weight and its carry with it. Its
        rows stay in concatenations and stacks. All dropped: the value is NaN and the gradients are zero.
      data_axes: mesh axes that the batch, and no other argument, is sharded over. `loss_fn` then sees one device's
        rows of a micro-batch, keys are `fold_in(fold_in(key, i), device's index)`, and gradients cross devices once,
        after the loop.
      in_place: whether the backward pass adds into the one gradient buffer, through `jax.vjp(...).with_refs`. None:
        where it can; True: or raise; False: never. It cannot with `skip_nonfinite` or `track_noise_scale`, which
        need each micro-batch's gradient; with a sum narrower than its parameter; for static slices of a parameter
        in JAX 0.10; under forward-mode differentiation (`jax.jvp`, `jax.hessian`) and under `jax.vmap` from outside.
        Pass False for the last two, which do not show beforehand. It saves nothing over False for layers that are not
        scanned, nor for scanned 16-bit parameters with float32 sums.
      grad_reduction_fn: (key path, leaf of the differentiated arguments) -> "mean", or "max" for state that its
        gradient carries (FP8 amax histories): the elementwise maximum, in the leaf's own dtype.
      return_info: return an :class:`Info` as one more result.
      track_noise_scale: fill `Info.noise`.
      unroll: of the scan.

    Returns:
      A function of `loss_fn`'s arguments that returns what `jax.value_and_grad(loss_fn, argnums, has_aux)` returns on
      the whole batch: (value, gradients) or ((value, aux), gradients), then Info if asked for. The value is float32
      or wider. A total weight of zero gives zero value and zero gradients.

    Raises:
      ValueError, TypeError: here for options that contradict each other; at the first call for arguments, losses and
        auxiliary outputs that do not fit them. Nothing raises at run time.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaccum
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch["x"] * w - batch["y"]) ** 2)
      >>> batch = {"x": jnp.arange(10.0), "y": jnp.ones(10)}
      >>> loss, grads = optaccum.value_and_grad(loss_fn, num_microbatches=4)(1.0, batch)
      >>> round(float(loss), 4), round(float(grads), 4)
      (20.5, 48.0)
      >>> round(float(jnp.mean((batch["x"] - 1.0) ** 2)), 4)
      20.5
    """
    options = _Options(
        roles=Roles(
            diff=as_indices(argnums, "argnums"),
            batch=as_indices(batch_argnums, "batch_argnums"),
            key=None if key_argnum is None else as_indices(key_argnum, "key_argnum")[0],
            carry=None if carry_argnum is None else as_indices(carry_argnum, "carry_argnum")[0],
        ),
        one_argnum=hasattr(argnums, "__index__"),
        num_microbatches=num_microbatches,
        microbatch_size=microbatch_size,
        has_aux=has_aux,
        accumulator_dtype=accumulator_dtype,
        skip_nonfinite=skip_nonfinite,
        data_axes=(data_axes,) if isinstance(data_axes, str) else tuple(data_axes or ()),
        in_place=in_place,
        grad_reduction_fn=grad_reduction_fn,
        return_info=return_info,
        track_noise_scale=track_noise_scale,
        unroll=unroll,
    )
    _check_options(options)
    compiled = jit_call(functools.partial(_whole_batch, loss_fn, options))

    @functools.wraps(loss_fn, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def grad_fn(*args: Any, **kwargs: Any) -> Any:
        call, layout = split_call(options.roles, args, kwargs)
        mesh = find_mesh(call, options.data_axes) if options.data_axes else None
        if mesh is not None:
            check_layout(call._replace(batch=()), batch_size_of(call.batch), mesh, options.data_axes)
        value, aux, grads, info = compiled(layout, mesh, call)
        results = ((value, aux) if has_aux else value, grads)
        return (*results, info) if return_info else results

    return grad_fn


def grad(loss_fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.grad`, one micro-batch at a time; takes the options of :func:`value_and_grad`.

    Args:
      loss_fn: as in :func:`value_and_grad`.
      **options: as there.

    Returns:
      A function of `loss_fn`'s arguments that returns the gradients; (gradients, aux) with `has_aux`; then an
      :class:`Info` with `return_info`.

    Raises:
      ValueError, TypeError: as :func:`value_and_grad`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaccum
      >>> grad_fn = optaccum.grad(lambda w, x: jnp.mean(w * x), microbatch_size=2)
      >>> float(grad_fn(1.0, jnp.arange(5.0)))
      2.0
    """
    grad_fn = value_and_grad(loss_fn, **options)
    has_aux = options.get("has_aux", False)

    @functools.wraps(grad_fn)
    def without_value(*args: Any, **kwargs: Any) -> Any:
        value, grads, *info = grad_fn(*args, **kwargs)
        results = (grads, *((value[1],) if has_aux else ()), *info)
        return results if len(results) > 1 else grads

    return without_value


def _check_options(options: _Options) -> None:
    check_split_options(options.num_microbatches, options.microbatch_size)
    if options.roles.carry is not None and not options.has_aux:
        raise ValueError("carry_argnum expects has_aux=True: loss_fn returns (loss, (new_carry, rest)).")
    if options.track_noise_scale and not options.return_info:
        raise ValueError("track_noise_scale expects return_info=True: its estimates come in Info.noise.")
    needs_each = [name for name in ("skip_nonfinite", "track_noise_scale") if getattr(options, name)]
    if options.in_place and needs_each:
        raise ValueError(f"in_place=True rules out {needs_each[0]}, which needs each micro-batch's gradient.")


def _whole_batch(
    loss_fn: Callable[..., Any], options: _Options, layout: Layout, mesh: Any, call: Call
) -> tuple[jax.Array, PyTree, PyTree, Info]:
    """Value, aux, gradients and info of the whole batch."""
    batch_size = batch_size_of(call.batch)
    n = resolve_num_microbatches(batch_size, options.num_microbatches, options.microbatch_size)
    one_device = functools.partial(_one_device, loss_fn, options, layout, n)
    if mesh is None:
        (value, reduced, grads, info), rows = one_device(call.batch, call._replace(batch=()))
    else:
        mapped = over_devices(one_device, mesh, options.data_axes)
        (value, reduced, grads, info), rows = mapped(call.batch, call._replace(batch=()))
    return value, reductions.merge_aux(reduced, rows), grads, info


def _one_device(
    loss_fn: Callable[..., Any], options: _Options, layout: Layout, n: int, batch: PyTree, others: Call
) -> tuple[tuple[jax.Array, PyTree, PyTree, Info], PyTree]:
    """What `_whole_batch` returns, from one device's rows; the aux that leads with rows comes separately."""
    stacks = split(batch, resolve_num_microbatches(_size(batch), n, None))
    loop_options = _loop_options(options, others.diff, [_size(stack, axis=1) for stack in stacks])
    diff, structure = jax.tree.flatten(others.diff)
    operands = Operands(diff, stacks, others.key, others.carry, consts=[], cotangents=None)

    def call_loss(diff, micro_batch, key, index, carry):
        call = others._replace(
            diff=jax.tree.unflatten(structure, diff),
            batch=micro_batch,
            key=_fold_in(key, index, options.data_axes),
            carry=lax.stop_gradient(carry),
        )
        args, kwargs = join_call(layout, call)
        loss, new_carry, aux = _unpack(loss_fn(*args, **kwargs), options)
        terms = reductions.loss_terms(loss, _size(micro_batch) / max(loop_options.sizes))
        return terms.totals, (terms.weights, new_carry, aux)

    traced = [_trace(call_loss, operands, stack) for stack in stacks]
    micro_fns = [micro_fn for micro_fn, _ in traced]
    operands = operands._replace(consts=[consts for _, consts in traced])
    in_place = _choose_form(options, loop_options, micro_fns, operands)
    if len(_term_names(micro_fns[0], operands)) > 1:
        if options.skip_nonfinite:
            raise ValueError(
                "skip_nonfinite expects terms that share one weight: dropping a micro-batch changes every denominator, "
                "which the gradients before it have been divided by already. Give the terms one weight, or drop "
                "micro-batches by streaming: optaccum.accumulate(..., should_skip_update_fn=optax.skip_not_finite)."
            )
        weights = lax.stop_gradient(sum_weights(micro_fns, loop_options, operands))
        weights = lax.psum(weights, options.data_axes) if options.data_axes else weights
        operands = operands._replace(cotangents=jax.tree.map(lambda w: reductions.ratio(1.0, w), weights))

    sums, stacked = run_loop(micro_fns, loop_options, operands, in_place)
    if options.data_axes:
        sums = _across(sums, loop_options, options.data_axes)
    value, reduced, grads, info = _finish(sums, options, loop_options)
    if layout.roles.carry is not None:
        reduced = (sums.carry, reduced)
    grads = jax.tree.unflatten(structure, grads)
    rows = reductions.rows(stacked)
    rows = (None, rows) if layout.roles.carry is not None else rows
    return (value, reduced, grads[0] if options.one_argnum else grads, info), rows


def _loop_options(options: _Options, diff: tuple[PyTree, ...], sizes: list[int]) -> LoopOptions:
    tree = diff[0] if options.one_argnum else diff
    sum_dtypes, is_max = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"expected floating or complex arrays to differentiate; got dtype {leaf.dtype} at argument{name}. Pass "
                "what is not trained as another argument, or as carry_argnum."
            )
        reduction = "mean" if options.grad_reduction_fn is None else options.grad_reduction_fn(path, leaf)
        if reduction not in ("mean", "max"):
            raise ValueError(
                f'expected grad_reduction_fn to return "mean" or "max"; got {reduction!r} for {name}.'
            )
        is_max.append(reduction == "max")
        own = leaf.dtype
        sum_dtypes.append(own if is_max[-1] else accumulator_dtype_of(options.accumulator_dtype, path, leaf))
    if not sum_dtypes:
        raise ValueError("expected at least one array to differentiate; got none. Check argnums.")
    return LoopOptions(
        sizes=tuple(sizes),
        sum_dtypes=tuple(sum_dtypes),
        is_max=tuple(is_max),
        skip_nonfinite=options.skip_nonfinite,
        track_noise_scale=options.track_noise_scale,
        unroll=options.unroll,
    )


def _trace(call_loss: Callable[..., Any], operands: Operands, stack: PyTree) -> tuple[MicroFn, list[Any]]:
    """Traces the loss for one stack's micro-batches, once; what it closes over becomes arguments."""
    micro_batch = jax.tree.map(lambda x: x[0], stack)
    rest = (operands.key, jnp.int32(0), operands.carry)
    traced, consts = jax.closure_convert(call_loss, operands.diff, micro_batch, *rest)
    totals, (_, _, aux) = jax.eval_shape(traced, operands.diff, micro_batch, *rest, *consts)
    bare = reductions.describe_bare(
        lambda batch: call_loss(operands.diff, batch, *rest)[1][2], micro_batch, aux
    )

    def micro_fn(diff, micro_batch, key, index, carry, *consts):
        totals, (weights, carry, aux) = traced(diff, micro_batch, key, index, carry, *consts)
        mean_allowed = set(totals) == {reductions.EXAMPLES}
        return totals, (weights, carry, reductions.wrap_bare(aux, bare, _size(micro_batch), mean_allowed))

    return micro_fn, consts


def _choose_form(
    options: _Options, loop_options: LoopOptions, micro_fns: list[MicroFn], operands: Operands
) -> bool:
    """Whether to sum in place. Raises where `in_place=True` cannot be."""
    if options.in_place is False or options.skip_nonfinite or options.track_noise_scale:
        return False
    narrow = [
        f"{x.dtype} parameter with a {dtype} sum"
        for x, dtype in zip(operands.diff, loop_options.sum_dtypes, strict=True)
        if jnp.promote_types(x.dtype, dtype) != dtype
    ]
    try:
        if not narrow:
            jax.eval_shape(functools.partial(in_place_form, micro_fns, loop_options), operands)
            return True
    except Exception as error:  # whatever the running JAX raises where it cannot pass references through
        if options.in_place:
            raise ValueError(
                "in_place=True cannot be honoured: this JAX cannot pass gradient references through the loss. Leave "
                "in_place out to fall back to a second gradient buffer."
            ) from error
        return False
    if options.in_place:
        raise ValueError(
            f"in_place=True cannot be honoured for a {narrow[0]}. Widen accumulator_dtype, or leave in_place out."
        )
    return False


def _term_names(micro_fn: MicroFn, operands: Operands) -> list[str]:
    micro_batch = jax.tree.map(lambda x: x[0], operands.stacks[0])
    rest = (operands.key, jnp.int32(0), operands.carry, *operands.consts[0])
    return list(jax.eval_shape(micro_fn, operands.diff, micro_batch, *rest)[0])


def _across(sums: Sums, loop_options: LoopOptions, axes: tuple[str, ...]) -> Sums:
    """The sums of all devices; the gradients cross here, and nowhere else."""
    summed = [None if m else g for g, m in zip(sums.grads, loop_options.is_max, strict=True)]
    # Counts go as float32, for arrays of one dtype cross together.
    totals = (sums.num_examples, sums.num_skipped, sums.num_weighted, sums.sq_norm_sum)
    totals = [x.astype(jnp.float32) for x in totals]
    summed, terms, totals = lax.psum((summed, sums.terms, totals), axes)
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
    sums: Sums, options: _Options, loop_options: LoopOptions
) -> tuple[jax.Array, PyTree, list[jax.Array], Info]:
    """Divides: the value, the reduced aux, the gradients and the info."""
    name, *several = sums.terms.weights
    weight = jnp.float32(1) if several else sums.terms.weights[name]
    none_left = sums.num_examples == 0  # every micro-batch was dropped

    def divide(grads):
        return [mean(*leaf) for leaf in zip(grads, loop_options.is_max, strict=True)]

    def mean(grad, is_max):
        if is_max:
            return jnp.where(none_left, jnp.zeros_like(grad), grad)
        wide = jnp.promote_types(grad.dtype, weight.dtype)
        quotient = grad.astype(wide) / jnp.where(weight != 0, weight, 1).astype(wide)
        return jnp.where(weight != 0, quotient.astype(grad.dtype), jnp.zeros_like(grad))

    grads = sums.grads
    if not several:  # otherwise the cotangents were divided
        # Left to itself XLA writes some of the quotients to new buffers. A loop works in place, if the compiler
        # cannot see that it takes one trip.
        grads = run_if(lax.optimization_barrier(jnp.bool_(True)), divide, grads)
    value = jnp.where(none_left, jnp.nan, reductions.total_ratio(sums.terms))
    by_examples = bool(several) or name == reductions.EXAMPLES
    info_weight = (sums.num_examples if by_examples else weight).astype(jnp.float32)
    noise = None
    if options.track_noise_scale:
        scale = 1.0
        if several:  # the gradients were divided by the whole batch's weights: times N they are means again
            scale = jnp.square(sums.num_examples)
        elif by_examples:  # the largest micro-batch weighed 1
            scale = max(loop_options.sizes)
        summed = [g for g, is_max in zip(grads, loop_options.is_max, strict=True) if not is_max]
        noise = estimate_noise(sums.num_weighted, sums.sq_norm_sum * scale, squared_norm(summed), info_weight)
    return value, reductions.finish(sums.aux), grads, Info(info_weight, sums.num_skipped, noise)


def _unpack(out: Any, options: _Options) -> tuple[Any, PyTree, PyTree]:
    """(loss, carry, aux) of what the loss function returned."""

    def pair(x, expected):
        if not isinstance(x, tuple) or len(x) != 2:
            raise TypeError(f"expected the loss function to return {expected}; got {type(x).__name__}.")
        return x

    loss, aux = pair(out, "(loss, aux), as has_aux=True says") if options.has_aux else (out, ())
    if options.roles.carry is None:
        return loss, (), aux
    return loss, *pair(aux, "(loss, (new_carry, rest)), as carry_argnum says")


def _fold_in(key: PyTree, index: jax.Array, axes: tuple[str, ...]) -> PyTree:
    """The micro-batch's own keys, and on several devices the device's own."""

    def fold(key):
        key = jax.random.fold_in(key, index)
        return jax.random.fold_in(key, device_index(axes)) if axes else key

    return jax.tree.map(fold, key)


def _size(tree: PyTree, axis: int = 0) -> int:
    return jax.tree.leaves(tree)[0].shape[axis]
