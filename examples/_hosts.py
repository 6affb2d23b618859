"""Many hosts, one program: how they meet, that they agree, and what process 0 says for all."""

import argparse
import collections
import contextlib
import json
import signal
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
from tqdm import tqdm

_ROOM = 8192  # bytes for a host's settings: all hosts gather arrays of one size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How to find the other hosts."""
    group = parser.add_argument_group("hosts")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="several hosts, which JAX finds by itself (TPU pods, Slurm, Open MPI, Kubernetes)",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, where JAX cannot tell")
    group.add_argument("--num-processes", type=int, metavar="N", help="with --coordinator")
    group.add_argument("--process-id", type=int, metavar="I", help="with --coordinator: from 0 to N - 1")
    group.add_argument(
        "--timeout",
        type=int,
        default=100,
        metavar="SECONDS",
        help="without a sign of the other hosts, after which to give up (default: %(default)s)",
    )
    group.add_argument("--simulate-devices", type=int, metavar="N", help="pretend that this host's CPU is N devices")


def start(args: argparse.Namespace) -> None:
    """Meet the other hosts. Comes before anything that touches a device."""
    if args.simulate_devices and jax.config.values["jax_num_cpu_devices"] != args.simulate_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.simulate_devices)
    if args.simulate_devices and args.coordinator:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if args.distributed or args.coordinator:
        jax.distributed.initialize(
            coordinator_address=args.coordinator,
            num_processes=args.num_processes,
            process_id=args.process_id,
            initialization_timeout=args.timeout,
            heartbeat_timeout_seconds=args.timeout,
            shutdown_timeout_seconds=args.timeout,
        )
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise SystemExit(f"error: every host must have as many devices as the others; they have {dict(counts)}.")


def make_mesh(model_devices: int, batch_size: int, num_microbatches: int) -> Mesh:
    """All devices of all hosts; those that share a layer are on one host, where links are fastest.

    Exits with a clear message where a batch does not divide over them.
    """
    local = jax.local_device_count()
    if local % model_devices:
        raise SystemExit(f"error: --model-devices {model_devices} must divide a host's {local} devices.")
    shape = (jax.device_count() // model_devices, model_devices)
    if batch_size % shape[0] or batch_size < shape[0] * num_microbatches:
        raise SystemExit(
            f"error: --batch-size {batch_size} must divide over the {shape[0]} devices along the data axis, "
            f"with a row for each of their --microbatches {num_microbatches}."
        )
    return Mesh(np.array(jax.devices()).reshape(shape), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def fingerprint(array: np.ndarray) -> str:
    """A few letters that differ where arrays do."""
    return f"{array.shape[0]} rows, {zlib.crc32(array.tobytes()):08x}"


def check_agreement(settings: dict[str, Any]) -> None:
    """Compare this host's settings with those of all others; where they differ, all exit and say in what.

    Programs that differ would wait for each other for ever.
    """
    text = json.dumps(settings, sort_keys=True, default=str).encode()
    if len(text) > _ROOM:
        raise ValueError(f"expected settings of up to {_ROOM} bytes; got {len(text)}.")
    texts = multihost_utils.process_allgather(np.frombuffer(text.ljust(_ROOM), np.uint8))
    first, *others = [json.loads(bytes(row)) for row in np.reshape(texts, (-1, _ROOM))]
    different = [
        f"{name} is {first.get(name)!r} on host 0, {other.get(name)!r} on host {host}"
        for host, other in enumerate(others, 1)
        for name in first | other
        if first.get(name) != other.get(name)
    ]
    if different:
        raise SystemExit(f"error: the hosts' settings differ: {'; '.join(different)}. Start them all alike.")


def wait_for_all(name: str, timeout: int) -> None:
    """Wait until every host is here; an error where one is not after `timeout` seconds."""
    hosts = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes(name, timeout=timeout, processes=hosts)


def steps_in(folder: epath.Path | None) -> list[int]:
    """The calls after which there are checkpoints."""
    names = [path.name for path in folder.iterdir()] if folder is not None and folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


@contextlib.contextmanager
def sigterm_noted() -> Iterator[list[bool]]:
    """A list that is empty until a SIGTERM comes."""
    noted: list[bool] = []
    before = signal.signal(signal.SIGTERM, lambda *_: noted.append(True))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)


def say(message: str) -> None:
    """Print, on process 0 alone, past a progress bar."""
    if jax.process_index() == 0:
        tqdm.write(message)
