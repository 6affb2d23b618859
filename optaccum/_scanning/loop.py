"""The micro-batch loop: a `jax.lax.scan` that sums gradients, totals and auxiliary outputs.

Two forms give the same sums. The carry form adds each micro-batch's gradient to a sum in the scan's carry, which takes
a second buffer of the parameters' size for the gradient itself. The in-place form hands the backward pass references
(`jax.vjp(...).with_refs`), into which it adds layer by layer as the gradient arises; transformations see the carry
form (`run_as`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaccum._in_place import run_as
from optaccum._noise_scale import squared_norm
from optaccum._scanning import reductions
from optaccum._scanning.data_axes import zeros_of
from optaccum._scanning.loss import Terms
from optaccum._scanning.micro_loss import MicroLoss, Scalars
from optaccum._scanning.split import size_and_count, take
from optaccum._varying import vary, vary_like, varying_axes

PyTree = Any


class Operands(NamedTuple):
    """The arrays that a loop over all micro-batches works on."""

    diff: list[jax.Array]  # what is differentiated, flat
    groups: list[PyTree]  # one or two groups of equal micro-batches, leaves of shape (size, count, ...)
    key: PyTree
    carry: PyTree
    consts: list[Any]  # per group: what its loss closes over
    cotangents: Scalars | None  # of the terms' totals; None: one


class Sums(NamedTuple):
    """What the loop adds up; the scan's carry."""

    terms: Terms
    num_examples: jax.Array  # shape=(), float32
    grads: list[jax.Array | None]  # None: in a reference
    aux: PyTree
    carry: PyTree
    num_skipped: jax.Array  # shape=(), int32
    num_weighted: jax.Array  # shape=(), int32: micro-batches with a weight
    sq_norm_sum: jax.Array  # shape=(), float32: of |gradient of the micro-batch's total|^2 / its weight


class LoopOptions(NamedTuple):
    """What shapes the loop, all static."""

    sum_dtypes: tuple[Any, ...]  # of each gradient leaf
    is_max: tuple[bool, ...]  # leaves that are not summed: their maximum is kept
    skip_nonfinite: bool
    track_noise_scale: bool
    unroll: int


def run_loop(
    losses: Sequence[MicroLoss], options: LoopOptions, operands: Operands, in_place: bool
) -> tuple[Sums, list[PyTree]]:
    """Sums over all micro-batches, and the stacked auxiliary outputs of each scan; `in_place` chooses the form."""
    form = functools.partial(_carry_form, losses, options)
    if in_place:
        form = run_as(functools.partial(_in_place_form, losses, options), form)
    return form(operands)


def choose_form(
    in_place: bool | None, losses: Sequence[MicroLoss], options: LoopOptions, operands: Operands
) -> bool:
    """Whether to sum in place: where it can be, and is of use. Raises where `in_place=True` cannot be."""
    # Without a scan, over layers say, the compiler adds each gradient as it arises: references would save nothing.
    wanted = any(loss.has_scan for loss in losses) if in_place is None else in_place
    if not wanted or options.skip_nonfinite or options.track_noise_scale:
        return False
    obstacle, cause = _obstacle(losses, options, operands)
    if obstacle and in_place:
        raise ValueError(
            f"in_place=True cannot be honoured: {obstacle}. Leave in_place out, or pass False, to sum in a second "
            "gradient buffer."
        ) from cause
    return not obstacle


def _obstacle(
    losses: Sequence[MicroLoss], options: LoopOptions, operands: Operands
) -> tuple[str, Exception | None]:
    """Why references cannot be used; empty where they can."""
    for x, dtype in zip(operands.diff, options.sum_dtypes, strict=True):
        if not np.can_cast(x.dtype, dtype):
            return f"a {dtype} sum is narrower than its {x.dtype} parameter", None
    # Effects do not show through `run_as`, and its rule for vmap does not know the axis by name.
    effects = {effect for loss in losses for effect in loss.effects}
    effects -= set(jax.sharding.get_abstract_mesh().axis_names)
    if effects:
        return (
            f"the loss has effects, or communicates over an axis of jax.vmap ({', '.join(sorted(effects))})",
            None,
        )
    try:
        jax.eval_shape(functools.partial(_in_place_form, losses, options), operands)
    except Exception as error:  # whatever the running JAX raises where it cannot pass references through
        return "this JAX cannot pass gradient references through the loss", error
    return "", None


def sum_weights(losses: Sequence[MicroLoss], options: LoopOptions, operands: Operands) -> Scalars:
    """Each term's total weight: a pass over the micro-batches without gradients."""

    def step(state, xs, call, num_examples):
        weights, carry = state
        _, (new, carry, _) = call(operands.diff, xs, carry)
        return (jax.tree.map(jnp.add, weights, new), carry), None

    start = _start(losses, options, operands)
    (weights, _), _ = _scan_groups(step, (start.terms.weights, start.carry), losses, options, operands)
    return weights


def _carry_form(
    losses: Sequence[MicroLoss], options: LoopOptions, operands: Operands
) -> tuple[Sums, list[PyTree]]:
    def step(sums, xs, call, num_examples):
        totals, vjp, (weights, carry, aux) = jax.vjp(
            lambda x: call(x, xs, sums.carry), operands.diff, has_aux=True
        )
        (grads,) = vjp(_cotangents(operands, totals))
        reduced, stacked = reductions.divide_aux(aux)
        new = _add(sums, Terms(totals, weights), reduced, carry, num_examples)
        new = new._replace(grads=_add_grads(sums.grads, grads, options))
        if options.track_noise_scale:
            new = _add_noise(new, grads, weights, num_examples, options)
        if options.skip_nonfinite:
            finite = _all_finite((totals, weights, grads), _axes(sums.terms))
            kept = jax.tree.map(lambda n, old: jnp.where(finite, n, old), new, sums)
            new = kept._replace(num_skipped=jnp.where(finite, sums.num_skipped, sums.num_skipped + 1))
        return new, stacked

    return _scan_groups(step, _start(losses, options, operands), losses, options, operands)


def _in_place_form(
    losses: Sequence[MicroLoss], options: LoopOptions, operands: Operands
) -> tuple[Sums, list[PyTree]]:
    # A reference has its cotangent's dtype: for wider sums, differentiate with respect to wider parameters.
    narrow = [x.dtype for x in operands.diff]
    wide = [x.astype(dtype) for x, dtype in zip(operands.diff, options.sum_dtypes, strict=True)]
    start = _start(losses, options, operands)
    refs = [None if m else jax.new_ref(g) for g, m in zip(start.grads, options.is_max, strict=True)]
    maxima = [g if m else None for g, m in zip(start.grads, options.is_max, strict=True)]

    def step(sums, xs, call, num_examples):
        def forward(wide):
            diff = [x.astype(dtype) for x, dtype in zip(wide, narrow, strict=True)]
            return call(diff, xs, sums.carry)

        totals, vjp, (weights, carry, aux) = jax.vjp(forward, wide, has_aux=True)
        # A maximum needs each micro-batch's own value: a reference of its own.
        all_refs = [
            jax.new_ref(jnp.zeros_like(x)) if r is None else r for r, x in zip(refs, wide, strict=True)
        ]
        with_refs: Any = vjp.with_refs  # pyright: ignore[reportFunctionMemberAccess]: typed as a plain callable
        with_refs(all_refs)(_cotangents(operands, totals))
        own = [jax.freeze(new) if r is None else None for r, new in zip(refs, all_refs, strict=True)]
        reduced, stacked = reductions.divide_aux(aux)
        new = _add(sums, Terms(totals, weights), reduced, carry, num_examples)
        return new._replace(grads=_add_grads(sums.grads, own, options)), stacked

    sums, stacked = _scan_groups(step, start._replace(grads=maxima), losses, options, operands)
    grads = [g if r is None else jax.freeze(r) for g, r in zip(sums.grads, refs, strict=True)]
    return sums._replace(grads=grads), stacked


def _scan_groups(
    step: Callable[..., Any],
    state: Any,
    losses: Sequence[MicroLoss],
    options: LoopOptions,
    operands: Operands,
) -> tuple[Any, list[PyTree]]:
    """Scans `step(state, (index, micro-batch), call, num_examples)` over each group in turn."""
    outputs, first = [], 0
    for loss, group, consts in zip(losses, operands.groups, operands.consts, strict=True):

        def call(diff, xs, carry, loss=loss, consts=consts):
            index, micro_batch = xs
            return loss.call(diff, micro_batch, operands.key, index, carry, *consts)

        num_examples, count = size_and_count(group)

        def body(carry, _, first=first, group=group, call=call, num_examples=num_examples):
            i, state = carry  # counted, for a scan over indices would keep them all
            state, output = step(state, (first + i, take(group, i)), call, num_examples)
            return (i + 1, state), output

        counted = (jnp.int32(0), state)
        (_, state), output = lax.scan(body, counted, length=count, unroll=options.unroll)
        outputs.append(output)
        first += count
    return state, outputs


def _start(losses: Sequence[MicroLoss], options: LoopOptions, operands: Operands) -> Sums:
    """The sums over no micro-batch."""
    totals, (weights, carry, aux) = losses[0].structs
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
    if options.skip_nonfinite:  # what a device drops, its sums vary with
        return vary(sums, _axes(sums.terms))
    if options.track_noise_scale:
        num_weighted, sq_norm_sum = vary(
            (sums.num_weighted, sums.sq_norm_sum), _axes((operands.diff, sums.terms))
        )
        return sums._replace(num_weighted=num_weighted, sq_norm_sum=sq_norm_sum)
    return sums


def _axes(tree: PyTree) -> frozenset[str]:
    """The mesh axes that any of these arrays or structs varies over, in someone's own `shard_map`."""
    return frozenset().union(*(varying_axes(x) for x in jax.tree.leaves(tree)))


def _all_finite(tree: PyTree, axes: frozenset[str]) -> jax.Array:
    """Whether all these are finite, on every device that agrees on the sums: they vary over `axes` alone."""
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
    shared = tuple(varying_axes(finite) - axes)
    return lax.pmin(finite.astype(jnp.int32), shared) == 1 if shared else finite


def _cotangents(operands: Operands, totals: Scalars) -> Scalars:
    if operands.cotangents is None:
        return jax.tree.map(jnp.ones_like, totals)
    return vary_like(operands.cotangents, jax.tree.map(jax.typeof, totals))


def _add(sums: Sums, terms: Terms, aux: PyTree, carry: PyTree, num_examples: int) -> Sums:
    """The sums with one more micro-batch, all but the gradients."""
    return sums._replace(
        terms=jax.tree.map(jnp.add, sums.terms, terms),
        num_examples=sums.num_examples + num_examples,
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
    sums: Sums, grads: list[jax.Array], weights: Scalars, num_examples: int, options: LoopOptions
) -> Sums:
    """Adds n_i |g_i|^2, of the micro-batch's mean gradient g_i; its summed gradient is n_i g_i."""
    weight = next(iter(weights.values())) if len(weights) == 1 else jnp.float32(num_examples)
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
