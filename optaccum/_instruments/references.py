"""What accumulated results are compared with: the whole batch's, and the same micro-batches' in a Python loop."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaccum._dtypes import as_summand
from optaccum._loss import WeightedMean, loss_terms, loss_value, ratio
from optaccum._scanning.call import Call, Layout, join_call
from optaccum._scanning.data_axes import over_devices
from optaccum._scanning.options import Options
from optaccum._scanning.reductions import Last, Max, Min, Stack, Sum, is_wrapper, map_wrappers
from optaccum._scanning.split import batch_size_of, unshard_rows

PyTree = Any

_REDUCTIONS = {Sum: jnp.sum, Max: jnp.max, Min: jnp.min, Last: lambda x, axis: x[-1]}


class Results(NamedTuple):
    """What a loss gives on a batch."""

    value: jax.Array
    grads: PyTree
    carry: PyTree
    aux: PyTree

    def by_path(self) -> dict[str, jax.Array]:
        """Its arrays by name: "value", a gradient leaf's key path, and "carry" or "aux" with one."""
        trees = {"": self.grads, "carry": self.carry, "aux": self.aux}
        return {"value": self.value} | {
            name + jax.tree_util.keystr(path): as_numbers(leaf)
            for name, tree in trees.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }


class Subject(NamedTuple):
    """A loss function, and how it is called."""

    loss_fn: Callable[..., Any]
    options: Options
    layout: Layout
    mesh: Any  # that which has the data axes; None without

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Of the data axes."""
        return {axis: self.mesh.shape[axis] for axis in self.options.data_axes}

    def loss(self, call: Call) -> tuple[Any, PyTree, PyTree]:
        """(loss, carry, aux) of a call, wrappers and all."""
        args, kwargs = join_call(self.layout, call)
        return self.unpack(self.loss_fn(*args, **kwargs))

    def unpack(self, out: Any) -> tuple[Any, PyTree, PyTree]:
        """(loss, carry, aux) of what the loss, or its value with aux, is."""
        loss, aux = out if self.options.has_aux else (out, ())
        if self.options.roles.carry is None:
            return loss, (), aux
        return loss, *aux


def as_numbers(x: Any) -> jax.Array:
    """An array; the data of PRNG keys."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.asarray(x)


class Reference(NamedTuple):
    """What to compare with, and what a disagreement is looked into with."""

    expected: dict[str, jax.Array]  # by path
    value_of: Callable[[Call], Results]  # of any call, its value and carry
    results_of: Callable[[Call], Results]
    num_devices: int  # they give each of so many devices its own rows


def take_rows(call: Call, rows: np.ndarray) -> Call:
    """A call with these rows of its batch, in this order."""
    return call._replace(batch=_take_rows(call.batch, rows))


@jax.jit
def _take_rows(batch: PyTree, rows: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: unshard_rows(x)[rows], batch)


def take_micro_batch(call: Call, i: int, n: int, num_devices: int) -> Call:
    """A call with micro-batch i, `rows[i::n]` of each device's rows."""
    by_device = np.arange(batch_size_of(call.batch)).reshape(num_devices, -1)
    return take_rows(call, by_device[:, i::n].ravel())


def make_reference(subject: Subject, call: Call, n: int, aux_like: PyTree) -> Reference:
    """What the results of a call in n micro-batches are to be compared with; `aux_like` has the wrappers."""
    options, num_devices = subject.options, math.prod(subject.axis_sizes.values())
    loop = _python_loop(subject, with_grads=True)
    value_of, results_of = _whole_batch(subject)
    if options.presplit:
        micro_batches = [jax.tree.map(lambda x, i=i: x[i], call.batch) for i in range(n)]
        limit = n if options.roles.limit is None else min(max(int(call.limit), 0), n)
        return Reference(loop(call, micro_batches, limit).by_path(), value_of, results_of, num_devices)
    try:
        jax.eval_shape(results_of, call)
        reference = Reference({}, value_of, results_of, 1)
    except Exception as error:
        # It names a data axis, or JAX finds no layout on an Explicit mesh (an exception whose type is not public).
        if not subject.axis_sizes or type(error).__name__ not in ("NameError", "ShardingTypeError"):
            raise

        def on_each_device(call):
            return loop(call, [call.batch], 1)

        reference = Reference({}, on_each_device, on_each_device, num_devices)
    results = reference.results_of(call)._replace(carry=())
    stacked = any(isinstance(x, Last | Stack) for x in jax.tree.leaves(aux_like, is_leaf=is_wrapper))
    beside = {}
    if stacked or jax.tree.leaves(call.carry):
        micro_batches = [take_micro_batch(call, i, n, num_devices).batch for i in range(n)]
        beside = _python_loop(subject, with_grads=options.skip_nonfinite)(call, micro_batches, n)
        beside = beside._replace(grads=()).by_path()
        beside.pop("value")
    return reference._replace(expected=results.by_path() | beside)


def _whole_batch(subject: Subject) -> tuple[Callable[[Call], Results], Callable[[Call], Results]]:
    """Functions of a call: its value and carry, and all its results, as JAX gives them; the key is micro-batch 0's."""
    compiled = set()  # sizes for which the value need not be compiled once more

    def of_diff(diff, call):
        key = jax.tree.map(lambda key: jax.random.fold_in(key, 0), call.key)
        loss, carry, aux = subject.loss(call._replace(diff=diff, key=key))
        value = loss_value(loss_terms(loss, 1.0))
        return value, Results(value, (), carry, map_wrappers(_whole_value, aux))

    gradient_of = jax.jit(jax.grad(of_diff, has_aux=True))
    just_value_of = jax.jit(lambda call: of_diff(call.diff, call)[1])

    def results_of(call):
        compiled.add(batch_size_of(call.batch))
        grads, results = gradient_of(call.diff, call._replace(diff=()))
        return results._replace(grads=grads[0] if subject.options.one_argnum else grads)

    def value_of(call):
        return results_of(call) if batch_size_of(call.batch) in compiled else just_value_of(call)

    return value_of, results_of


def _whole_value(wrapper: Any) -> Any:
    """What a leaf of aux comes back as from one micro-batch; None where that says nothing of several."""
    if isinstance(wrapper, WeightedMean):
        return jax.tree.map(lambda total: ratio(as_summand(total), as_summand(wrapper.weight)), wrapper.total)
    if isinstance(wrapper, Last | Stack):
        return None
    return wrapper.value if is_wrapper(wrapper) else wrapper


def _python_loop(subject: Subject, *, with_grads: bool) -> Callable[[Call, Sequence[PyTree], int], Results]:
    """A function of a call, its micro-batches and how many of them count: their results, one after the other.

    With `data_axes` each device takes its own rows of each. Where several micro-batches are the library's, and may
    differ in size, only what `Last` and `Stack` hold is kept of aux.
    """
    options = subject.options
    on_one_device = functools.partial(_on_one_device, subject, with_grads)
    if subject.axis_sizes:
        mapped = over_devices(
            lambda *args: ((), on_one_device(*args)), subject.mesh, options.data_axes, batch_axis=0
        )
        step = jax.jit(lambda *args: mapped(*args)[1])
    else:
        step = jax.jit(on_one_device)

    def results_of(call, micro_batches, count):
        num_devices = math.prod(subject.axis_sizes.values())
        is_max = _is_max(options, call.diff)
        add = jax.jit(lambda grads, new: {name: _add(grads[name], new[name], is_max) for name in new})
        carry = jax.tree.map(lambda x: jnp.stack([x] * num_devices), call.carry)
        grads: dict[str, PyTree] = {}
        parts, others = [], call._replace(batch=(), carry=())
        for index, batch in enumerate(micro_batches):
            new, carry, (terms, aux, kept) = step(
                (batch, carry), (jnp.int32(index), jnp.int32(count), others)
            )
            grads = add(grads, new) if grads else new
            if len(micro_batches) > 1 and not options.presplit:
                aux = map_wrappers(lambda x: x if isinstance(x, Last | Stack) else None, aux)
            parts.append(jax.tree.map(lambda x: np.asarray(as_numbers(x)), (terms, aux, kept)))
        terms, aux, kept = jax.tree.map(lambda *xs: np.stack(xs, 1), *parts)
        which = np.nonzero(kept)  # device by device

        @jax.jit
        def combine(grads, carry, terms, aux):
            terms = {name: jax.tree.map(lambda x: _total(x, which), term) for name, term in terms.items()}
            grads = _divide(grads, terms, is_max) if grads else ((),)
            return Results(
                value=loss_value(terms),
                grads=grads[0] if options.one_argnum else grads,
                carry=jax.tree.map(functools.partial(_of_all_devices, options.skip_nonfinite), carry),
                aux=map_wrappers(functools.partial(_of_all, which, count, options.presplit), aux),
            )

        return combine(grads, carry, terms, aux)

    return results_of


def _on_one_device(subject: Subject, with_grads: bool, batch_and_carry: Any, others: Any) -> Any:
    """Terms, the gradient of each, carry, aux, and whether all that counts; leaves lead with this one device."""
    (batch, carry), (index, count, call), options = batch_and_carry, others, subject.options
    carry, key = jax.tree.map(lambda x: x[0], carry), call.key
    for i in (index, *([jax.lax.axis_index(options.data_axes)] if options.data_axes else [])):
        key = jax.tree.map(lambda key, i=i: jax.random.fold_in(key, i), key)

    def totals_of(diff):
        loss, new_carry, aux = subject.loss(call._replace(diff=diff, batch=batch, key=key, carry=carry))
        terms = loss_terms(loss, float(batch_size_of(batch)))
        return {name: term.total for name, term in terms.items()}, (terms, new_carry, aux)

    if with_grads:
        totals, pull_back, (terms, new_carry, aux) = jax.vjp(totals_of, call.diff, has_aux=True)
        zeros = jax.tree.map(jnp.zeros_like, totals)
        grads = {name: pull_back(zeros | {name: jnp.ones_like(zeros[name])})[0] for name in totals}
    else:
        grads, (_, (terms, new_carry, aux)) = {}, totals_of(call.diff)
    kept = index < count
    if options.skip_nonfinite:
        kept &= jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves((terms, grads))]).all()
    new_carry = jax.tree.map(lambda new, old: jnp.where(kept, new, old), new_carry, carry)
    grads = jax.tree.map(lambda g: jnp.where(kept, as_summand(g), 0), grads)
    return jax.tree.map(lambda x: jnp.asarray(x)[None], (grads, new_carry, (terms, aux, kept)))


def _is_max(options: Options, diff: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    """For each leaf whether its gradients are reduced to their maximum."""

    def is_max(path, leaf):
        return options.grad_reduction_fn is not None and options.grad_reduction_fn(path, leaf) == "max"

    tree = jax.tree_util.tree_map_with_path(is_max, diff[0] if options.one_argnum else diff)
    return (tree,) if options.one_argnum else tree


def _add(grads: PyTree, new: PyTree, is_max: PyTree) -> PyTree:
    return jax.tree.map(lambda g, x, m: jnp.maximum(g, x) if m else g + x, grads, new, is_max)


def _divide(grads: dict[str, PyTree], terms: dict[str, WeightedMean], is_max: PyTree) -> PyTree:
    """Each term's gradients, of shape (devices, ...), over its weight, added up; maxima are alike in every term."""

    def divide(largest, *by_term):
        if largest:
            return jnp.max(by_term[0], axis=0)
        means = [
            ratio(jnp.sum(g, axis=0), terms[name].weight) for name, g in zip(grads, by_term, strict=True)
        ]
        return functools.reduce(jnp.add, means)

    return jax.tree.map(divide, is_max, *grads.values())


def _total(x: jax.Array, which: Any) -> jax.Array:
    return jnp.sum(as_summand(x[which]), axis=0)


def _of_all_devices(skips: bool, x: jax.Array) -> jax.Array:
    """A carry's leaf, from shape (devices, ...): one that is not alike, if there is one that has to be."""
    x = unshard_rows(as_numbers(x))
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.mean(as_summand(x), axis=0)
    if skips and x.dtype != jnp.bool_:
        return jnp.max(x, axis=0)
    return x[jnp.argmax((x != x[0]).reshape(len(x), -1).any(axis=1))]


def _of_all(which: Any, count: int, presplit: bool, x: Any) -> Any:
    """A leaf of aux, from shape (devices, micro-batches, ...); those at the indices `which` are kept."""

    def ran(x):
        return jnp.where((np.arange(x.shape[1]) < count).reshape(-1, *(1,) * (x.ndim - 2)), x, 0)

    if isinstance(x, WeightedMean):
        return jax.tree.map(lambda leaf: ratio(_total(leaf, which), _total(x.weight, which)), x.total)
    if isinstance(x, Stack):
        return jax.tree.map(lambda leaf: ran(leaf).reshape(-1, *leaf.shape[2:]), x.value)
    if is_wrapper(x):
        return jax.tree.map(lambda leaf: _REDUCTIONS[type(x)](as_summand(leaf[which]), axis=0), x.value)
    if x.ndim == 2:
        return _total(x, which) / len(which[0])
    rows = ran(x).swapaxes(0, 1)
    rows = rows.reshape(rows.shape[0], -1, *rows.shape[3:])
    return rows if presplit else rows[0]
