"""A regression small enough to differentiate twice, for the tests of transformations and modes."""

import jax
import jax.numpy as jnp
import optax

import optaccum

K, N, ROWS = 2, 3, 6  # micro-steps in a window, micro-batches and rows in a call
PARAMS = {"w": jnp.array([0.3, -0.2]), "b": jnp.array(0.1)}
X = jax.random.normal(jax.random.key(0), (4, ROWS, 2))  # four calls
CALLS = {"x": X, "y": jnp.sin(X.sum(-1)) + 0.5}
BATCH = jax.tree.map(lambda x: x[0], CALLS)


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"]) ** 2)


def weighted_loss_fn(params, batch):
    losses = (jnp.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"]) ** 2
    mask = jnp.where(batch["y"] > 0.5, 1.0, 0.0)
    return optaccum.WeightedMean((mask * losses).sum(), mask.sum())


def optimizer(learning_rate):
    return optax.adam(learning_rate, eps_root=1e-3)  # smooth at zero, so that it can be differentiated
