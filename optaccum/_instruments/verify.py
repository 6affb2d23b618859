"""Does this loss, on these devices, accumulate to what the whole batch gives? And if not, why not?"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaccum._instruments.compare import least_sizes, relative_errors
from optaccum._instruments.diagnose import LossOf, diagnose, explain_not_finite, take_rows
from optaccum._loss import loss_terms, loss_value
from optaccum._scanning.call import Call, Layout, Roles, join_call, make_roles, split_call
from optaccum._scanning.data_axes import as_axes, find_mesh
from optaccum._scanning.split import batch_size_of, check_split_options, resolve_num_microbatches
from optaccum._scanning.value_and_grad import value_and_grad

PyTree = Any
GradientOf = Callable[[Call], tuple[Any, PyTree]]  # -> value, gradients

# What nearly cancels is compared with this fraction of the whole gradient (or the tolerance of its dtype).
_FLOOR = 1e-2


class VerifyReport(NamedTuple):
    """What `optaccum.verify` found; `str(report)` is a table with the likely cause.

    Attributes:
      ok: whether value and gradients agree within `rtol`.
      max_relative_error: the largest of `value_error` and `leaves`.
      leaves: relative error of each gradient leaf by its key path: |accumulated - whole| / |whole| in the
        2-norm, |whole| being taken as a hundredth (16-bit: a twentieth) of the whole gradient's norm at
        least. NaN where one is not finite.
      value_error: relative error of the value.
      value_ratio: accumulated value / whole batch's value.
      rtol: the tolerance.
      num_microbatches: n.
      cause: the likely cause and the way out; empty where ok.
    """

    ok: bool
    max_relative_error: float
    leaves: dict[str, float]
    value_error: float
    value_ratio: float
    rtol: float
    num_microbatches: int
    cause: str

    def raise_if_failed(self) -> None:
        """Raises AssertionError with the report unless ok."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        """The errors, largest first, and the likely cause of a disagreement."""
        verdict = "agree" if self.ok else "DISAGREE"
        lines = [
            f"{self.num_microbatches} micro-batches and the whole batch {verdict}: "
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
    """Compares the whole batch's value and gradients with the accumulated ones, as the program will run.

    Both are computed on the arguments' own devices, dtypes and mesh, so a report covers the model, the
    options and the compiler. Where they disagree, further evaluations of the loss (on repeated and mixed
    parts of the batch, with another key, with the state of the next micro-batch) tell why.

    Args:
      loss_fn: as for :func:`value_and_grad`.
      *args: its positional arguments, with a batch that fits the memory whole. Keyword arguments of `loss_fn`
        have to be bound to it (`functools.partial`).
      rtol: relative tolerance, >= 0. None: what rounding may do, from the dtypes that the loss computes in:
        5e-2 with bf16 or narrower, 1e-2 with f16, 1e-4 with f32 on CPU (on GPUs 1e-2 and on TPUs 5e-2, whose
        matrix units round float32 unless `jax_default_matmul_precision` says otherwise), 1e-9 with f64; plus
        sqrt(n) roundings of the accumulator.
      **value_and_grad_options: as for :func:`value_and_grad`.

    Returns:
      A report: `report.ok`, `report.max_relative_error`, `report.leaves`, `str(report)`,
      `report.raise_if_failed()`.

    Raises:
      ValueError, TypeError: for a negative tolerance, and what :func:`value_and_grad` raises for these
      arguments.

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
    options = value_and_grad_options
    sizes = check_split_options(options.get("num_microbatches"), options.get("microbatch_size"))
    call, layout = split_call(_roles(options), args, {})
    batch_size = batch_size_of(call.batch)
    n = resolve_num_microbatches(batch_size, *sizes)
    value, grads, *_ = value_and_grad(loss_fn, **options)(*args)
    accumulated = (value[0] if options.get("has_aux") else value), grads

    call = call._replace(key=jax.tree.map(lambda key: jax.random.fold_in(key, 0), call.key))
    axes = _mesh_axes(options, call)
    try:
        (loss_of, gradient_of), num_devices = _as_it_is(loss_fn, options, layout), 1
        whole = gradient_of(call)
    except Exception:
        if not axes:
            raise
        # It runs under value_and_grad alone: it names a data axis, or JAX finds no layout on an Explicit mesh.
        loss_of, gradient_of = _in_one_micro_batch(loss_fn, options, layout)
        whole, num_devices = gradient_of(call), math.prod(axes.values())

    one_device = call if num_devices == 1 else take_rows(call, np.arange(batch_size // num_devices))
    compute = _compute_tolerance(loss_fn, layout, one_device, axes)
    eps = max(float(jnp.finfo(g.dtype).eps) for g in jax.tree.leaves(grads))
    tolerance = compute + n**0.5 * eps if rtol is None else float(rtol)
    fraction = max(_FLOOR, compute)
    least = least_sizes(fraction, whole)
    value_error, leaves = relative_errors(accumulated, whole, least)
    if not _worst(value_error, leaves) <= tolerance:
        least = least_sizes(fraction, whole, _one_micro_batch(gradient_of, call, n), call.diff)
        value_error, leaves = relative_errors(accumulated, whole, least)
    worst, cause = _worst(value_error, leaves), ""
    if math.isnan(worst):
        cause = explain_not_finite(all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(whole)))
    elif worst > tolerance:
        agree = None
        if value_error <= tolerance:
            moving = [bool(jnp.any(x != 0)) for x in jax.tree.leaves(whole[1])]
            agree = [error <= tolerance for error, m in zip(leaves.values(), moving, strict=True) if m]
        # A value rounds far less than a gradient.
        resolution = compute / 20 * max(abs(float(whole[0])), least.value)
        cause = diagnose(loss_of, call, n, num_devices=num_devices, resolution=resolution, leaves_agree=agree)
    return VerifyReport(
        ok=worst <= tolerance,
        max_relative_error=worst,
        leaves=leaves,
        value_error=value_error,
        value_ratio=float(accumulated[0]) / float(whole[0]) if float(whole[0]) else float("nan"),
        rtol=tolerance,
        num_microbatches=n,
        cause=cause,
    )


def _roles(options: dict[str, Any]) -> Roles:
    """The arguments' roles, with `value_and_grad`'s defaults."""
    names = ("batch_argnums", "key_argnum", "carry_argnum", "count_argnum")
    given = {name: options[name] for name in names if name in options}
    return make_roles(**{"argnums": options.get("argnums", 0), "batch_argnums": 1} | given)


def _mesh_axes(options: dict[str, Any], call: Call) -> dict[str, int]:
    """The sizes of the mesh axes that `data_axes` names."""
    axes = as_axes(options.get("data_axes"))
    return {axis: find_mesh(call, axes).shape[axis] for axis in axes}


def _loss_and_carry(out: Any, options: dict[str, Any]) -> tuple[Any, PyTree]:
    if not options.get("has_aux"):
        return out, ()
    loss, aux = out
    return loss, () if options.get("carry_argnum") is None else aux[0]


def _as_it_is(
    loss_fn: Callable[..., Any], options: dict[str, Any], layout: Layout
) -> tuple[LossOf, GradientOf]:
    """The loss of a call and its gradient, as JAX gives them."""

    def loss_of(call):
        loss, carry = _loss_and_carry(loss_fn(*join_call(layout, call)[0]), options)
        return loss_value(loss_terms(loss, 1.0)), carry

    def of_diff(diff, call):
        return loss_of(call._replace(diff=diff))[0]

    gradient = jax.jit(jax.value_and_grad(of_diff))
    return jax.jit(loss_of), lambda call: gradient(call.diff, call._replace(diff=()))


def _in_one_micro_batch(
    loss_fn: Callable[..., Any], options: dict[str, Any], layout: Layout
) -> tuple[LossOf, GradientOf]:
    """The same for a loss that only runs under `value_and_grad`."""
    grad_fn = value_and_grad(loss_fn, **{**options, "num_microbatches": 1, "microbatch_size": None})

    def loss_of(call):
        return _loss_and_carry(grad_fn(*join_call(layout, call)[0])[0], options)

    def gradient_of(call):
        out, grads, *_ = grad_fn(*join_call(layout, call)[0])
        return _loss_and_carry(out, options)[0], grads

    return loss_of, gradient_of


def _compute_tolerance(
    loss_fn: Callable[..., Any], layout: Layout, call: Call, axes: dict[str, int]
) -> float:
    """What rounding in the coarsest dtype that the loss computes in may do."""
    trace = jax.make_jaxpr(lambda call: loss_fn(*join_call(layout, call)[0]), axis_env=list(axes.items()))
    dtypes = set(re.findall(r"\b(bf16|f\d+)(?:_\w+)?\[", str(trace(call))))
    if dtypes & {"bf16", "f8", "f4"}:
        return 5e-2
    if "f16" in dtypes:
        return 1e-2
    if "f32" not in dtypes:
        return 1e-9
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return (
        1e-4
        if precision in ("float32", "highest")
        else {"cpu": 1e-4, "tpu": 5e-2}.get(jax.default_backend(), 1e-2)
    )


def _one_micro_batch(gradient_of: GradientOf, call: Call, n: int) -> PyTree:
    """Value and gradients of the first micro-batch, which tell how large they are before they cancel."""
    try:
        return gradient_of(take_rows(call, np.arange(0, batch_size_of(call.batch), n)))
    except Exception:  # such as rows that do not divide over the devices: it is only a scale
        return ()


def _worst(value_error: float, leaves: dict[str, float]) -> float:
    return max([value_error, *leaves.values()], key=_order)


def _order(error: float) -> float:
    """Sorts NaN above everything."""
    return float("inf") if math.isnan(error) else error
