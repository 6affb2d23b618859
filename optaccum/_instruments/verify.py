"""Does this loss, on these devices, accumulate to what the whole batch gives? And if not, why not?"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from optaccum._dtypes import as_summand
from optaccum._instruments.diagnose import diagnose, explain_aux, explain_loop, explain_not_finite
from optaccum._instruments.references import (
    Results,
    Subject,
    make_reference,
    take_micro_batch,
    take_rows,
)
from optaccum._scanning.call import Call, split_call
from optaccum._scanning.data_axes import find_mesh, place_args
from optaccum._scanning.options import Options
from optaccum._scanning.reductions import is_wrapper
from optaccum._scanning.sharded import cast
from optaccum._scanning.split import batch_size_of, num_and_size_of, resolve_num_microbatches
from optaccum._scanning.value_and_grad import value_and_grad

PyTree = Any

# What nearly cancels is compared with this fraction of the whole gradient (or the tolerance of its dtype).
_FLOOR = 1e-2


class VerifyReport(NamedTuple):
    """What `optaccum.verify` found; `str(report)` is a table with the likely cause.

    Attributes:
      ok: whether value, gradients, aux and carry agree within `rtol`.
      max_relative_error: the largest of `value_error` and `leaves`.
      leaves: relative error of each gradient leaf by its key path, of each leaf of aux by "aux" and its key path, of
        the carry by "carry" and its: |accumulated - expected| / |expected| in the 2-norm. |expected| counts for a
        hundredth (16-bit: a twentieth) at least, of the whole gradient's norm for a gradient, or a micro-batch's, and
        of 1 for aux and carry. NaN where one is not finite.
      value_error: relative error of the value.
      value_ratio: accumulated value / expected value.
      rtol: the tolerance.
      num_microbatches: n.
      reference: what they are compared with.
      cause: the likely cause and the way out; empty where ok.
    """

    ok: bool
    max_relative_error: float
    leaves: dict[str, float]
    value_error: float
    value_ratio: float
    rtol: float
    num_microbatches: int
    reference: str
    cause: str

    def raise_if_failed(self) -> None:
        """Raises AssertionError with the report unless ok."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        """The errors, largest first, and the likely cause of a disagreement."""
        verdict = "agree" if self.ok else "DISAGREE"
        lines = [
            f"{self.num_microbatches} micro-batches and {self.reference} {verdict}: "
            f"largest relative error {self.max_relative_error:.1e}, tolerance {self.rtol:.1e}.",
            f"  {'value':<40} {self.value_error:.1e}",
        ]
        worst = sorted(self.leaves.items(), key=lambda item: -_order(item[1]))
        lines += [f"  {path or 'gradient':<40} {error:.1e}" for path, error in worst[:8]]
        if len(worst) > 8:
            lines.append(f"  ... and {len(worst) - 8} leaves with smaller errors")
        if self.cause:
            lines.append(f"Likely cause: {self.cause}")
        return "\n".join(lines)


def verify(
    loss_fn: Callable[..., Any], *args: Any, rtol: float | None = None, **value_and_grad_options: Any
) -> VerifyReport:
    """Compares what `value_and_grad` accumulates with the whole batch's value, gradients and aux.

    Both are computed on the arguments' own devices, dtypes and mesh, so a report covers the model, the options and the
    compiler. A carry, `Last` and `Stack`, and with `presplit` everything, are compared with the same micro-batches in a
    Python loop. Where they disagree, further evaluations of the loss (on repeated, mixed and reordered parts of the
    batch, with another key, with the state of the next micro-batch) tell why.

    Args:
      loss_fn: as for :func:`value_and_grad`.
      *args: its positional arguments, with a batch that fits the memory whole. Keyword arguments of `loss_fn` have to
        be bound to it (`functools.partial`).
      rtol: relative tolerance, >= 0. None: what rounding may do, from the dtypes that the loss computes in: 5e-2 with
        bf16 or narrower, 1e-2 with f16, 1e-4 with f32 on CPU (on GPUs 1e-2 and on TPUs 5e-2, whose matrix units round
        float32 unless `jax_default_matmul_precision` says otherwise), 1e-9 with f64; plus sqrt(n) roundings of the
        accumulator.
      **value_and_grad_options: as for :func:`value_and_grad`.

    Returns:
      A report: `report.ok`, `report.max_relative_error`, `report.leaves`, `str(report)`, `report.raise_if_failed()`.

    Raises:
      ValueError, TypeError: for a negative tolerance, and what :func:`value_and_grad` raises for these arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaccum
      >>> x = jnp.arange(8.0)
      >>> optaccum.verify(lambda w, x: jnp.mean(w * x), 2.0, x, num_microbatches=4).ok
      True
      >>> report = optaccum.verify(lambda w, x: jnp.sum(w * x), 2.0, x, num_microbatches=4)
      >>> report.ok, report.value_ratio
      (False, 0.25)
    """
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"expected rtol to be None or a number >= 0; got {rtol!r}.")
    grad_fn: Any = value_and_grad(loss_fn, **value_and_grad_options)
    options = grad_fn.options
    subject, call = _subject(loss_fn, options, args)
    n = _num_microbatches(options, call.batch)
    out, grads, *_ = grad_fn(*args)
    value, carry, aux = subject.unpack(out)
    accumulated = Results(value, grads, carry, aux).by_path()
    jaxpr, aux_like = _trace(subject, call)
    reference = make_reference(subject, call, n, aux_like)
    expected = {
        path: jax.device_put(x, accumulated[path].sharding)  # they may be laid out in different ways
        for path, x in reference.expected.items()
        if x.shape == accumulated[path].shape  # not rows on another axis, of a loss that names a mesh axis
    }

    compute = _compute_tolerance(jaxpr)
    eps = max(float(jnp.finfo(g.dtype).eps) for g in jax.tree.leaves(grads))
    tolerance = compute + n**0.5 * eps if rtol is None else float(rtol)
    sizes = _norms(expected)
    distances = _distances({path: accumulated[path] for path in expected}, expected)
    least = _least_sizes([sizes], call.diff, max(_FLOOR, compute))
    errors = {path: _ratio(distances[path], sizes[path], least[path]) for path in sizes}
    if not max(errors.values(), key=_order) <= tolerance and not options.presplit:
        # Does it only cancel over the whole batch? One micro-batch's size tells.
        part = reference.results_of(take_micro_batch(call, 0, n, reference.num_devices)).by_path()
        least = _least_sizes([sizes, _norms(part)], call.diff, max(_FLOOR, compute))
        errors = {path: _ratio(distances[path], sizes[path], least[path]) for path in sizes}
    worst = max(errors.values(), key=_order)
    cause = ""
    if math.isnan(worst):
        cause = explain_not_finite(not any(map(math.isnan, sizes.values())))
    elif worst > tolerance:
        wrong = {path for path, error in errors.items() if error > tolerance and not _is_beside(path)}
        path = max(errors, key=errors.__getitem__)
        wrapper = _wrapper_of(path, aux_like)
        if wrong and not options.presplit:
            # A value rounds far less than a gradient.
            resolution = compute / 20 * max(sizes["value"], least["value"])
            cause = diagnose(reference, call, n, resolution=resolution, value_agrees="value" not in wrong)
        elif options.presplit or path.startswith("carry") or wrapper in ("Last", "Stack"):
            cause = explain_loop(path or "the gradient")
        else:
            ratio = float(jnp.sum(accumulated[path]) / jnp.sum(expected[path]))
            cause = explain_aux(path, wrapper, ratio, n, batch_size_of(call.batch))
    return VerifyReport(
        ok=worst <= tolerance,
        max_relative_error=worst,
        leaves={path: error for path, error in errors.items() if path != "value"},
        value_error=errors["value"],
        value_ratio=float(value) / float(expected["value"]) if sizes["value"] else float("nan"),
        rtol=tolerance,
        num_microbatches=n,
        reference="the same in a Python loop" if options.presplit else "the whole batch",
        cause=cause,
    )


def _subject(loss_fn: Callable[..., Any], options: Options, args: tuple[Any, ...]) -> tuple[Subject, Call]:
    """The loss and its call, with parameters as it sees them: whole, in the dtype that they are gathered in."""
    call, layout = split_call(options.roles, args, {})
    mesh = find_mesh(call, options.data_axes) if options.data_axes else None
    diff = jax.tree.map(lambda x: cast(x, options.gather_dtype), call.diff)
    if mesh is not None:
        diff = place_args(diff, PartitionSpec(), mesh, options.data_axes)
    return Subject(loss_fn, options, layout, mesh), call._replace(diff=diff)


def _num_microbatches(options: Options, batch: PyTree) -> int:
    if options.presplit:
        return num_and_size_of(batch)[0]
    sizes = options.num_microbatches, options.microbatch_size
    return resolve_num_microbatches(batch_size_of(batch), *sizes)


def _trace(subject: Subject, call: Call) -> tuple[str, PyTree]:
    """The jaxpr of the loss on one device's rows, and its aux, wrappers and all."""
    batch = jax.tree.map(lambda x: x[0], call.batch) if subject.options.presplit else call.batch
    call = call._replace(batch=batch)
    call = take_rows(call, np.arange(batch_size_of(batch) // math.prod(subject.axis_sizes.values())))
    axis_env = list(subject.axis_sizes.items())
    jaxpr, (_, _, aux) = jax.make_jaxpr(subject.loss, axis_env=axis_env, return_shape=True)(call)
    return str(jaxpr), aux


def _is_beside(path: str) -> bool:
    """Whether this is of the aux or the carry, rather than of the loss."""
    return path.startswith(("aux", "carry"))


def _wrapper_of(path: str, aux: PyTree) -> str:
    """The name of the wrapper that holds a leaf of aux; empty for a bare leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(aux, is_leaf=is_wrapper)
    names = {"aux" + jax.tree_util.keystr(path): type(x).__name__ for path, x in leaves if is_wrapper(x)}
    return next((name for start, name in names.items() if path.startswith(start)), "")


def _compute_tolerance(jaxpr: str) -> float:
    """What rounding in the coarsest dtype that the loss computes in may do."""
    dtypes = set(re.findall(r"\b(bf16|f\d+)(?:_\w+)?\[", jaxpr))
    if dtypes & {"bf16", "f8", "f4"}:
        return 5e-2
    if "f16" in dtypes:
        return 1e-2
    if "f32" not in dtypes:
        return 1e-9
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if precision in ("float32", "highest"):
        return 1e-4
    return {"cpu": 1e-4, "tpu": 5e-2}.get(jax.default_backend(), 1e-2)


def _least_sizes(sources: Sequence[dict[str, float]], diff: PyTree, fraction: float) -> dict[str, float]:
    """What each array counts for at least, however much of it cancels, seen from these sizes."""
    gradients = [
        math.hypot(*(size for path, size in sizes.items() if path != "value" and not _is_beside(path)))
        for sizes in sources
    ]
    gradient, params = max(gradients), math.hypot(*_norms(dict(enumerate(jax.tree.leaves(diff)))).values())
    value = max([gradient * params, *(sizes["value"] for sizes in sources[1:])])
    least = {path: 1.0 if _is_beside(path) else gradient for path in sources[0]} | {"value": value}
    return {path: fraction * size for path, size in least.items()}


def _norms(arrays: dict[Any, jax.Array]) -> dict[Any, float]:
    """|x| in the 2-norm, without underflow or overflow; NaN where x is not finite."""
    return {path: float(size) for path, size in _jitted_norms(arrays).items()}


def _distances(arrays: dict[str, jax.Array], others: dict[str, jax.Array]) -> dict[str, float]:
    return {path: float(size) for path, size in _jitted_distances(arrays, others).items()}


@jax.jit
def _jitted_norms(arrays: PyTree) -> PyTree:
    def norm(x):
        size = jnp.abs(_as_inexact(x))
        largest = jnp.max(size, initial=0)
        return largest * jnp.sqrt(jnp.sum(jnp.square(size / jnp.where(largest > 0, largest, 1))))

    return jax.tree.map(norm, arrays)


@jax.jit
def _jitted_distances(arrays: PyTree, others: PyTree) -> PyTree:
    return _jitted_norms(jax.tree.map(lambda x, y: _as_inexact(x) - _as_inexact(y), arrays, others))


def _as_inexact(x: jax.Array) -> jax.Array:
    x = as_summand(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def _ratio(difference: float, size: float, least: float) -> float:
    if math.isnan(difference) or math.isnan(size):
        return float("nan")
    if not (size := max(size, least)):
        return 0.0 if difference == 0 else float("inf")
    return difference / size


def _order(error: float) -> float:
    """Sorts NaN above everything."""
    return float("inf") if math.isnan(error) else error
