"""A transformer language model in plain JAX: layers scanned or unrolled, rematerialised or not."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.sizes import Sizes

HEAD_WIDTH = 32


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_params(sizes: Sizes, scanned: bool) -> dict[str, Any]:
    d = sizes.width

    def layer(key):
        shapes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        weights = {n: jax.random.normal(keys[n], shapes[n]) / shapes[n][0] ** 0.5 for n in shapes}
        return jax.tree.map(lambda x: x.astype(sizes.dtype), weights)

    key, embed_key = jax.random.split(jax.random.key(0))
    keys = jax.random.split(key, sizes.num_layers)
    layers = jax.vmap(layer)(keys) if scanned else [layer(key) for key in keys]
    embed = jax.random.normal(embed_key, (sizes.vocabulary, d)) / d**0.5
    return {"embed": embed.astype(sizes.dtype), "layers": layers}


def make_tokens(sizes: Sizes) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (sizes.batch_size, sizes.length + 1), 0, sizes.vocabulary, jnp.int32)


def _normalize(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    rows, length, d = x.shape
    w = jax.tree.map(lambda p: p.astype(x.dtype), w)
    heads = max(1, d // HEAD_WIDTH)
    q, k, v = jnp.split((_normalize(x) @ w["qkv"]).reshape(rows, length, 3 * heads, -1), 3, axis=2)
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + attended.reshape(rows, length, d) @ w["out"]
    return x + jax.nn.gelu(_normalize(x) @ w["up"]) @ w["down"], None


def loss_fn(params: dict[str, Any], tokens: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Mean cross-entropy of the next token; every layer is computed again in the backward pass.

    It computes in `dtype`, None being the parameters' own.
    """
    x = params["embed"][tokens[:, :-1]].astype(dtype or params["embed"].dtype)
    layer = jax.checkpoint(_layer)
    if isinstance(params["layers"], list):
        for weights in params["layers"]:
            x, _ = layer(x, weights)
    else:
        x, _ = lax.scan(layer, x, params["layers"])
    logits = (_normalize(x) @ params["embed"].T.astype(x.dtype)).astype(jnp.float32)
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1))
