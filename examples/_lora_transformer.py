"""A byte-level transformer in NNX, LoRA beside every matrix; rows may hold several documents."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

VOCABULARY = 256  # bytes; 0 stands before the first
BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))  # every parameter but LoRA's


class Size(NamedTuple):
    """What a transformer is made of."""

    layers: int
    width: int
    heads: int
    length: int  # bytes of context
    rank: int  # of LoRA's updates, https://arxiv.org/abs/2106.09685


class Layer(nnx.Module):
    """Attention and a dense layer."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        linear = partial(nnx.LoRALinear, lora_rank=size.rank, use_bias=False, rngs=rngs)
        self.heads = size.heads
        self.attention_norm = nnx.LayerNorm(size.width, rngs=rngs)
        self.qkv = linear(size.width, 3 * size.width)
        self.project = linear(size.width, size.width)
        self.hidden_norm = nnx.LayerNorm(size.width, rngs=rngs)
        self.expand = linear(size.width, 4 * size.width)
        self.contract = linear(4 * size.width, size.width)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        qkv = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        y = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), mask=mask)
        x = x + self.project(y.reshape(x.shape))
        return x + self.contract(nnx.gelu(self.expand(self.hidden_norm(x))))


class Transformer(nnx.Module):
    """From bytes to the next byte's logits."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        embed = partial(nnx.Embed, features=size.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.embed = embed(VOCABULARY)
        self.positions = embed(size.length)
        self.layers = nnx.List([Layer(size, rngs) for _ in range(size.layers)])
        self.norm = nnx.LayerNorm(size.width, rngs=rngs)
        self.logits = nnx.Linear(size.width, VOCABULARY, rngs=rngs)

    def __call__(self, inputs: jax.Array, document: jax.Array, position: jax.Array) -> jax.Array:
        """All of shape=(rows, length): the bytes, the document of each in its row, and its place in that."""
        x = self.embed(inputs.astype(jnp.int32)) + self.positions(position.astype(jnp.int32))
        same = document[:, :, None] == document[:, None, :]
        mask = nnx.make_causal_mask(document, dtype=bool) & same[:, None]
        for layer in self.layers:
            x = layer(x, mask)
        return self.logits(self.norm(x))
