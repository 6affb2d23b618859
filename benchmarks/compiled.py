"""What the compilers of TPU v5e and H100 make of the library and its peers; no accelerator is needed.

`make bench-compiled` writes the section of RESULTS.md, table by table, and leaves the others as they are;
`make bench-compiled ARGS="'AdamW, streaming'"` that table alone. The tests in tests/compilers assert on such programs.
"""

import functools
import importlib.metadata
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm

import optaccum
from benchmarks import scanning, sizes as all_sizes, streaming, transformer
from benchmarks.measure import MIB, num_bytes, temp_bytes
from benchmarks.report import Table, find_section, replace_section, to_markdown
from benchmarks.traffic import Traffic, count_traffic
from examples._targets import find

RESULTS = pathlib.Path(__file__).parent / "RESULTS.md"
TITLE = "As compiled for TPU v5e and H100"
TARGETS = {"TPU v5e": "v5e:1x1", "H100": "h100:1x1x1"}
POD_TARGETS = {"TPU v5e": "v5e:2x4", "H100": "h100:1x1x8"}
# At least 100 MiB of parameters, since TPU's compiler hides smaller buffers in other memory.
SIZES = all_sizes.CPU._replace(
    stream_width=1024, stream_layers=4, width=1536, num_layers=4, vocabulary=8192, length=512
)

ALONE, HAND, OPTAX, OURS = "one micro-batch alone", scanning.HAND, scanning.OPTAX, scanning.OURS
DATA_AXES = "optaccum, data_axes"
STREAMING = (streaming.MULTI, streaming.HAND, streaming.OURS, streaming.STANDARD)
INNER = {
    "AdamW": lambda: optax.adamw(1e-3),
    "Lion": lambda: optax.lion(1e-3),
    "momentum": lambda: optax.sgd(1e-3, momentum=0.9),
    "Muon": lambda: optax.contrib.muon(1e-3),
}


class Program(NamedTuple):
    """A function to compile, with the shapes of its arguments, the parameters (or their sum) first."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    batch: int | None = None  # the argument that is sharded over devices

    def compile(self, target: str, axis_type: AxisType = AxisType.Auto) -> Any:
        devices = find(target).devices
        mesh = Mesh(devices, ("data",), axis_types=(axis_type,))
        args = [
            jax.tree.map(functools.partial(_placed, NamedSharding(mesh, P("data") if i == self.batch else P())), arg)
            for i, arg in enumerate(self.args)
        ]
        with jax.set_mesh(mesh):
            return jax.jit(self.fn, donate_argnums=self.donate).lower(*args).compile()


def _placed(sharding: NamedSharding, x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def temp_copies(compiled: Any, params: Any) -> float:
    """Temp memory in copies of the parameters."""
    return temp_bytes(compiled) / num_bytes(params)


def streaming_programs(name: str, inner: Any, k: int = SIZES.k) -> list[Program]:
    """What one call of a window runs; of the hand-written pair, what each call runs and what the last one runs."""
    params = jax.eval_shape(lambda: streaming.make_params(SIZES.stream_width, SIZES.stream_layers))
    if name == streaming.HAND:
        state = jax.eval_shape(inner.init, params)
        add = Program(lambda total, grads: jax.tree.map(jnp.add, total, grads), (params, params), (0,))

        def update(params, state, total):
            updates, state = inner.update(jax.tree.map(lambda g: g * (1 / k), total), state, params)
            return optax.apply_updates(params, updates), state, jax.tree.map(jnp.zeros_like, total)

        return [add, Program(update, (params, state, params), (0, 1, 2))]
    multi: Any = optax.MultiSteps(inner, k)
    tx = multi if name == streaming.MULTI else optaccum.accumulate(inner, k)

    def step(params, state, grads):
        if name == streaming.OURS:
            return optaccum.apply_gradients(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return [Program(step, (params, jax.eval_shape(tx.init, params), params), (0, 1))]


def _loss(params: Any, tokens: jax.Array) -> jax.Array:
    return transformer.loss_fn(params, tokens, jnp.dtype(jnp.bfloat16))


def _weighted_loss(params: Any, tokens: jax.Array) -> optaccum.WeightedMean:
    """The mean over tokens that are no padding, as a ratio of sums."""
    weight = jnp.sum(tokens != 0)
    return optaccum.WeightedMean(_loss(params, tokens) * weight, weight)


def transformer_program(name: str, *, scanned: bool, step: bool) -> Program:
    """The gradients of a transformer's loss, or a training step with AdamW, on one device."""
    params = jax.eval_shape(lambda: transformer.make_params(SIZES, scanned))
    rows = SIZES.batch_size // SIZES.k if name == ALONE else SIZES.batch_size
    tokens = jax.ShapeDtypeStruct((rows, SIZES.length + 1), jnp.int32)
    grad_fn = scanning.make_grad_fn(scanning.WHOLE if name == ALONE else name, SIZES.k, SIZES.batch_size, _loss)
    if not step:
        return Program(grad_fn, (params, tokens))

    optimizer = optax.adamw(1e-3)

    def train_step(params, state, tokens):
        _, grads = grad_fn(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Program(train_step, (params, jax.eval_shape(optimizer.init, params), tokens), (0, 1))


def data_parallel_program(name: str, num_devices: int = 8) -> Program:
    """The gradients of a scanned transformer's loss, of as many rows on each device as on one alone."""
    params = jax.eval_shape(lambda: transformer.make_params(SIZES, True))
    batch_size = num_devices * SIZES.batch_size
    tokens = jax.ShapeDtypeStruct((batch_size, SIZES.length + 1), jnp.int32)
    if name in (OURS, DATA_AXES):
        axes = "data" if name == DATA_AXES else None
        grad_fn = optaccum.value_and_grad(_weighted_loss, num_microbatches=SIZES.k, data_axes=axes)
    else:
        grad_fn = scanning.make_grad_fn(name, SIZES.k, batch_size, _loss)
    return Program(grad_fn, (params, tokens), batch=1)


def tables() -> dict[str, Callable[[], Table]]:
    """Makers of the section's tables, by their first heading."""
    makers: dict[str, Callable[[], Table]] = {
        f"{name}, streaming": functools.partial(_streaming_table, name, inner) for name, inner in INNER.items()
    }
    for scanned, step in ((True, False), (True, True), (False, False), (False, True)):
        makers[scanning.title_of(scanned, step)] = functools.partial(_transformer_table, scanned, step)
    return makers | {"8 devices, gradients": _data_parallel_table}


def _streaming_table(name: str, make_inner: Callable[[], Any]) -> Table:
    columns = ("temp", "each call", "update", f"window of {SIZES.k}")
    header = [f"{name}, streaming", *(f"{device}: {column}" for device in TARGETS for column in columns)]
    rows = []
    for contender in STREAMING:
        cells = [contender]
        for target in TARGETS.values():
            programs = streaming_programs(contender, make_inner())
            size = num_bytes(programs[0].args[0])
            compiled = [program.compile(target) for program in programs]
            traffic = [count_traffic(program.as_text()) for program in compiled]
            if contender == streaming.HAND:
                traffic = [Traffic(traffic[0].each_call, sum(traffic[1]))]
            each, emit = (number / size for number in traffic[0])
            temp = max(temp_bytes(program) for program in compiled) / size
            cells += [f"{temp:.2f}", f"{each:.1f}", f"{emit:.1f}", f"{SIZES.k * each + emit:.0f}"]
        rows.append(tuple(cells))
    return Table(tuple(header), rows)


def _transformer_table(scanned: bool, step: bool) -> Table:
    header = (scanning.title_of(scanned, step), *(f"{device}: temp" for device in TARGETS))
    rows = []
    for contender in (ALONE, HAND, OPTAX, OURS):
        program, cells = transformer_program(contender, scanned=scanned, step=step), [contender]
        for target in TARGETS.values():
            cells.append(f"{temp_copies(program.compile(target), program.args[0]):.2f}")
        rows.append(tuple(cells))
    return Table(header, rows)


def _data_parallel_table() -> Table:
    columns = ("temp", "crosses in loops", "outside")
    header = [
        "8 devices, gradients",
        *(f"{device}: {column}" for device in POD_TARGETS for column in columns),
    ]
    rows = []
    for contender in (HAND, OPTAX, OURS, DATA_AXES):
        program, cells = data_parallel_program(contender), [contender]
        for target in POD_TARGETS.values():
            compiled = program.compile(target)
            counts = optaccum.count_collectives(compiled)
            cells += [
                f"{temp_copies(compiled, program.args[0]):.2f}",
                *map(_listed, (counts.in_loops, counts.outside), counts[2:]),
            ]
        rows.append(tuple(cells))
    return Table(tuple(header), rows)


def _listed(counts: dict[str, int], sizes: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}, {sizes[name] / MIB:.0f} MiB" for name, n in counts.items()) or "none"


def _text() -> str:
    scanned, streamed = (
        num_bytes(program.args[0])
        for program in (
            transformer_program(OURS, scanned=True, step=False),
            streaming_programs(OURS, INNER["AdamW"]())[0],
        )
    )
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu", "jax-cuda12-pjrt", "optax")
    )
    return (
        f"By the accelerators' own compilers, on a machine without either ({versions}); `make bench-compiled` writes "
        "this section. Nothing is run, so there are no times. Temp is in copies of the parameters.\n\n"
        f"Streaming: {streamed / MIB:.0f} MiB of float32 parameters, gradients given, parameters and state donated. "
        "The other columns are passes over a copy of the parameters in the device's main memory, read or written, "
        "counted from the compiled program: what each instruction reads and writes outside fusions, a TPU's on-chip "
        "memory aside. Each call: in every call; update: what the call that ends the window adds; and the sum over a "
        "window. (An addition alone makes three: two reads and a write.)\n\n"
        f"Transformers: {SIZES.num_layers} layers of width {SIZES.width}, {scanned / MIB:.0f} MiB of float32 "
        f"parameters, computing in bf16, each layer rematerialised; {SIZES.batch_size} sequences of {SIZES.length} "
        f"tokens in {SIZES.k} micro-batches, sums in float32. A training step is the gradients and AdamW, with donated "
        "arguments. "
        "On 8 devices each has as many rows as the one; ours is a loss weighted by tokens. What crosses: instructions, "
        "and the bytes of their results on one device, a loop's body counted once."
    )


def main(titles: list[str]) -> None:
    """Make the tables of these titles, all where there are none; the section keeps its other tables."""
    makers = tables()
    if unknown := set(titles) - set(makers):
        raise SystemExit(f"error: no table {', '.join(sorted(unknown))}; choose from {', '.join(makers)}")
    jax.config.update("jax_platforms", "cpu")
    for title in (progress := tqdm(titles or list(makers), unit="table")):
        progress.set_description(title)
        made = to_markdown(makers[title]())
        results = RESULTS.read_text()
        old = find_section(results, TITLE).split("\n\n")
        blocks = {name: block for name in makers for block in old if block.startswith(f"| {name} |")}
        blocks[title] = made
        section = "\n\n".join([f"## {TITLE}", _text(), *(blocks[name] for name in makers if name in blocks)])
        RESULTS.write_text(replace_section(results, section))


if __name__ == "__main__":
    main(sys.argv[1:])
