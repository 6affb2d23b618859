"""A transformer over bytes, with scanned layers: what language_model.py trains."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

VOCABULARY = 256  # bytes; 0 stands before the first
REMAT = ("none", "full", "dots", "offload")


class Size(NamedTuple):
    """What a transformer is made of."""

    layers: int
    width: int
    heads: int
    length: int  # bytes of context
    experts: int  # in each layer; 0 for one dense layer instead
    remat: str  # one of REMAT
    dtype: Any  # that it computes in; parameters are float32


class Router(NamedTuple):
    """What the routers of a layer report of a micro-batch; of all layers, with a leading axis."""

    z: jax.Array  # shape=(), sum over tokens of logsumexp(logits)^2: ST-MoE, https://arxiv.org/abs/2202.08906
    imbalance: jax.Array  # shape=(), sum over documents: DeepSeek-V3's, https://arxiv.org/abs/2412.19437
    num_tokens: jax.Array  # shape=()


def has_host_memory() -> bool:
    """Whether the device can offload to the host's memory."""
    return "pinned_host" in {memory.kind for memory in jax.local_devices()[0].addressable_memories()}


def _policy(remat: str) -> Any:
    """Which of a layer's intermediate values are kept for the backward pass."""
    policies = jax.checkpoint_policies
    if remat == "offload":  # the layer's input, on the host; the rest is computed again from it
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return policies.nothing_saveable if remat == "full" else policies.dots_with_no_batch_dims_saveable


class Experts(nn.Module):
    """A switch layer: each token goes through the one expert that its router likes best, weighed by how much.

    An expert takes 1.25 times its fair share of *each document*; further tokens pass it by. A capacity that
    documents shared would let the micro-batch change what a token goes through.
    """

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array, is_token: jax.Array) -> tuple[jax.Array, Router]:
        _, length, width = x.shape
        experts = self.size.experts
        capacity = -(-5 * length // (4 * experts))
        logits = nn.Dense(experts, use_bias=False)(x.astype(jnp.float32))
        probability = jnp.where(is_token[..., None], jax.nn.softmax(logits), 0.0)  # batch, time, expert
        chosen = jax.nn.one_hot(logits.argmax(-1), experts) * is_token[..., None]
        seat = (jnp.cumsum(chosen, axis=1) * chosen).astype(jnp.int32) - 1  # -1, or one past the last: no seat
        dispatch = jax.nn.one_hot(seat, capacity, dtype=x.dtype)  # batch, time, expert, seat

        init = nn.initializers.lecun_normal(batch_axis=0)
        w_in = self.param("w_in", init, (experts, width, 4 * width)).astype(x.dtype)
        w_out = self.param("w_out", init, (experts, 4 * width, width)).astype(x.dtype)
        seated = jnp.einsum("btec,btd->becd", dispatch, x)
        y = jnp.einsum("becd,edf->becf", seated, w_in)
        y = jnp.einsum("becf,efd->becd", nn.gelu(y), w_out)
        y = jnp.einsum("btec,becd,bte->btd", dispatch, y, probability.astype(x.dtype))

        lengths = jnp.maximum(is_token.sum(1), 1)[:, None]
        imbalance = experts * (chosen.sum(1) / lengths * probability.sum(1) / lengths).sum(-1)
        z = jnp.where(is_token, jax.nn.logsumexp(logits, axis=-1) ** 2, 0.0)
        return y, Router(z.sum(), imbalance.sum(), is_token.sum())


class Layer(nn.Module):
    """Attention, then a dense layer or experts."""

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array, is_token: jax.Array) -> tuple[jax.Array, Router | None]:
        size, router = self.size, None
        x = checkpoint_name(x, "layer_input")
        causal = nn.make_causal_mask(is_token)  # padding comes after the document: nothing sees it
        y = nn.LayerNorm(dtype=size.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(size.heads, dtype=size.dtype)(y, mask=causal)
        y = nn.LayerNorm(dtype=size.dtype)(x)
        if size.experts:
            y, router = Experts(size)(y, is_token)
        else:
            y = nn.gelu(nn.Dense(4 * size.width, dtype=size.dtype)(y))
            y = nn.Dense(size.width, dtype=size.dtype)(y)
        return x + y, router


class Transformer(nn.Module):
    """From bytes to the next byte's logits, and what the routers report."""

    size: Size

    @nn.compact
    def __call__(self, inputs: jax.Array, is_token: jax.Array) -> tuple[jax.Array, Router | None]:
        size = self.size
        layer = Layer if size.remat == "none" else nn.remat(Layer, prevent_cse=False, policy=_policy(size.remat))
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]: Flax types it too narrowly
            length=size.layers,
        )
        init = nn.initializers.normal(0.02)
        positions = self.param("positions", init, (size.length, size.width))
        x = nn.Embed(VOCABULARY, size.width, embedding_init=init)(inputs) + positions[: inputs.shape[1]]
        x, routers = scanned(size, name="layers")(x.astype(size.dtype), is_token)
        x = nn.LayerNorm(dtype=size.dtype)(x)
        return nn.Dense(VOCABULARY, dtype=size.dtype)(x).astype(jnp.float32), routers
