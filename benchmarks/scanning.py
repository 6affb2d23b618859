"""Scanning: value and gradients of a whole batch, in k micro-batches."""

import functools
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import optaccum
from benchmarks import pytorch, sizes as all_sizes
from benchmarks.measure import MIB, copies, interleave, median, num_bytes, peak_bytes, ratio, temp_bytes
from benchmarks.report import Section, Table, Target, milliseconds, times
from benchmarks.sizes import Sizes
from benchmarks.transformer import loss_fn, make_params, make_tokens

WHOLE, HAND, OPTAX = "no accumulation", "hand-written scan", "optax microbatch"
OURS, CARRY, LOSS = "optaccum", "optaccum, in_place=False", "optaccum.microbatched"
NAMES = (WHOLE, HAND, OPTAX, OURS, CARRY, LOSS)


def _hand_written(loss: Callable[..., Any], k: int) -> Callable[..., Any]:
    def grad_fn(params, batch):
        def step(total, micro_batch):
            out = jax.value_and_grad(loss)(params, micro_batch)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, out), None

        zeros = jnp.zeros([]), jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        total, _ = lax.scan(step, zeros, batch.reshape(k, -1, batch.shape[1]))
        return jax.tree.map(lambda x: x / k, total)

    return grad_fn


def make_grad_fn(name: str, k: int, batch_size: int, loss: Callable[..., Any] = loss_fn) -> Callable[..., Any]:
    """(params, batch) -> (loss, gradients)."""
    if name == WHOLE:
        return jax.value_and_grad(loss)
    if name == HAND:
        return _hand_written(loss, k)
    if name == OPTAX:
        mean = optax.microbatching.AccumulationType.MEAN
        return optax.microbatching.microbatch(jax.value_and_grad(loss), 1, batch_size // k, mean)
    if name == LOSS:
        return jax.value_and_grad(optaccum.microbatched(loss, num_microbatches=k))
    return optaccum.value_and_grad(loss, num_microbatches=k, in_place=None if name == OURS else False)


class Contender(NamedTuple):
    run: Callable[[], Any]
    temp: int | None  # bytes


def make_contender(name: str, k: int, sizes: Sizes, scanned: bool, step: bool = False) -> Contender:
    """The gradients alone, or with `step` a training step: the gradients and AdamW, with donated arguments."""
    params, tokens = make_params(sizes, scanned), make_tokens(sizes)
    grad_fn = make_grad_fn(name, k, sizes.batch_size)
    if not step:
        compiled = jax.jit(grad_fn).lower(params, tokens).compile()
        return Contender(functools.partial(compiled, params, tokens), temp_bytes(compiled))

    def train_step(params, state, tokens):
        _, grads = grad_fn(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    optimizer = optax.adamw(1e-3)
    held = [copies(params), optimizer.init(params)]
    compiled = jax.jit(train_step, donate_argnums=(0, 1)).lower(*held, tokens).compile()

    def run_step():
        held[:] = compiled(*held, tokens)
        return held

    return Contender(run_step, temp_bytes(compiled))


def run(sizes: Sizes) -> Section:
    tables, targets = [], []
    with_torch = pytorch.is_installed() and jax.default_backend() == "cpu"
    for scanned, step in sizes.scan_forms:
        contenders = {name: make_contender(name, sizes.k, sizes, scanned, step) for name in NAMES}
        if with_torch and step and not scanned:
            contenders |= {name: Contender(run, None) for name, run in pytorch.training_steps(sizes).items()}
        seconds = interleave({name: c.run for name, c in contenders.items()}, sizes.scan_repeats)
        tables.append(_table(contenders, seconds, scanned, step))
        targets += _targets(contenders, seconds, scanned, step)
    batch_table, batch_target = _batch_copies(sizes)
    tables.append(batch_table)
    targets.append(batch_target)
    count_table, count_target = _counts(sizes)
    lowering_table, lowering_target = _lowering(sizes)
    tables += [count_table, lowering_table]
    targets += [count_target, lowering_target]
    compile_table, compile_ratio = _compile_times(sizes)
    tables.append(compile_table)
    targets.append(Target(f"compile time, k = {sizes.many} over k = 2", compile_ratio, 1.1))
    size = num_bytes(make_params(sizes, True))
    text = (
        f"A transformer of {sizes.num_layers} layers, width {sizes.width}, {sizes.dtype} parameters "
        f"({size / MIB:.0f} MiB), each layer rematerialised; {sizes.batch_size} sequences of {sizes.length} "
        f"tokens in k = {sizes.k} micro-batches; float32 sums but in `microbatch`, which sums in the "
        "gradients' own dtype. `microbatch` is given `AccumulationType.MEAN`, its default being the sum. "
        "No accumulation is the whole batch at once; overhead is time over that, PyTorch's over PyTorch's own. "
        "A training step is the gradients and AdamW, with donated arguments."
    )
    return Section("Scanning", text, tables, targets)


def title_of(scanned: bool, step: bool) -> str:
    return ("scanned" if scanned else "unrolled") + " layers, " + ("a training step" if step else "gradients")


def _table(contenders: dict[str, Contender], seconds: dict[str, list[float]], scanned: bool, step: bool) -> Table:
    on_gpu = jax.default_backend() != "cpu"
    header = [title_of(scanned, step), "time", "× hand-written", "overhead", "temp", "× hand-written"]
    header += ["device peak"] if on_gpu else []
    rows = []
    for name, (_, temp) in contenders.items():
        at_once = pytorch.WHOLE if name in pytorch.STEPS else WHOLE
        cells = [name, milliseconds(median(seconds[name])), times(ratio(seconds, name, HAND))]
        cells.append(times(ratio(seconds, name, at_once)))
        cells += ["", ""] if temp is None else [f"{temp / MIB:.1f} MiB", times(temp / contenders[HAND].temp)]
        cells += [_peak(name, scanned, step)] if on_gpu else []
        rows.append(tuple(cells))
    return Table(tuple(header), rows)


def _targets(
    contenders: dict[str, Contender], seconds: dict[str, list[float]], scanned: bool, step: bool
) -> list[Target]:
    kind, peers = title_of(scanned, step), (OPTAX, HAND)
    memory_limit = 0.4 if scanned and not step else 1.01
    less_memory = max(contenders[OURS].temp / contenders[peer].temp for peer in peers)
    less_time = max(ratio(seconds, OURS, peer) for peer in peers)
    return [
        Target(f"{kind}: temp over the better of the two", less_memory, memory_limit),
        Target(f"{kind}: time over the better of the two", less_time, 1.05),
    ]


def _batch_copies(sizes: Sizes) -> tuple[Table, Target]:
    """Temp memory where the batch is large and the model small: how often is the batch there?"""
    examples, features = 512 * sizes.k, 1024
    params = jax.ShapeDtypeStruct((features, 8), jnp.float32)
    batch = jax.ShapeDtypeStruct((examples, features), jnp.float32)

    def loss(params, batch):
        return jnp.mean(jnp.tanh(batch @ params))

    def batches(name):
        grad_fn = make_grad_fn(name, sizes.k, examples, loss)
        return temp_bytes(jax.jit(grad_fn).lower(params, batch).compile()) / (4 * examples * features)

    numbers = {name: batches(name) for name in (HAND, OPTAX, OURS)}
    header = (f"a batch of {4 * examples * features / MIB:.0f} MiB through one layer", "temp, in batches")
    table = Table(header, [(name, f"{number:.2f}") for name, number in numbers.items()])
    return table, Target("batches in temp, over one micro-batch", numbers[OURS] * sizes.k, 1.5)


def _counts(sizes: Sizes) -> tuple[Table, Target]:
    """One program for every count of the caller's micro-batches: what do few of many cost?"""
    params, n = make_params(sizes, True), 2 * sizes.k
    tokens = make_tokens(sizes._replace(batch_size=n * sizes.batch_size // sizes.k))
    tokens = tokens.reshape(n, -1, tokens.shape[1])
    grad_fn = optaccum.value_and_grad(
        lambda params, tokens, count: loss_fn(params, tokens), presplit=True, count_argnum=2
    )
    compiled = jax.jit(grad_fn).lower(params, tokens, n).compile()
    counts = {f"{count} of {n}": functools.partial(compiled, params, tokens, count) for count in (1, n // 2, n)}
    seconds = interleave(counts, sizes.scan_repeats)
    first, *_, last = seconds
    rows = [tuple(milliseconds(median(times)) for times in seconds.values())]
    table = Table(("count_argnum, one program", *seconds), [("time", *rows[0])])
    return table, Target(f"{first}, over a share of all", ratio(seconds, first, last) * n, 1.3)


def _lowering(sizes: Sizes) -> tuple[Table, Target]:
    """Tracing and lowering many unrolled layers: how often are they walked?"""
    small = sizes._replace(num_layers=24 if sizes.scan_repeats > 3 else 2, width=32, length=4, vocabulary=64)
    params, tokens = make_params(small, False), make_tokens(small)

    def lower(name, depth):
        """Seconds, with nothing remembered and no garbage collected meanwhile, from so deep in the stack."""
        if depth:
            return lower(name, depth - 1)
        jax.clear_caches()
        gc.collect()
        gc.disable()
        begin = time.perf_counter()
        jax.jit(make_grad_fn(name, small.k, small.batch_size)).lower(params, tokens)
        end = time.perf_counter()
        gc.enable()
        return end - begin

    # CPython allocates frames in chunks; a loop whose frames cross from one to the next takes up to half as long again.
    depths = range(0, 3 * sizes.scan_repeats, 2)
    hand, ours = (min(lower(name, depth) for depth in depths) for name in (HAND, OURS))
    header = (f"{small.num_layers} unrolled layers", HAND, OURS)
    table = Table(header, [("least time to lower", milliseconds(hand), milliseconds(ours))])
    return table, Target("time to lower, over the hand-written scan", ours / hand, 1.4)


def _compile_times(sizes: Sizes) -> tuple[Table, float]:
    """Seconds to trace and compile, few micro-batches and many; the better of two tries."""
    small = sizes._replace(batch_size=sizes.many, length=4, num_layers=2, width=32, vocabulary=64)
    params, tokens = make_params(small, True), make_tokens(small)

    def seconds(k):
        def once():
            begin = time.perf_counter()
            jax.jit(make_grad_fn(OURS, k, small.batch_size)).lower(params, tokens).compile()
            return time.perf_counter() - begin

        return min(once() for _ in range(min(3, sizes.scan_repeats)))

    few, many = seconds(2), seconds(sizes.many)
    header = ("optaccum, a small transformer", "k = 2", f"k = {sizes.many}")
    return Table(header, [("time to compile", milliseconds(few), milliseconds(many))]), many / few


def sweep(sizes: Sizes) -> dict[str, Any]:
    """Seconds and temp bytes against k."""
    names = (OPTAX, HAND, OURS)
    out: dict[str, Any] = {"names": names, "k": [], "parameters": num_bytes(make_params(sizes, True)) / MIB}
    for k in sizes.sweep_k:
        if k > sizes.batch_size:
            continue
        contenders = {name: make_contender(name, k, sizes, True) for name in names}
        seconds = interleave({name: c.run for name, c in contenders.items()}, min(3, sizes.scan_repeats))
        out["k"].append(
            (
                k,
                {name: median(seconds[name]) for name in names},
                {name: contenders[name].temp / MIB for name in names},
            )
        )
    return out


def _peak(name: str, scanned: bool, step: bool) -> str:
    """The device's peak memory in a process that runs this contender alone."""
    command = [sys.executable, "-m", "benchmarks.scanning", name, str(int(scanned)), str(int(step))]
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    if done.returncode:
        return "out of memory" if "RESOURCE_EXHAUSTED" in done.stderr else "failed"
    peak = json.loads(done.stdout.splitlines()[-1])
    return "unknown" if peak is None else f"{peak / MIB:.0f} MiB"


if __name__ == "__main__":
    scanned, step = (bool(int(flag)) for flag in sys.argv[2:])
    contender = make_contender(sys.argv[1], all_sizes.GPU.k, all_sizes.GPU, scanned, step)
    jax.block_until_ready(contender.run())
    print(json.dumps(peak_bytes()))
