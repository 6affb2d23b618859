"""Two processes over gloo: a window with and without `data_axes`, parameters replicated and sharded (FSDP).

`python -m benchmarks.processes ADDRESS INDEX TINY` is one of the two; the first prints the times.
"""

import functools
import json
import os
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optaccum
from benchmarks import sizes as all_sizes
from benchmarks.measure import interleave, median, ratio
from benchmarks.report import Section, Table, milliseconds, times
from benchmarks.sizes import Sizes
from benchmarks.transformer import loss_fn, make_params, make_tokens

NUM_PROCESSES, TIMEOUT = 2, 900


def run(tiny: bool) -> Section:
    replicated, sharded = json.loads(_run_both(tiny).splitlines()[-1])
    header = ("k", "without data_axes", "with data_axes", "without / with")
    cells = [(str(k), milliseconds(a), milliseconds(b), times(r)) for k, (a, b), (r,) in replicated]
    sharded_header = ("k", "as JAX places it", "window", "sharded sums", "JAX / window", "JAX / sharded sums")
    sharded_cells = [(str(k), *map(milliseconds, ms), *map(times, ratios)) for k, ms, ratios in sharded]
    text = (
        "Two processes on this machine over gloo on loopback, the same transformer (scanned layers, "
        f"{_sizes(tiny).batch_size} sequences), value and gradients. Without `data_axes` gradients cross in "
        "the loop, once for each layer and micro-batch; with it once. Then the same with parameters sharded over both "
        "(FSDP): gathered and reduced for each layer and micro-batch, as JAX places it; gathered and reduce-scattered "
        "once (`param_specs`); gathered once and reduced for each micro-batch (`shard_sums`)."
    )
    tables = [Table(header, cells), Table(sharded_header, sharded_cells)]
    return Section("Two processes", text, tables, [])


def _run_both(tiny: bool) -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.processes", address]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen([*command, str(i), str(int(tiny))], stdout=subprocess.PIPE, text=True, env=env)
        for i in range(NUM_PROCESSES)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise RuntimeError("a process of the two failed; its error is above.")
    return outputs[0]


def _sizes(tiny: bool) -> Sizes:
    return all_sizes.TINY if tiny else all_sizes.CPU._replace(length=16)


def _measure(sizes: Sizes) -> list[list[tuple[int, list[float], list[float]]]]:
    """For parameters replicated and sharded, per k: seconds of each contender, and of the first over each other."""
    mesh = jax.make_mesh((NUM_PROCESSES,), ("data",), axis_types=(AxisType.Auto,))
    tokens = np.split(np.asarray(make_tokens(sizes)), NUM_PROCESSES)[jax.process_index()]
    tokens = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), tokens)
    params = jax.device_get(make_params(sizes, True))
    whole = jax.tree.map(lambda _: P(), params)
    in_parts = jax.tree.map(lambda x: P(*(None,) * (x.ndim - 1), "data"), params)  # layers lead, where there are any
    window = {"data_axes": "data", "param_specs": in_parts}
    settings = [(whole, [{}, {"data_axes": "data"}]), (in_parts, [{}, window, window | {"shard_sums": True}])]
    return [_measure_setting(sizes, mesh, params, tokens, *setting) for setting in settings]


def _measure_setting(
    sizes: Sizes, mesh: Any, params: Any, tokens: Any, specs: Any, options: list[dict[str, Any]]
) -> list[tuple[int, list[float], list[float]]]:
    params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs)
    rows = []
    for k in sizes.process_k:
        contenders = {}
        for each in options:
            grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=k, **each)
            compiled = jax.jit(grad_fn).lower(params, tokens).compile()
            contenders[str(each)] = functools.partial(compiled, params, tokens)
        seconds = interleave(contenders, sizes.process_repeats)
        first, *others = contenders
        rows.append((k, [median(seconds[name]) for name in contenders], [ratio(seconds, first, x) for x in others]))
    return rows


def main(address: str, index: str, tiny: str) -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, NUM_PROCESSES, int(index), initialization_timeout=120)
    print(json.dumps(_measure(_sizes(bool(int(tiny))))))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
