"""Accelerators that are not here, to compile for: their own compilers run on any Linux x86-64 machine.

pip install "jax[tpu]"                                                  # v5e:2x4, v6e:16x16, ...
pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12     # h100:1x1x8; jaxlib's version
"""

import os
import re
from typing import Any, NamedTuple

from jax.experimental import topologies

GIB = 2**30
# Bytes of memory on a device, as vendors give it.
MEMORY = {"v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB, "h100": 80 * GIB}

# XLA's GpuTargetConfigProto: what its GPU compiler would ask of a card.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# No accelerator is here: ask no server about it, take no lock on it, write no logs.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_ACCELERATOR_TYPE": "none",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Target(NamedTuple):
    """Devices to compile for, and the memory of each."""

    name: str
    devices: list[Any]
    memory: int  # bytes


def check(name: str) -> str:
    """The name, if it can be one; whether there are such topologies the compiler knows."""
    kind, _, shape = name.partition(":")
    if kind not in MEMORY or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(f'expected a target such as "v5e:2x4" or "h100:1x1x8", of {", ".join(MEMORY)}; got {name!r}.')
    return name


def find(name: str) -> Target:
    """The devices that a name such as "v5e:2x4" or "h100:1x1x8" stands for."""
    kind, _, shape = check(name).partition(":")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if kind == "h100":
        described = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology=shape)
    else:
        # One chip is less than the smallest host has, unless told.
        single = {"chips_per_host_bounds": [1, 1, 1]} if set(shape) <= {"1", "x"} else {}
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **single)
    return Target(name, list(described.devices), MEMORY[kind])
