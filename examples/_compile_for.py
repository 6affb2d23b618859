"""What a step would need on devices that are not here, from their own compiler: memory, and what crosses."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import _targets
import numpy as np
from jax.sharding import AxisType, Mesh

import optaccum

PyTree = Any


class Setting(NamedTuple):
    """A way to shard, in the fewest micro-batches that fit."""

    num_microbatches: int
    num_bytes: int  # that each device needs
    wire_bytes: int  # that each device sends in a call that updates, at most


class CompiledFor(NamedTuple):
    """A step as compiled for a target."""

    num_devices: int
    num_bytes: int  # that each device needs
    donated_bytes: int  # of the arguments, in whose buffers results come back
    collectives: optaccum.CollectiveCounts
    plan: optaccum.MicrobatchPlan | None  # None where no limit was given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to compile for."""
    group = parser.add_argument_group("devices that are not here")
    group.add_argument(
        "--compile-for",
        type=_target_name,
        metavar="TARGET",
        help='say what one call needs on each device of "v5e:16x16", "h100:1x1x8" or the like; train nothing',
    )
    group.add_argument(
        "--memory",
        type=float,
        nargs="?",
        const=0.0,
        metavar="GIB",
        help="find the fewest micro-batches that fit into it (default: all that a device has)",
    )


def _target_name(text: str) -> str:
    try:
        return _targets.check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_mesh(target: _targets.Target, model_devices: int, batch_size: int) -> Mesh:
    """The target's devices, with axes "data" and "model"; exits where they or the batch do not divide."""
    number = len(target.devices)
    if number % model_devices or batch_size % (number // model_devices):
        raise SystemExit(
            f"error: --model-devices {model_devices} must divide the {number} devices of {target.name}, and what is "
            f"left of them --batch-size {batch_size}."
        )
    devices = np.array(target.devices).reshape(-1, model_devices)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def report(
    target: _targets.Target,
    make_step: Callable[[int], Any],
    step_args: tuple[Any, ...],
    num_microbatches: int,
    rows_per_device: int,
    memory: float | None,
) -> CompiledFor:
    """Compile, print and return what one call needs.

    Args:
      target: what to compile for.
      make_step: from the number of micro-batches to a jitted step.
      step_args: its arguments, shapes with shardings.
      num_microbatches: of the step to describe; `memory` chooses others.
      rows_per_device: what each device splits into micro-batches.
      memory: GiB on each device, 0 for all that it has, None for no plan.
    """
    plan = None
    if memory is not None:
        limit = memory * _targets.GIB or target.memory
        plan = optaccum.plan_microbatches(make_step, step_args, batch_size=rows_per_device, memory_limit=limit)
        num_microbatches = plan.num_microbatches
        print(plan)
    compiled = make_step(num_microbatches).lower(*step_args).compile()
    account, counts = compiled.memory_analysis(), optaccum.count_collectives(compiled)
    kept, temp = account.argument_size_in_bytes, account.temp_size_in_bytes
    new = account.output_size_in_bytes - account.alias_size_in_bytes
    print(f"{target.name}, {len(target.devices)} devices, --microbatches {num_microbatches}; on each device:")
    for name, size in {"arguments": kept, "results beside them": new, "temporary": temp}.items():
        print(f"  {name:20}{size / 2**20:12,.1f} MiB")
    print(f"  {'together':20}{(kept + new + temp) / 2**20:12,.1f} MiB of {target.memory / 2**20:,.0f}")
    for where, names, sizes in (
        ("in loops", counts.in_loops, counts.bytes_in_loops),
        ("outside", counts.outside, counts.bytes_outside),
    ):
        crossing = [f"{names[n]} {n} ({sizes[n] / 2**20:,.1f} MiB)" for n in names]
        print(f"  crosses {where}: {', '.join(crossing) or 'nothing'}")
    return CompiledFor(len(target.devices), kept + new + temp, account.alias_size_in_bytes, counts, plan)


def compare(
    steps: dict[str, Callable[[int], Any]],
    step_args: tuple[Any, ...],
    mesh: Mesh,
    num_layers: int,
    rows_per_device: int,
    memory: float,
) -> dict[str, Setting]:
    """Compile every way to shard, print them as a table; returns those that fit.

    Args:
      steps: by the way's name, from the number of micro-batches to a jitted step.
      step_args: their arguments, shapes with shardings.
      mesh: whose "data" axis the parameters are sharded over.
      num_layers: that the model scans over.
      rows_per_device: what each device splits into micro-batches.
      memory: bytes on each device.
    """
    found = {}
    print("--fsdp   micro-batches   MiB needed   MiB on the wire")
    for name, make_step in steps.items():
        try:
            plan = optaccum.plan_microbatches(make_step, step_args, batch_size=rows_per_device, memory_limit=memory)
        except ValueError as error:
            print(f"{name:9}{error}")
            continue
        number = plan.num_microbatches
        counts = optaccum.count_collectives(make_step(number).lower(*step_args).compile())
        # What is in loops is in the one over layers, within the one over micro-batches; little is outside the first.
        sent = _wire_bytes(counts.bytes_outside, mesh.shape["data"])
        sent += number * num_layers * _wire_bytes(counts.bytes_in_loops, mesh.shape["data"])
        found[name] = setting = Setting(number, int(dict(plan.probes)[number]), sent)
        print(f"{name:9}{number:13}{setting.num_bytes / 2**20:13,.1f}{sent / 2**20:18,.1f}")
    return found


def _wire_bytes(num_bytes: dict[str, int], num_devices: int) -> int:
    """What each device sends for collectives whose results on it are of so many bytes."""
    factors = {"all-reduce": 2, "reduce-scatter": num_devices - 1}
    return sum(factors.get(name, 1) * size for name, size in num_bytes.items())
