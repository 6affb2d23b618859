"""Gradients whose means are exact, windows of them, and the mean by hand: what the streaming tests share."""

import jax
import jax.numpy as jnp
import numpy as np

K = 4
PARAMS = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, -0.5])}
WEIGHTS = (1.0, 4.0, 2.0, 1.0)  # their sum a power of two: means are exact, however XLA divides


def integers(seed, like=PARAMS):
    """Gradients of small integers, whose float32 sums are exact."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.integers(-8, 9, p.shape), p.dtype), like)


def run(tx, grads, params=PARAMS, *, jit=True, **per_call):
    """The updates and the states of successive calls; `per_call` lists one extra arg for each."""
    update = jax.jit(tx.update) if jit else tx.update
    state, updates, states = tx.init(params), [], []
    for i, g in enumerate(grads):
        u, state = update(g, state, params, **{name: values[i] for name, values in per_call.items()})
        updates.append(u)
        states.append(state)
    return updates, states


def weighted_mean(grads, weights):
    """A float64 NumPy loop."""
    total = jax.tree.map(lambda g: np.zeros(g.shape), grads[0])
    for g, w in zip(grads, weights, strict=True):
        total = jax.tree.map(lambda t, g, w=w: t + w * np.asarray(g, np.float64), total, g)
    return jax.tree.map(lambda t: (t / sum(weights)).astype(np.float32), total)


def assert_dtypes_equal(actual, expected):
    assert jax.tree.leaves(actual)
    assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, expected)


GRADS = [integers(i) for i in range(8)]
