"""Does this loss, on these devices, accumulate to what the whole batch gives? And if not, why not?"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaccum._instruments.diagnose import explain
from optaccum._instruments.reference import as_numpy, by_path, is_beside, make_reference
from optaccum._scanning.micro_loss import unpack
from optaccum._scanning.value_and_grad import value_and_grad

# What nearly cancels is compared with this fraction of the whole gradient (or the tolerance of its dtype).
_FLOOR = 1e-2
_STEP = 1 / 16  # by how much of themselves parameters are moved


class VerifyReport(NamedTuple):
    """What `optaccum.verify` found; `str(report)` is a table with the likely cause.

    Attributes:
      ok: whether value, gradients, aux and carry agree within `rtol`.
      max_relative_error: the largest of `value_error` and `leaves`.
      leaves: |accumulated - expected| / |expected|, in the 2-norm, of each leaf of the gradient by its key path, of aux
        and carry by "aux" or "carry" and it; NaN where one is not finite (there: and not the same infinity). What
        nearly cancels counts for a hundredth (16-bit: a twentieth) of the whole gradient, aux and carry of 1.
      value_error: relative error of the value.
      rtol: the tolerance.
      num_microbatches: n.
      reference: what they are compared with.
      cause: the likely cause and the way out; empty where ok.
    """

    ok: bool
    max_relative_error: float
    leaves: dict[str, float]
    value_error: float
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
        worst = sorted(self.leaves.items(), key=lambda item: -math.inf if math.isnan(item[1]) else -item[1])
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
    Python loop. Where they disagree, the loss on other parts of the batch, with another key and carry, tells why.

    Args:
      loss_fn: as for :func:`value_and_grad`.
      *args: its positional arguments, with a batch that fits the memory whole. Keyword arguments of `loss_fn` have to
        be bound to it (`functools.partial`).
      rtol: relative tolerance, >= 0. None: what rounding may do, by the coarsest dtype that the loss computes in: 5e-2
        with bf16 or narrower, 1e-2 with f16, 1e-4 with f32 on CPU (on GPUs 1e-2 and on TPUs 5e-2, which multiply
        matrices in less unless `jax_default_matmul_precision` says otherwise), 1e-9 with f64; plus sqrt(n) roundings
        of the accumulator.
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
      >>> report.ok, report.max_relative_error, report.cause[:17]
      (False, 0.75, 'the loss is a sum')
    """
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"expected rtol to be None or a number >= 0; got {rtol!r}.")
    grad_fn: Any = value_and_grad(loss_fn, **value_and_grad_options)
    out, grads, *_ = grad_fn(*args)
    value, carry, aux = unpack(out, grad_fn.options)
    reference = make_reference(loss_fn, grad_fn.options, args)
    compute = _compute_tolerance(reference.jaxpr)
    eps = max(float(jnp.finfo(g.dtype).eps) for g in jax.tree.leaves(grads))
    tolerance = compute + reference.n**0.5 * eps if rtol is None else float(rtol)

    accumulated = by_path(value, grads, carry, aux)
    pairs = {
        path: _without_same_infinities(path, accumulated[path], x)
        for path, x in reference.expected.items()
        if x.shape == accumulated[path].shape  # not rows on another axis, of a loss that names a mesh axis
    }
    distances = {path: _norm(*pair) for path, pair in pairs.items()}
    norms = {path: _norm(x) for path, (_, x) in pairs.items()}
    params = math.hypot(*map(_norm, jax.tree.leaves(reference.call.diff)))

    def compare(gradient):
        """Errors, and the sizes that they are relative to, where the whole gradient counts for this much."""
        least = {"value": gradient * params} | {path: 1.0 for path in norms if is_beside(path)}
        sizes = {path: max(x, max(_FLOOR, compute) * least.get(path, gradient)) for path, x in norms.items()}
        return {path: _ratio(x, sizes[path]) for path, x in distances.items()}, sizes

    def agree(errors):
        return np.max([*errors.values()]) <= tolerance  # not where one is NaN, as the largest then is

    errors, sizes = compare(gradient := _gradient_size(reference.expected))
    if not agree(errors) and not grad_fn.options.presplit:
        # Does it only cancel over the whole batch? One micro-batch's size tells. Or at these parameters? Then how fast
        # it changes with them.
        call, micro_batch = reference.call, [reference.micro_batch(0)]
        part = reference.loop.results_of(call, micro_batch)
        errors, sizes = compare(gradient := max(gradient, _gradient_size(part)))
        moved = reference.loop.results_of(call._replace(diff=_moved(call.diff)), micro_batch)
        change = _gradient_size(moved, part) / _STEP
        small, _ = compare(max(gradient, change))
        errors = small if agree(small) else errors
    worst = float(np.max([*errors.values()]))
    resolution = compute / 5 * sizes["value"]  # a value rounds less than a gradient
    cause = "" if worst <= tolerance else explain(errors, tolerance, reference, carry, resolution)
    return VerifyReport(
        ok=worst <= tolerance,
        max_relative_error=worst,
        leaves={path: error for path, error in errors.items() if path != "value"},
        value_error=errors["value"],
        rtol=tolerance,
        num_microbatches=reference.n,
        reference="the same in a Python loop" if grad_fn.options.presplit else "the whole batch",
        cause=cause,
    )


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


def _gradient_size(results: dict[str, Any], *others: dict[str, Any]) -> float:
    """In the 2-norm; of its distance from another's, if there is one."""
    paths = [path for path in results if path != "value" and not is_beside(path)]
    return math.hypot(*(_norm(results[path], *(other[path] for other in others)) for path in paths))


@jax.jit
def _moved(diff: Any) -> Any:
    """Parameters a step away, at random as rounding takes them."""
    return jax.tree.map(lambda x: x * (1 + _STEP * jax.random.rademacher(jax.random.key(0), x.shape, x.dtype)), diff)


def _norm(x: Any, other: Any = np.zeros(())) -> float:  # noqa: B008
    """|x - other| in the 2-norm; NaN where that is not finite."""
    with np.errstate(invalid="ignore"):
        x = as_numpy(x) - as_numpy(other)
    return float(np.linalg.norm(x.ravel())) if np.isfinite(x).all() else math.nan


def _without_same_infinities(path: str, x: Any, other: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both with zeros where they are the same infinity, as in masked logits; in the aux and the carry alone."""
    x, other = as_numpy(x), as_numpy(other)
    same = is_beside(path) & np.isinf(x) & (x == other)
    return np.where(same, 0, x), np.where(same, 0, other)


def _ratio(distance: float, size: float) -> float:
    return distance / size if size else distance and distance * math.inf
