"""Programs that compile in seconds on an accelerator's compiler, and what is asked of the compiled ones.

Each has 100 MiB of parameters or more where its memory counts: TPU's compiler hides smaller buffers in other memory.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optaccum
from benchmarks.compiled import Program
from benchmarks.measure import num_bytes

CHIPS = ["v5e:1x1", "h100:1x1x1"]
PODS = ["v5e:2x4", "v5e:16x16", "v5p:2x2x2", "v6e:2x4", "h100:1x1x8"]
K, LAYERS, WIDTH, ROWS = 4, 8, 1024, 128

SCANNED = {
    "up": jax.ShapeDtypeStruct((LAYERS, WIDTH, 4 * WIDTH), jnp.float32),
    "down": jax.ShapeDtypeStruct((LAYERS, 4 * WIDTH, WIDTH), jnp.float32),
}
UNROLLED = [jax.tree.map(lambda x: jax.ShapeDtypeStruct((2 * WIDTH, 8 * WIDTH), jnp.float32), SCANNED)] * 2
"""Two layers of two matrices of 64 MiB; "down" is used transposed."""


def layer(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    """A residual layer that computes in bf16."""
    p = jax.tree.map(lambda w: w.astype(x.dtype), p)
    down = p["down"] if p["down"].shape[-1] == x.shape[-1] else p["down"].T
    return x + jax.nn.gelu(x @ p["up"]) @ down, None


def loss_fn(params: Any, rows: jax.Array) -> jax.Array:
    """Scanned over a dict's layers, unrolled over a list's."""
    x = rows.astype(jnp.bfloat16)
    if isinstance(params, dict):
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, params)
    else:
        for p in params:
            x, _ = jax.checkpoint(layer)(x, p)
    return jnp.mean(x.astype(jnp.float32) ** 2)


def weighted_loss(params: Any, rows: jax.Array) -> optaccum.WeightedMean:
    weight = jnp.sum(rows[:, 0] > 0)
    return optaccum.WeightedMean(loss_fn(params, rows) * weight, weight)


def batch(params: Any, num_devices: int = 1) -> jax.ShapeDtypeStruct:
    width = WIDTH if isinstance(params, dict) else 2 * WIDTH
    return jax.ShapeDtypeStruct((num_devices * ROWS, width), jnp.float32)


def peer_grad_fn(num_devices: int = 1) -> Any:
    """`optax.microbatching`'s, the negative control."""
    mean = optax.microbatching.AccumulationType.MEAN
    return optax.microbatching.microbatch(jax.value_and_grad(loss_fn), 1, num_devices * ROWS // K, mean)


def training_step(grad_fn: Any, params: Any, *, donate: tuple[int, ...] = (0, 1)) -> Program:
    optimizer = optax.adamw(1e-3)

    def step(params, state, rows):
        _, grads = grad_fn(params, rows)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Program(step, (params, jax.eval_shape(optimizer.init, params), batch(params)), donate)


def aliased_share(compiled: Any, *donated: Any) -> float:
    """Of the bytes of these arguments, how many come back in their own buffers."""
    return compiled.memory_analysis().alias_size_in_bytes / num_bytes(donated)


def host_transfers(compiled: Any) -> list[str]:
    """The instructions that send to the host or receive from it, or whose result is in its memory."""
    opcodes = r"\b(?:infeed|outfeed|(?:send|recv)(?:-done)?)\("
    pattern = re.compile(rf"{opcodes}|_callback|MoveToHost|MoveToDevice|\{{[^}}]*S\(5\)")
    return [line.strip() for line in compiled.as_text().splitlines() if " = " in line and pattern.search(line)]
