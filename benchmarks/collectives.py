"""Collectives in compiled programs; `python -m benchmarks.collectives` prints the rows."""

import json
import os
import subprocess
import sys

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optaccum
from benchmarks.report import Section, Table, Target
from benchmarks.scanning import HAND, OPTAX, make_grad_fn
from benchmarks.sizes import TINY
from benchmarks.transformer import loss_fn, make_params, make_tokens

NUM_DEVICES = 8
WITHOUT, WITH = "optaccum", "optaccum, data_axes"


def run(tiny: bool) -> Section:
    command = [sys.executable, "-m", "benchmarks.collectives", str(int(tiny))]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    table = Table(
        ("all-reduce instructions", "in loops", "outside", "executed"), [tuple(map(str, row)) for row in rows]
    )
    in_loops, outside = next(row[1:3] for row in rows if row[0] == f"{WITH}, scanned layers")
    text = (
        f"A transformer of 2 layers, data-parallel over {NUM_DEVICES} simulated devices, k = 4, as compiled. "
        "Executed: those in loops once for each micro-batch, and in scanned layers for each layer too."
    )
    targets = [
        Target("data_axes: all-reduces in loops", in_loops, 0),
        Target("data_axes: all-reduces outside", outside, 1),
    ]
    return Section("Collectives", text, [table], targets)


def count(tiny: bool) -> list[tuple[str, int, int, str]]:
    mesh = jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    k, sizes = 4, TINY._replace(batch_size=32, num_layers=2)
    rows = []
    for scanned in (True,) if tiny else (True, False):
        params = jax.device_put(make_params(sizes, scanned), NamedSharding(mesh, P()))
        tokens = jax.device_put(make_tokens(sizes), NamedSharding(mesh, P("data")))
        grad_fns = {
            name: make_grad_fn(name, k, sizes.batch_size) for name in ((HAND,) if tiny else (HAND, OPTAX, WITHOUT))
        }
        grad_fns[WITH] = optaccum.value_and_grad(loss_fn, num_microbatches=k, data_axes="data")
        for name, grad_fn in grad_fns.items():
            counts = optaccum.count_collectives(jax.jit(grad_fn).lower(params, tokens).compile())
            in_loops, outside = counts.in_loops["all-reduce"], counts.outside["all-reduce"]
            executed = str(outside) if not in_loops else f"{'≥ ' if scanned else ''}{outside + k * in_loops}"
            kind = "scanned" if scanned else "unrolled"
            rows.append((f"{name}, {kind} layers", in_loops, outside, executed))
    return rows


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    print(json.dumps(count(tiny=sys.argv[1] == "1")))
