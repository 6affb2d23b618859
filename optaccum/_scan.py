"""The micro-batch loop: a `jax.lax.scan` that sums gradients, totals and auxiliary outputs.

Two forms give the same sums. The carry form adds each micro-batch's gradient to a sum in the scan's carry, which takes
a second buffer of the parameters' size for the gradient itself. The in-place form hands the backward pass references
(`jax.vjp(...).with_refs`), into which it adds layer by layer as the gradient arises.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaccum import _reductions as reductions
from optaccum._data_axes import vary, vary_like, varying_axes, zeros_of
from optaccum._noise_scale import squared_norm
from optaccum._reductions import Terms

PyTree = Any
Scalars = dict[str, jax.Array]
MicroFn = Callable[..., tuple[Scalars, tuple[Scalars, PyTree, PyTree]]]


class Operands(NamedTuple):
    """The arrays that a loop over all micro-batches works on."""

    diff: list[jax.Array]  # what is differentiated, flat
    stacks: list[PyTree]  # one or two stacks of equal micro-batches, leaves of shape (count, size, ...)
    key: PyTree
    carry: PyTree
    consts: list[Any]  # per stack: what its micro_fn closes over
    cotangents: Scalars | None  # of the terms' totals; None: one


class Sums(NamedTuple):
    """What the loop adds up; the scan's carry."""

    grads: list[jax.Array | None]  # None: in a reference
    terms: Terms
    num_examples: jax.Array  # shape=(), float32
    aux: PyTree
    carry: PyTree
    num_skipped: jax.Array  # shape=(), int32
    num_weighted: jax.Array  # shape=(), int32: micro-batches with a weight
    sq_norm_sum: jax.Array  # shape=(), float32: of |gradient of the micro-batch's total|^2 / its weight


class LoopOptions(NamedTuple):
    """What shapes the loop, all static."""

    sizes: tuple[int, ...]  # of each stack's micro-batches
    sum_dtypes: tuple[Any, ...]  # of each gradient leaf
    is_max: tuple[bool, ...]  # leaves that are not summed: their maximum is kept
    skip_nonfinite: bool
    track_noise_scale: bool
    unroll: int


def run_loop(
    micro_fns: Sequence[MicroFn], options: LoopOptions, operands: Operands, in_place: bool
) -> tuple[Sums, list[PyTree]]:
    """Sums over all micro-batches, and the stacked auxiliary outputs of each scan.

    Args:
      micro_fns: one for each stack: (diff, micro-batch, key, index, carry, *consts) ->
        (totals, (weights, carry, aux)), the loss's terms and the wrapped auxiliary outputs.
      options: see there.
      operands: see there.
      in_place: which of the two forms.
    """
    carry_form = functools.partial(_carry_form, micro_fns, options)
    if not in_place:
        return carry_form(operands)
    # Differentiating through references inside an outer scan gives wrong gradients without an error (JAX 0.10 and 0.12;
    # https://github.com/jax-ml/jax/issues/32411): whoever differentiates gets the carry form.
    loop = jax.custom_vjp(functools.partial(in_place_form, micro_fns, options))
    loop.defvjp(lambda operands: jax.vjp(carry_form, operands), lambda vjp, cotangents: vjp(cotangents))
    return loop(operands)


def sum_weights(
    micro_fns: Sequence[MicroFn], options: LoopOptions, operands: Operands
) -> Scalars:
    """Each term's total weight: a pass over the micro-batches without gradients."""

    def step(state, xs, micro_fn, consts, size):
        weights, carry = state
        _, (new, carry, _) = micro_fn(operands.diff, xs[1], operands.key, xs[0], carry, *consts)
        return (jax.tree.map(jnp.add, weights, new), carry), None

    start = _start(micro_fns, options, operands)
    (weights, _), _ = _scan_stacks(step, (start.terms.weights, start.carry), micro_fns, options, operands)
    return weights


def _carry_form(
    micro_fns: Sequence[MicroFn], options: LoopOptions, operands: Operands
) -> tuple[Sums, list[PyTree]]:
    def step(sums, xs, micro_fn, consts, size):
        forward = _bind(micro_fn, xs, operands, sums.carry, consts)
        totals, vjp, (weights, carry, aux) = jax.vjp(forward, operands.diff, has_aux=True)
        (grads,) = vjp(_cotangents(operands, totals))
        reduced, stacked = reductions.divide_aux(aux)
        new = _add(sums, Terms(totals, weights), reduced, carry, size)
        new = new._replace(grads=_add_grads(sums.grads, grads, options))
        if options.track_noise_scale:
            new = _add_noise(new, grads, weights, size, options)
        if options.skip_nonfinite:
            finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves((totals, weights, grads))]).all()
            kept = jax.tree.map(lambda n, old: jnp.where(finite, n, old), new, sums)
            new = kept._replace(num_skipped=jnp.where(finite, sums.num_skipped, sums.num_skipped + 1))
        return new, stacked

    return _scan_stacks(step, _start(micro_fns, options, operands), micro_fns, options, operands)


def in_place_form(
    micro_fns: Sequence[MicroFn], options: LoopOptions, operands: Operands
) -> tuple[Sums, list[PyTree]]:
    # A reference has its cotangent's dtype: to sum in a wider one, differentiate with respect to the wider parameter.
    narrow = [x.dtype for x in operands.diff]
    dtypes = zip(narrow, options.sum_dtypes, options.is_max, strict=True)
    wide = [
        x.astype(own if is_max else dtype)
        for x, (own, dtype, is_max) in zip(operands.diff, dtypes, strict=True)
    ]
    start = _start(micro_fns, options, operands)
    refs = [None if m else jax.new_ref(g) for g, m in zip(start.grads, options.is_max, strict=True)]
    maxima = [g if m else None for g, m in zip(start.grads, options.is_max, strict=True)]

    def step(sums, xs, micro_fn, consts, size):
        forward = _bind(micro_fn, xs, operands, sums.carry, consts)
        totals, vjp, (weights, carry, aux) = jax.vjp(
            lambda wide: forward([x.astype(dtype) for x, dtype in zip(wide, narrow, strict=True)]),
            wide,
            has_aux=True,
        )
        # A maximum needs each micro-batch's own value: a reference of its own.
        all_refs = [
            jax.new_ref(jnp.zeros_like(x)) if r is None else r for r, x in zip(refs, wide, strict=True)
        ]
        vjp.with_refs(all_refs)(_cotangents(operands, totals))
        own = [jax.freeze(new) if r is None else None for r, new in zip(refs, all_refs, strict=True)]
        reduced, stacked = reductions.divide_aux(aux)
        new = _add(sums, Terms(totals, weights), reduced, carry, size)
        return new._replace(grads=_add_grads(sums.grads, own, options)), stacked

    sums, stacked = _scan_stacks(step, start._replace(grads=maxima), micro_fns, options, operands)
    grads = [g if r is None else jax.freeze(r) for g, r in zip(sums.grads, refs, strict=True)]
    return sums._replace(grads=grads), stacked


def _scan_stacks(
    step: Callable[..., Any],
    state: Any,
    micro_fns: Sequence[MicroFn],
    options: LoopOptions,
    operands: Operands,
) -> tuple[Any, list[PyTree]]:
    """Scans `step(state, (index, micro-batch), micro_fn, consts, size)` over each stack in turn."""
    outputs, first = [], 0
    for micro_fn, stack, consts, size in zip(
        micro_fns, operands.stacks, operands.consts, options.sizes, strict=True
    ):
        count = jax.tree.leaves(stack)[0].shape[0]
        indices = first + jnp.arange(count, dtype=jnp.int32)
        body = functools.partial(step, micro_fn=micro_fn, consts=consts, size=size)
        state, output = lax.scan(body, state, (indices, stack), unroll=options.unroll)
        outputs.append(output)
        first += count
    return state, outputs


def _start(micro_fns: Sequence[MicroFn], options: LoopOptions, operands: Operands) -> Sums:
    """The sums over no micro-batch."""
    micro_batch = jax.tree.map(lambda x: x[0], operands.stacks[0])
    totals, (weights, carry, aux) = jax.eval_shape(
        micro_fns[0],
        operands.diff,
        micro_batch,
        operands.key,
        jnp.int32(0),
        operands.carry,
        *operands.consts[0],
    )
    _check_carry(operands.carry, carry)
    sums = Sums(
        grads=[
            reductions.lowest(x) if is_max else jnp.zeros_like(x, dtype)
            for x, dtype, is_max in zip(operands.diff, options.sum_dtypes, options.is_max, strict=True)
        ],
        terms=zeros_of(Terms(totals, weights)),
        num_examples=jnp.float32(0),
        aux=reductions.start(zeros_of(reductions.divide_aux(aux)[0])),
        carry=vary_like(operands.carry, carry),
        num_skipped=jnp.int32(0),
        num_weighted=jnp.int32(0),
        sq_norm_sum=jnp.float32(0),
    )
    # What depends on every gradient differs between all devices that any gradient differs on.
    axes = frozenset().union(*(varying_axes(x) for x in jax.tree.leaves((operands.diff, sums.terms))))
    if options.skip_nonfinite:
        return vary(sums, axes)
    if options.track_noise_scale:
        return sums._replace(
            num_weighted=vary(sums.num_weighted, axes), sq_norm_sum=vary(sums.sq_norm_sum, axes)
        )
    return sums


def _bind(
    micro_fn: MicroFn, xs: tuple[jax.Array, PyTree], operands: Operands, carry: PyTree, consts: Any
) -> Callable[..., Any]:
    index, micro_batch = xs
    return lambda diff: micro_fn(diff, micro_batch, operands.key, index, carry, *consts)


def _cotangents(operands: Operands, totals: Scalars) -> Scalars:
    if operands.cotangents is None:
        return jax.tree.map(jnp.ones_like, totals)
    return vary_like(operands.cotangents, jax.tree.map(jax.typeof, totals))


def _add(sums: Sums, terms: Terms, aux: PyTree, carry: PyTree, size: int) -> Sums:
    """The sums with one more micro-batch, all but the gradients."""
    return sums._replace(
        terms=jax.tree.map(jnp.add, sums.terms, terms),
        num_examples=sums.num_examples + size,
        aux=reductions.add(sums.aux, aux),
        carry=carry,
    )


def _add_grads(sums: list[Any], grads: list[Any], options: LoopOptions) -> list[Any]:
    def add(total, grad, is_max):
        if total is None:
            return None
        return jnp.maximum(total, grad) if is_max else total + grad.astype(total.dtype)

    return [add(*leaf) for leaf in zip(sums, grads, options.is_max, strict=True)]


def _add_noise(
    sums: Sums, grads: list[jax.Array], weights: Scalars, size: int, options: LoopOptions
) -> Sums:
    """Adds n_i |g_i|^2, of the micro-batch's mean gradient g_i; its summed gradient is n_i g_i."""
    weight = next(iter(weights.values())) if len(weights) == 1 else jnp.float32(size)
    counted = weight != 0
    summed = [g for g, is_max in zip(grads, options.is_max, strict=True) if not is_max]
    scaled = squared_norm(summed) / jnp.where(counted, weight, 1)
    return sums._replace(
        num_weighted=sums.num_weighted + counted.astype(jnp.int32),
        sq_norm_sum=sums.sq_norm_sum + jnp.where(counted, scaled, 0),
    )


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
