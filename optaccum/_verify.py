"""Does this loss, on these devices, accumulate to what the whole batch gives? And if not, why not?"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaccum._call import Call, Roles, as_indices, join_call, split_call
from optaccum._diagnose import diagnose
from optaccum._loss import loss_value
from optaccum._split import batch_size_of, resolve_num_microbatches
from optaccum._value_and_grad import value_and_grad

PyTree = Any

# A leaf whose gradient nearly cancels is compared with this fraction of the whole gradient instead of with itself.
_FLOOR = 1e-3


class VerifyReport(NamedTuple):
    """What `optaccum.verify` found; `str(report)` is a table with the likely cause.

    Attributes:
      ok: whether value and gradients agree within `rtol`.
      max_relative_error: the largest of `value_error` and `leaves`.
      leaves: relative error of each gradient leaf by its key path: |accumulated - whole| / |whole| in the 2-norm,
        |whole| being at least a thousandth of the whole gradient's norm.
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

    Both are computed on the arguments' own devices, dtypes and mesh, so a report covers the model, the options and
    the compiler. Where they disagree, further evaluations of the loss (on repeated and mixed halves of the batch, with
    another key, with the state of the next micro-batch) tell why.

    Args:
      loss_fn: as for :func:`value_and_grad`.
      *args: its positional arguments, with a batch that fits the memory whole.
      rtol: relative tolerance; None: from the dtypes that the loss computes in (5e-2 with bf16, 1e-2 with f16, 1e-4
        with f32 on CPU, but 1e-2 on GPUs and 5e-2 on TPUs, whose matrix units round float32 unless
        `jax_default_matmul_precision` says otherwise, 1e-9 with f64), plus sqrt(n) roundings of the accumulator.
      **value_and_grad_options: as for :func:`value_and_grad`.

    Returns:
      A report: `report.ok`, `report.max_relative_error`, `report.leaves`, `str(report)`, `report.raise_if_failed()`.

    Raises:
      ValueError, TypeError: what :func:`value_and_grad` raises for these arguments.

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
    options = {**value_and_grad_options, "return_info": False, "track_noise_scale": False}
    has_aux = options.get("has_aux", False)
    call, layout = split_call(_roles(options), args, {})
    n = resolve_num_microbatches(
        batch_size_of(call.batch), options.get("num_microbatches"), options.get("microbatch_size")
    )
    value, grads = _without_aux(value_and_grad(loss_fn, **options)(*args), has_aux)

    @jax.jit
    def loss_of(call):
        out = loss_fn(*join_call(layout, call)[0])
        return loss_value(out[0] if has_aux else out)

    first_key = jax.tree.map(lambda key: jax.random.fold_in(key, 0), call.key)
    whole_call = call._replace(key=first_key)
    try:
        (expected_value, expected), by_value = _whole_gradient(loss_of, whole_call, grads), loss_of
    except NameError:  # the loss names a data axis: it can only be run under value_and_grad
        whole = value_and_grad(loss_fn, **{**options, "num_microbatches": 1, "microbatch_size": None})
        (expected_value, expected), by_value = _without_aux(whole(*args), has_aux), None

    scale = _FLOOR * _norm(expected)
    leaves = {
        jax.tree_util.keystr(path): _relative_error(grad, whole, scale)
        for (path, grad), whole in zip(
            jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True
        )
    }
    value_error = _relative_error(value, expected_value, 0.0)
    worst = max([value_error, *leaves.values()], key=_order)
    rtol = _tolerance(loss_of, whole_call, by_value, grads, n) if rtol is None else rtol
    ok = bool(worst <= rtol)
    return VerifyReport(
        ok=ok,
        max_relative_error=worst,
        leaves=leaves,
        value_error=value_error,
        value_ratio=float(value) / float(expected_value) if float(expected_value) else float("nan"),
        rtol=rtol,
        num_microbatches=n,
        cause="" if ok else diagnose(by_value, whole_call, n, value_agrees=value_error <= rtol),
    )


def _roles(options: dict[str, Any]) -> Roles:
    """The arguments' roles, with `value_and_grad`'s defaults."""

    def index(name):
        return None if options.get(name) is None else as_indices(options[name], name)[0]

    return Roles(
        diff=as_indices(options.get("argnums", 0), "argnums"),
        batch=as_indices(options.get("batch_argnums", 1), "batch_argnums"),
        key=index("key_argnum"),
        carry=index("carry_argnum"),
    )


def _without_aux(results: Any, has_aux: bool) -> tuple[Any, PyTree]:
    value, grads = results
    return (value[0] if has_aux else value), grads


def _whole_gradient(loss_of: Callable[[Call], Any], call: Call, grads: PyTree) -> tuple[Any, PyTree]:
    value, (expected,) = jax.jit(
        jax.value_and_grad(lambda diff, call: loss_of(call._replace(diff=diff)), argnums=(0,))
    )(call.diff, call._replace(diff=()))
    one_argnum = jax.tree.structure((grads,)) == jax.tree.structure(expected)
    return value, expected[0] if one_argnum else expected


def _tolerance(loss_of: Callable[[Call], Any], call: Call, by_value: Any, grads: PyTree, n: int) -> float:
    """What rounding may do: that of the coarsest dtype that the loss computes in, and n roundings of the sums."""
    printed = str(jax.make_jaxpr(loss_of)(call)) if by_value is not None else ""
    dtypes = {x.dtype for x in jax.tree.leaves((call.diff, call.batch)) if jnp.issubdtype(x.dtype, jnp.inexact)}
    backend = jax.default_backend()
    if re.search(r"\b(bf16|bfloat16)\[", printed) or jnp.dtype(jnp.bfloat16) in dtypes:
        compute = 5e-2
    elif re.search(r"\b(f16|float16)\[", printed) or jnp.dtype(jnp.float16) in dtypes:
        compute = 1e-2
    elif backend != "cpu" and jax.config.jax_default_matmul_precision not in ("float32", "highest"):
        compute = 5e-2 if backend == "tpu" else 1e-2
    elif dtypes <= {jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128)}:
        compute = 1e-9
    else:
        compute = 1e-4
    return compute + n**0.5 * max(float(jnp.finfo(g.dtype).eps) for g in jax.tree.leaves(grads))


def _norm(tree: PyTree) -> float:
    return float(np.sqrt(sum(float(np.sum(np.abs(_wide(x)) ** 2)) for x in jax.tree.leaves(tree))))


def _relative_error(x: Any, expected: Any, floor: float) -> float:
    """|x - expected| / max(|expected|, floor); 0 where both are the same, NaN where one is not finite."""
    x, expected = _wide(x), _wide(expected)
    difference, size = _norm(x - expected), max(_norm(expected), floor)
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def _wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def _order(error: float) -> float:
    """Sorts NaN above everything."""
    return float("inf") if np.isnan(error) else error
