"""A byte-level transformer in plain JAX, split over a mesh's "model" axis as in Megatron-LM."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

import optaccum

PyTree = Any
VOCABULARY = 256  # bytes; 0 is padding, and what stands before the first


class Size(NamedTuple):
    """What a transformer is made of."""

    layers: int
    width: int
    heads: int
    length: int  # bytes to predict in a row


# How each parameter is split; a layer's parameters lead with the layer's number. Heads and hidden units stay
# whole on a device, so that a layer needs two sums over the "model" axis. https://arxiv.org/abs/1909.08053
SPECS = {
    "embedding": P(),
    "positions": P(),
    "norm": P(),
    "layers": {
        "attention_norm": P(),
        "qkv": P(None, None, None, "model", None),
        "project": P(None, "model", None, None),
        "hidden_norm": P(),
        "expand": P(None, None, "model"),
        "contract": P(None, "model", None),
    },
}


# The large ones besides over "data" (FSDP), along another dimension each.
FSDP_SPECS = SPECS | {
    "embedding": P(None, "data"),
    "layers": SPECS["layers"]
    | {
        "qkv": P(None, "data", None, "model", None),
        "project": P(None, "model", None, "data"),
        "expand": P(None, "data", "model"),
        "contract": P(None, "model", "data"),
    },
}


def init_params(size: Size, key: jax.Array) -> PyTree:
    """Float32 parameters, named as in SPECS."""
    layers, width, heads, length = size
    keys = iter(jax.random.split(key, 6))

    def normal(*shape: int, fan_in: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) / jnp.sqrt(fan_in)

    return {
        "embedding": normal(VOCABULARY, width, fan_in=width),
        "positions": normal(length, width, fan_in=width),
        "norm": jnp.ones(width),
        "layers": {
            "attention_norm": jnp.ones((layers, width)),
            "qkv": normal(layers, width, 3, heads, width // heads, fan_in=width),
            "project": normal(layers, heads, width // heads, width, fan_in=width),
            "hidden_norm": jnp.ones((layers, width)),
            "expand": normal(layers, width, 4 * width, fan_in=width),
            "contract": normal(layers, 4 * width, width, fan_in=4 * width),
        },
    }


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMSNorm, computed in float32. https://arxiv.org/abs/1910.07467"""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def _layer(x: jax.Array, layer: PyTree) -> jax.Array:
    layer = jax.tree.map(lambda p: p.astype(x.dtype), layer)
    q, k, v = jnp.einsum("btd,dchk->cbthk", _norm(x, layer["attention_norm"]), layer["qkv"])
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + jnp.einsum("bthk,hkd->btd", attended, layer["project"])
    hidden = jax.nn.gelu(_norm(x, layer["hidden_norm"]) @ layer["expand"])
    return x + hidden @ layer["contract"]


def logits_of(params: PyTree, inputs: jax.Array, dtype: Any, rows_on: Any) -> jax.Array:
    """Logits of the byte after each; a layer's activations are computed again in the backward pass.

    Args:
      params: as `init_params` gives them.
      inputs: shape=(batch, length), integers.
      dtype: to compute in.
      rows_on: None, or a sharding to hold activations to.

    Returns:
      shape=(batch, length, 256), float32.
    """
    x = (params["embedding"][inputs] + params["positions"]).astype(dtype)
    x = x if rows_on is None else lax.with_sharding_constraint(x, rows_on)
    step = jax.checkpoint(lambda x, layer: (_layer(x, layer), None), prevent_cse=False)
    x, _ = lax.scan(step, x, params["layers"])
    x = _norm(x, params["norm"])
    return jnp.einsum("btd,vd->btv", x, params["embedding"].astype(dtype), preferred_element_type=jnp.float32)


def loss_fn(params: PyTree, rows: jax.Array, dtype: Any = jnp.float32, rows_on: Any = None) -> optaccum.WeightedMean:
    """Cross-entropy per byte of text: padding does not count, however much of it a micro-batch has.

    Args:
      params: as `init_params` gives them.
      rows: shape=(batch, length + 1), uint8; zeros after the first column are padding.
      dtype: to compute in.
      rows_on: how activations are sharded, where JAX places the collectives: it might shard them as the embedding.
    """
    inputs, targets = rows[:, :-1].astype(jnp.int32), rows[:, 1:].astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_of(params, inputs, dtype, rows_on), targets)
    is_text = targets != 0
    return optaccum.WeightedMean(jnp.sum(losses, where=is_text), jnp.sum(is_text))
