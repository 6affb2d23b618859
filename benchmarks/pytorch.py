"""PyTorch's idiom: loss / k, backward, step every k-th time. Optional: without PyTorch the rest runs."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.sizes import Sizes
from benchmarks.transformer import HEAD_WIDTH

STEPS = WHOLE, ACCUMULATED = "PyTorch, at once", "PyTorch, accumulated"


def is_installed() -> bool:
    return importlib.util.find_spec("torch") is not None


def _set_threads() -> Any:
    import os

    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    return torch


def streaming_window(params: Any, k: int) -> Callable[[], Any]:
    """k gradients added in place, then the fused AdamW, then the sums cleared in place."""
    torch = _set_threads()
    params = [torch.from_numpy(np.array(x)).requires_grad_() for x in jax.tree.leaves(params)]
    grads = [p.detach() * 0.01 for p in params]
    sums = [torch.zeros_like(g) for g in grads]
    for p, total in zip(params, sums, strict=True):
        p.grad = total
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-4, fused=True)

    def window():
        for _ in range(k):
            torch._foreach_add_(sums, grads, alpha=1 / k)
        optimizer.step()
        torch._foreach_zero_(sums)
        return ()

    return window


def _make_model(torch: Any, sizes: Sizes) -> Any:
    """The benchmark's transformer, each layer recomputed in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    d, heads = sizes.width, max(1, sizes.width // HEAD_WIDTH)
    functional = torch.nn.functional

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            shapes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
            for name, (inputs, outputs) in shapes.items():
                setattr(self, name, torch.nn.Linear(inputs, outputs, bias=False))

        def forward(self, x):
            rows, length, _ = x.shape
            qkv = self.qkv(functional.rms_norm(x, (d,))).view(rows, length, 3, heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(attended.transpose(1, 2).reshape(rows, length, d))
            return x + self.down(functional.gelu(self.up(functional.rms_norm(x, (d,))), approximate="tanh"))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(sizes.vocabulary, d)
            self.layers = torch.nn.ModuleList(Layer() for _ in range(sizes.num_layers))

        def forward(self, tokens):
            x = self.embed(tokens[:, :-1])
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            logits = functional.rms_norm(x, (d,)) @ self.embed.weight.T
            return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return Model()


def training_steps(sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """A step on the whole batch at once, and in k micro-batches by the idiom, each with the fused AdamW."""
    torch = _set_threads()
    model = _make_model(torch, sizes)
    tokens = torch.randint(sizes.vocabulary, (sizes.batch_size, sizes.length + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(k):
        for micro_batch in tokens.chunk(k):
            (model(micro_batch) / k).backward()
        optimizer.step()
        optimizer.zero_grad()
        return ()

    return {WHOLE: lambda: step(1), ACCUMULATED: lambda: step(sizes.k)}
