"""How exact the mean of k gradients is, by the dtype that it is summed in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import optaccum
from benchmarks.report import Section, Table
from benchmarks.sizes import Sizes

WIDTH = 256
CASES = {
    "float32 gradients, float32 sum": (jnp.float32, lambda k: _ours(k, jnp.float32)),
    "float32 gradients, bf16 sum": (jnp.float32, lambda k: _ours(k, jnp.bfloat16)),
    "bf16 gradients, float32 sum": (jnp.bfloat16, lambda k: _ours(k, jnp.float32)),
    "bf16 gradients, bf16 sum": (jnp.bfloat16, lambda k: _ours(k, None)),
    "bf16 gradients, optax.MultiSteps": (jnp.bfloat16, lambda k: optax.MultiSteps(_keep(), k)),
}


def _keep() -> optax.GradientTransformation:
    """Keeps in its state, in float32, the gradient that it is given."""

    def init(params):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)

    def update(grads, state, params=None):
        return grads, jax.tree.map(lambda x: x.astype(jnp.float32), grads)

    return optax.GradientTransformation(init, update)


def _ours(k: int, dtype: Any) -> Any:
    return optaccum.accumulate(_keep(), k, accumulator_dtype=dtype)


def _relative_error(tx: Any, grads: jax.Array) -> float:
    """|mean - exact| / |exact| of what reaches the inner optimizer."""
    params = jnp.zeros_like(grads[0])

    def step(state, grad):
        return tx.update(grad, state, params)[1], None

    state, _ = jax.jit(lambda grads: lax.scan(step, tx.init(params), grads))(grads)
    mean = np.float64(state.inner_state if hasattr(state, "inner_state") else state.inner_opt_state)
    exact = np.mean(np.asarray(grads, np.float64), axis=0)
    return float(np.linalg.norm(mean - exact) / np.linalg.norm(exact))


def run(sizes: Sizes) -> Section:
    noise = np.random.default_rng(0).normal(size=(max(sizes.sum_counts), WIDTH))
    tables = []
    for kind, bias in {"zero-mean": 0.0, "biased (mean 1, deviation 1)": 1.0}.items():
        rows = []
        for case, (dtype, make_tx) in CASES.items():
            grads = [jnp.asarray(noise[:k] + bias, jnp.float32).astype(dtype) for k in sizes.sum_counts]
            errors = [_relative_error(make_tx(k), g) for k, g in zip(sizes.sum_counts, grads, strict=True)]
            rows.append((case, *(f"{error:.1e}" for error in errors)))
        tables.append(Table((f"{kind} gradients", *(f"k = {k}" for k in sizes.sum_counts)), rows))
    text = (
        "Relative error of the mean of k gradients as the inner optimizer gets it, against float64. "
        "`optax.MultiSteps` keeps a running mean in the parameters' dtype."
    )
    return Section("Accuracy of sums", text, tables, [])
