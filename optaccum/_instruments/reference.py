"""What accumulated results are compared with: micro-batches in a Python loop; the whole batch is a loop of one."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from optaccum._dtypes import as_summand
from optaccum._loss import WeightedMean, loss_terms
from optaccum._scanning.call import Call, fold_in, join_call, split_call
from optaccum._scanning.data_axes import find_mesh, over_devices, place_args
from optaccum._scanning.micro_loss import unpack
from optaccum._scanning.options import Options
from optaccum._scanning.reductions import Last, Max, Min, Stack, Sum, is_wrapper, map_wrappers
from optaccum._scanning.sharded import cast
from optaccum._scanning.split import batch_size_of, num_and_size_of, resolve_num_microbatches, unshard_rows

PyTree = Any

_REDUCTIONS = {Sum: np.sum, Max: np.max, Min: np.min, Last: lambda x, axis: x[-1]}


class Loop(NamedTuple):
    """A Python loop over micro-batches of one size, which devices take whole, or each its own rows of."""

    options: Options
    num_devices: int  # that have rows of their own; 1 where none has
    step: Any  # `_step`, jitted

    def args(self, call: Call, batch: PyTree) -> tuple[PyTree, PyTree]:
        """Those of the first step."""
        carry = jax.tree.map(lambda x: jnp.stack([x] * self.num_devices), call.carry)
        return (batch, carry), (jnp.int32(0), jnp.bool_(True), call._replace(batch=(), carry=()))

    def results_of(
        self, call: Call, batches: Sequence[PyTree], count: int | None = None, *, with_grads: bool = True
    ) -> dict[str, Any]:
        """Those of the first `count` micro-batches, by path; of aux only Last and Stack where sizes may differ."""
        (_, carry), (*_, others) = self.args(call, ())
        structure, is_max = _kinds(self.options, call)
        sums, parts = {}, []
        for index, batch in enumerate(batches):
            runs = count is None or index < count
            args = (batch, carry), (jnp.int32(index), jnp.bool_(runs), others)
            new, (carry, *part) = self.step(with_grads, *args)
            new, (aux, kept) = jax.tree.map(as_numpy, (new, part))
            both = {name: zip(is_max, sums[name], new[name], strict=False) for name in sums}
            sums = {n: [np.maximum(a, b) if m else a + b for m, a, b in xs] for n, xs in both.items()} or new
            if len(batches) > 1 and not self.options.presplit:
                aux = map_wrappers(lambda x: x if isinstance(x, Last | Stack) else None, aux)
            parts.append((aux if runs else jax.tree.map(np.zeros_like, aux), kept))
        aux, kept = jax.tree.map(lambda *xs: np.stack(xs, 1), *parts)
        by_term = zip(is_max, *sums.values(), strict=False)  # maxima are alike in every term
        weights = [weight for _, weight, *_ in sums.values()]
        value, _, *grads = [xs[0] if m else sum(map(_ratio, xs, weights)) for m, *xs in by_term]
        carry = jax.tree.map(functools.partial(_over_devices, self.options.skip_nonfinite), carry)
        aux = map_wrappers(functools.partial(_combine, kept.astype(bool), self.options.presplit), aux)
        return by_path(value, structure.unflatten(grads) if with_grads else (), carry, aux)


def make_loop(loss: Callable[[Call], Any], options: Options, mesh: Any, axes: tuple[str, ...]) -> Loop:
    """A loop that gives each device along these axes of the mesh its own rows; `loss` returns what `unpack` does."""

    @functools.partial(jax.jit, static_argnums=0)
    def step(with_grads, own, others):
        on_one_device = functools.partial(_step, loss, options, axes, with_grads)
        return (over_devices(on_one_device, mesh, axes, 0) if axes else on_one_device)(own, others)

    return Loop(options, math.prod(mesh.shape[axis] for axis in axes), step)


def _step(loss: Any, options: Options, axes: tuple[str, ...], with_grads: bool, own: Any, others: Any) -> Any:
    """One micro-batch on one device.

    From (batch, carry) and (the micro-batch's index, whether it counts, call): each term's [total, weight, *gradients],
    summed over devices, and (carry, aux, whether it counts). Carry, aux and the last lead with this one device.
    """
    (batch, carry), (index, kept, call) = own, others
    carry, key = jax.tree.map(lambda x: x[0], carry), fold_in(call.key, index)
    key = fold_in(key, lax.axis_index(axes)) if axes else key

    def totals_of(diff):
        value, *beside = loss(call._replace(diff=diff, batch=batch, key=key, carry=carry))
        terms = loss_terms(value, 1.0)  # wherever they are added up, micro-batches are of one size
        return {name: term.total for name, term in terms.items()}, (terms, *beside)

    totals, pull_back, (terms, new_carry, aux) = jax.vjp(totals_of, call.diff, has_aux=True)
    sums = {name: [term.total, term.weight] for name, term in terms.items()}
    for name in sums if with_grads else ():
        cotangents = {other: jnp.full_like(total, other == name) for other, total in totals.items()}
        sums[name] += jax.tree.leaves(pull_back(cotangents))
    if options.skip_nonfinite:
        kept &= jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(sums)]).all()
    sums = jax.tree.map(lambda x: jnp.where(kept, as_summand(x), 0), sums)
    if axes:
        reduce = [lax.pmax if m else lax.psum for m in _kinds(options, call)[1]]
        sums = {name: [fn(x, axes) for fn, x in zip(reduce, xs, strict=False)] for name, xs in sums.items()}
    new_carry = jax.tree.map(lambda new, old: jnp.where(kept, new, old), new_carry, carry)
    return sums, jax.tree.map(lambda x: jnp.asarray(x)[None], (new_carry, aux, kept))


def _kinds(options: Options, call: Call) -> tuple[Any, list[bool]]:
    """The gradients' structure; and of [total, weight, *gradients] which are reduced to their maximum."""
    reduction_fn = options.grad_reduction_fn or (lambda path, leaf: "mean")
    leaves, structure = jax.tree.flatten_with_path(call.diff[0] if options.one_argnum else call.diff)
    return structure, [False, False, *(reduction_fn(*leaf) == "max" for leaf in leaves)]


def _over_devices(skips: bool, x: jax.Array) -> np.ndarray:
    """A carry's leaf, from shape (devices, ...): integers, which ought to be alike, are the last device's."""
    each = as_numpy(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return each.mean(axis=0)
    return each.max(axis=0) if skips else each[-1]


def _combine(kept: np.ndarray, presplit: bool, x: Any) -> Any:
    """A leaf of aux, from shape (devices, micro-batches, ...)."""
    if isinstance(x, WeightedMean):
        weight = x.weight[kept].sum(axis=0)
        return jax.tree.map(lambda total: _ratio(total[kept].sum(axis=0), weight), x.total)
    if isinstance(x, Stack):
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x.value)
    if is_wrapper(x):
        if not kept.any() and not isinstance(x, Sum):  # of nothing there is no maximum, and Last is zeros
            return jax.tree.map(lambda leaf: np.zeros(leaf.shape[2:]), x.value) if isinstance(x, Last) else None
        return jax.tree.map(lambda leaf: _REDUCTIONS[type(x)](leaf[kept], axis=0), x.value)
    if x.ndim == 2:
        return x[kept].mean()
    rows = x.swapaxes(0, 1)
    rows = rows.reshape(len(rows), -1, *rows.shape[3:])
    return rows if presplit else rows[0]


def _ratio(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.where(weight != 0, total / np.where(weight != 0, weight, 1), 0)


def by_path(value: Any, grads: PyTree, carry: PyTree, aux: PyTree) -> dict[str, Any]:
    """Arrays by name: "value", a gradient leaf's key path, and "carry" or "aux" with one."""
    trees = {"": grads, "carry": carry, "aux": aux}
    return {"value": value} | {
        name + jax.tree_util.keystr(path): leaf
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def is_beside(path: str) -> bool:
    """Whether this is of the aux or the carry, rather than of the loss."""
    return path.startswith(("aux", "carry"))


def as_numpy(x: Any) -> np.ndarray:
    """An array on the host, in float64 or complex128; of PRNG keys their data."""
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)


@jax.jit
def take_rows(batch: PyTree, rows: jax.typing.ArrayLike) -> PyTree:
    """These rows, in this order."""
    return jax.tree.map(lambda x: unshard_rows(x)[rows], batch)


class Reference(NamedTuple):
    """What to compare with, and what a disagreement is looked into with."""

    loop: Loop  # that took the whole batch
    call: Call
    n: int  # micro-batches
    jaxpr: str  # of the loss and its gradients
    expected: dict[str, np.ndarray]  # by path
    in_loop: frozenset[str]  # the paths of what all micro-batches gave; the rest is the whole batch's

    def micro_batch(self, i: int, num_devices: int = 1) -> PyTree:
        """`rows[i::n]` of each device's rows."""
        by_device = np.arange(batch_size_of(self.call.batch)).reshape(num_devices, -1)
        return take_rows(self.call.batch, by_device[:, i :: self.n].ravel())


def make_reference(loss_fn: Callable[..., Any], options: Options, args: tuple[Any, ...]) -> Reference:
    """What the results of a call are to be compared with."""
    call, layout = split_call(options.roles, args, {})
    # Parameters as the loss sees them: whole, in the dtype that they are gathered in.
    mesh, diff = None, jax.tree.map(lambda x: cast(x, options.gather_dtype), call.diff)
    if options.data_axes:
        mesh = find_mesh(call, options.data_axes)
        diff = place_args(diff, PartitionSpec(), mesh, options.data_axes)
    call = call._replace(diff=diff)

    def loss(call):
        # Rebuilt where it is used: an NNX Variable can be written to in no other trace than that which made it.
        args, kwargs = join_call(layout, jax.tree.map(lambda x: x, call))
        return unpack(loss_fn(*args, **kwargs), options)

    loop = make_loop(loss, options, mesh, options.data_axes)
    if options.presplit:
        n, _ = num_and_size_of(call.batch)
        batches = [jax.tree.map(lambda x, i=i: x[i], call.batch) for i in range(n)]
        counted = options.roles.limit is not None
        call = call._replace(limit=jnp.minimum(call.limit, n)) if counted else call
        expected = loop.results_of(call, batches, int(call.limit) if counted else None)
        jaxpr = loop.step.trace(True, *loop.args(call, batches[0])).jaxpr
        return Reference(loop, call, n, str(jaxpr), expected, frozenset(expected))

    rows = batch_size_of(call.batch) // loop.num_devices
    n = resolve_num_microbatches(rows, options.num_microbatches, options.microbatch_size)
    at_once = options._replace(skip_nonfinite=False)  # of one that is dropped nothing is left to compare with
    # JAX may find no layout for rows that are spread over an Explicit mesh; the loss may name a data axis.
    for is_spread, axes in (True, ()), (False, ()), (True, options.data_axes):
        batch = call.batch if is_spread else take_rows(call.batch, np.arange(batch_size_of(call.batch)))
        whole = make_loop(loss, at_once, mesh, axes)
        try:
            traced = whole.step.trace(True, *whole.args(call, batch))
            break
        except Exception as error:
            reason = error
    else:
        raise reason
    call = call._replace(batch=batch)
    expected = whole.results_of(call, [call.batch])
    reference = Reference(whole, call, n, str(traced.jaxpr), expected, frozenset())
    _, (_, aux, _) = traced.out_info
    stacked = any(isinstance(x, Last | Stack) for x in jax.tree.leaves(aux, is_leaf=is_wrapper))
    if not stacked and not jax.tree.leaves(call.carry):
        return reference
    batches = [reference.micro_batch(i, loop.num_devices) for i in range(n)]
    results = loop.results_of(call, batches, with_grads=options.skip_nonfinite)
    of_all = {path: x for path, x in results.items() if is_beside(path)}
    return reference._replace(expected=expected | of_all, in_loop=frozenset(of_all))
