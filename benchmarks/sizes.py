"""How large everything is, on a CPU, on a GPU and in the smoke test."""

from typing import NamedTuple

import jax.numpy as jnp


class Sizes(NamedTuple):
    k: int  # micro-batches in a window
    stream_width: int
    stream_layers: int  # of 12 * width^2 parameters each
    muon_width: int
    sweep_widths: tuple[int, ...]
    sweep_k: tuple[int, ...]
    stream_repeats: int
    num_layers: int  # of the transformer
    width: int
    vocabulary: int
    batch_size: int
    length: int
    dtype: jnp.dtype
    scan_repeats: int
    scan_forms: tuple[tuple[bool, bool], ...]  # scanned layers?, a training step or gradients alone?
    process_k: tuple[int, ...]
    process_repeats: int
    sum_counts: tuple[int, ...]  # micro-batches that are summed
    many: int  # micro-batches whose program is compiled and timed


CPU = Sizes(
    k=8,
    stream_width=512,
    stream_layers=6,
    muon_width=192,
    sweep_widths=(128, 256, 512),
    sweep_k=(1, 2, 4, 8, 16, 32),
    stream_repeats=11,
    num_layers=8,
    width=256,
    vocabulary=1024,
    batch_size=32,
    length=32,
    dtype=jnp.dtype(jnp.float32),
    scan_repeats=7,
    scan_forms=((True, False), (False, False), (True, True), (False, True)),
    process_k=(1, 2, 8),
    process_repeats=5,
    sum_counts=(8, 64, 512, 4096),
    many=512,
)
GPU = CPU._replace(
    stream_width=1280,
    muon_width=1280,
    sweep_widths=(512, 1024, 1280),
    num_layers=12,
    width=768,
    vocabulary=32768,
    batch_size=64,
    length=512,
    dtype=jnp.dtype(jnp.bfloat16),
)
TINY = CPU._replace(
    k=2,
    stream_width=16,
    stream_layers=1,
    muon_width=8,
    sweep_widths=(8,),
    sweep_k=(2,),
    stream_repeats=1,
    num_layers=1,
    width=16,
    vocabulary=32,
    batch_size=8,
    length=4,
    scan_repeats=1,
    scan_forms=((True, False), (False, True)),
    process_k=(2,),
    process_repeats=1,
    sum_counts=(4,),
    many=4,
)
