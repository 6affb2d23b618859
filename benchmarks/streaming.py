"""Streaming: what a window of k micro-steps costs beside the gradients themselves."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optaccum
from benchmarks import pytorch
from benchmarks.measure import MIB, copies, interleave, median, num_bytes, over_sum, ratio, temp_bytes
from benchmarks.report import Section, Table, Target, milliseconds, times
from benchmarks.sizes import Sizes
from benchmarks.transformer import loss_fn, make_params as make_transformer, make_tokens

MULTI, HAND, OURS = "optax.MultiSteps", "hand-written pair", "apply_gradients"
STANDARD, TORCH = "update + apply_updates", "PyTorch, in place"
OPTIONS, HAND_OPTIONS = "apply_gradients, options on", "hand-written pair, options on"
STANDARD_OPTIONS = "update + apply_updates, options on"
TWO_CALLS, ONE_CALL = "value_and_grad + apply_gradients", "value_and_update"
READS = "each gradient read once, k times"
INNER = {"AdamW": lambda: optax.adamw(1e-3), "Muon": lambda: optax.contrib.muon(1e-3)}


class Contender(NamedTuple):
    window: Callable[[], Any]
    temp: int | None  # bytes, of the larger program


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_params(width: int, num_layers: int) -> dict[str, Any]:
    """12 * width^2 parameters for each layer, in the shapes of a transformer's."""
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width)}
    shapes["down"] = (4 * width, width)
    keys = iter(jax.random.split(jax.random.key(0), num_layers * len(shapes)))
    return {
        f"layer{i}": {name: jax.random.normal(next(keys), shape) * 0.02 for name, shape in shapes.items()}
        for i in range(num_layers)
    }


def _windows(step: Any, state: Any, grads: Any, params: Any, k: int, *args: Any) -> Contender:
    """Windows of k calls of `step(params, state, grads, *args) -> (params, state)`.

    Donated arguments come in the order in which they return: JAX pairs buffers of one shape in order, and
    parameters that return in the buffer of a sum cost copies.
    """
    held = [copies(params), state]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*held, grads, *args).compile()

    def window():
        for _ in range(k):
            held[:] = compiled(*held, grads, *args)
        return held

    return Contender(window, temp_bytes(compiled))


def _standard(tx: Any, k: int, grads: Any, params: Any, **extra_args: Any) -> Contender:
    def step(params, state, grads, extra_args):
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    return _windows(step, tx.init(params), grads, params, k, extra_args)


def _ours(tx: Any, k: int, grads: Any, params: Any, **extra_args: Any) -> Contender:
    def step(params, state, grads, extra_args):
        return optaccum.apply_gradients(tx, grads, state, params, **extra_args)

    return _windows(step, tx.init(params), grads, params, k, extra_args)


def _hand_written(inner: Any, k: int, grads: Any, params: Any) -> Contender:
    """What one writes without a library: a function that adds, and one that updates and clears the sum."""

    def add(grad_sum, grads):
        return jax.tree.map(jnp.add, grad_sum, grads)

    def update(params, state, grad_sum):
        updates, state = inner.update(jax.tree.map(lambda g: g * (1 / k), grad_sum), state, params)
        return optax.apply_updates(params, updates), state, jax.tree.map(jnp.zeros_like, grad_sum)

    held = [copies(params), inner.init(params), jax.tree.map(jnp.zeros_like, params)]
    add = jax.jit(add, donate_argnums=0).lower(held[2], grads).compile()
    update = jax.jit(update, donate_argnums=(0, 1, 2)).lower(*held).compile()

    def window():
        for _ in range(k):
            held[2] = add(held[2], grads)
        held[:] = update(*held)
        return held

    return Contender(window, max(map(temp_bytes, (add, update))))


def _hand_written_options(inner: Any, k: int, grads: Any, params: Any) -> Contender:
    """The pair with weights, a check for non-finite gradients and a weighted average of a value."""

    def add(sums, grads, weight, value):
        finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
        terms = jax.tree.map(lambda g: weight * g, grads), weight, weight * value
        return jax.tree.map(lambda s, term: jnp.where(finite, s + term, s), sums, terms)

    def update(params, state, sums):
        grad_sum, weight_sum, value_sum = sums
        mean = jax.tree.map(lambda g: g / weight_sum, grad_sum)
        updates, state = inner.update(mean, state, params, value=value_sum / weight_sum)
        return optax.apply_updates(params, updates), state, jax.tree.map(jnp.zeros_like, sums)

    inner = optax.with_extra_args_support(inner)
    zeros = jax.tree.map(jnp.zeros_like, params), jnp.float32(0), jnp.float32(0)
    held, scalars = [copies(params), inner.init(params), zeros], (jnp.float32(3), jnp.float32(1))
    add = jax.jit(add, donate_argnums=0).lower(held[2], grads, *scalars).compile()
    update = jax.jit(update, donate_argnums=(0, 1, 2)).lower(*held).compile()

    def window():
        for _ in range(k):
            held[2] = add(held[2], grads, *scalars)
        held[:] = update(*held)
        return held

    return Contender(window, max(map(temp_bytes, (add, update))))


def _reads(k: int, grads: Any) -> Contender:
    """What a check costs that must have seen all of a gradient before any of it is added: reading it."""
    read = jax.jit(lambda grads: [jnp.sum(g) for g in jax.tree.leaves(grads)]).lower(grads).compile()
    return Contender(lambda: [read(grads) for _ in range(k)], temp_bytes(read))


def make_contenders(inner: Any, k: int, width: int, num_layers: int, names: tuple[str, ...]) -> dict[str, Contender]:
    params = make_params(width, num_layers)
    grads = jax.tree.map(lambda x: x * 0.01, params)
    plain = optaccum.accumulate(inner, k)
    with_options = optaccum.accumulate(
        inner, k, should_skip_update_fn=optax.skip_not_finite, averaged_extra_args=("value",)
    )
    extra_args = {"weight": jnp.float32(3), "value": jnp.float32(1)}
    makers = {
        MULTI: lambda: _standard(optax.MultiSteps(inner, k), k, grads, params),
        HAND: lambda: _hand_written(inner, k, grads, params),
        OURS: lambda: _ours(plain, k, grads, params),
        STANDARD: lambda: _standard(plain, k, grads, params),
        OPTIONS: lambda: _ours(with_options, k, grads, params, **extra_args),
        STANDARD_OPTIONS: lambda: _standard(with_options, k, grads, params, **extra_args),
        HAND_OPTIONS: lambda: _hand_written_options(inner, k, grads, params),
        READS: lambda: _reads(k, grads),
    }
    return {name: makers[name]() for name in names}


def run(sizes: Sizes) -> Section:
    tables, targets = [], []
    with_torch = {}
    if jax.default_backend() == "cpu" and pytorch.is_installed():
        with_torch = {
            TORCH: Contender(
                pytorch.streaming_window(make_params(sizes.stream_width, sizes.stream_layers), sizes.k), None
            )
        }
    for name, width in {"AdamW": sizes.stream_width, "Muon": sizes.muon_width}.items():
        names = (MULTI, HAND, OURS, STANDARD, OPTIONS, STANDARD_OPTIONS)
        names += (HAND_OPTIONS, READS) if name == "AdamW" else ()
        contenders = make_contenders(INNER[name](), sizes.k, width, sizes.stream_layers, names)
        size = num_bytes(make_params(width, sizes.stream_layers))
        contenders |= with_torch if name == "AdamW" else {}
        seconds = interleave({n: c.window for n, c in contenders.items()}, sizes.stream_repeats)
        tables.append(_table(name, size, contenders, seconds))
        targets += _targets(name, size, contenders, seconds)
    table, more_targets = _from_micro_batches(sizes)
    tables.append(table)
    targets += more_targets
    text = (
        f"A window of k = {sizes.k} micro-steps and one update, float32, gradients given, arguments donated. "
        "Temp is what the compiled program allocates beside its arguments and results, in copies of the "
        "parameters. The hand-written pair is `add` and `update` (which clears the sum), jitted apart. "
        "Options on: weights, `skip_not_finite` and an averaged extra argument. A skipped micro-step must leave the "
        "sum as it was, so all of a gradient is read before any of it is added: twice in all, and the row with those "
        "reads alone shows what no implementation is spared. PyTorch adds each gradient "
        "in place (`torch._foreach_add_`) and runs the fused AdamW every k-th time, with the same threads. "
        "The last table is of whole windows, gradients and all: a transformer of scanned layers, rematerialised."
    )
    return Section("Streaming", text, tables, targets)


def _from_micro_batches(sizes: Sizes) -> tuple[Table, list[Target]]:
    """Windows from micro-batches to parameters: the gradient made first, or added to the sum as it arises."""
    tx = optaccum.accumulate(INNER["AdamW"](), sizes.k)
    params = make_transformer(sizes, True)
    tokens = make_tokens(sizes)[: sizes.batch_size // sizes.k]

    def two_calls(params, state, tokens):
        _, grads = jax.value_and_grad(loss_fn)(params, tokens)
        return optaccum.apply_gradients(tx, grads, state, params)

    def one_call(params, state, tokens):
        return optaccum.value_and_update(loss_fn, tx)(params, state, tokens)[1:]

    steps = {TWO_CALLS: two_calls, ONE_CALL: one_call}
    windows = {n: _windows(step, tx.init(params), tokens, params, sizes.k) for n, step in steps.items()}
    seconds = interleave({name: window for name, (window, _) in windows.items()}, sizes.scan_repeats)
    size = num_bytes(params)
    rows = [
        (
            name,
            milliseconds(median(seconds[name])),
            times(ratio(seconds, name, TWO_CALLS)),
            f"{temp / size:.2f}",
        )
        for name, (_, temp) in windows.items()
    ]
    table = Table((f"{size / MIB:.0f} MiB of parameters, AdamW", "window", f"× {TWO_CALLS}", "temp"), rows)
    return table, [
        Target("value_and_update: time over the two calls", ratio(seconds, ONE_CALL, TWO_CALLS), 1.05),
        Target("value_and_update: temp over the two calls", windows[ONE_CALL].temp / windows[TWO_CALLS].temp, 0.7),
    ]


def _table(name: str, size: int, contenders: dict[str, Contender], seconds: dict[str, list[float]]) -> Table:
    header = (f"{name}, {size / 4e6:.1f} M parameters", "window", "× hand-written", "MultiSteps ×", "temp")
    rows = []
    for contender, (_, temp) in contenders.items():
        rows.append(
            (
                contender,
                milliseconds(median(seconds[contender])),
                times(ratio(seconds, contender, HAND)),
                times(ratio(seconds, MULTI, contender)),
                "" if temp is None else f"{temp / size:.2f}",
            )
        )
    return Table(header, rows)


def _targets(name: str, size: int, contenders: dict[str, Contender], seconds: dict[str, list[float]]) -> list[Target]:
    if name == "Muon":
        return [
            Target("Muon: MultiSteps over apply_gradients", ratio(seconds, MULTI, OURS), 6, at_most=False),
            Target("Muon: options on over off", ratio(seconds, OPTIONS, OURS), 1.1),
        ]
    targets = [
        Target("apply_gradients over the hand-written pair", ratio(seconds, OURS, HAND), 1.05),
        Target("MultiSteps over apply_gradients", ratio(seconds, MULTI, OURS), 12, at_most=False),
        Target("apply_gradients: temp, parameter copies", contenders[OURS].temp / size, 0.05),
        Target("MultiSteps over update + apply_updates", ratio(seconds, MULTI, STANDARD), 2.5, at_most=False),
        Target("update + apply_updates: temp, parameter copies", contenders[STANDARD].temp / size, 1.01),
        Target("update + apply_updates: options on over off", ratio(seconds, STANDARD_OPTIONS, STANDARD), 1.1),
        Target("apply_gradients: options on over off", ratio(seconds, OPTIONS, OURS), 1.1),
        Target("options on over off and the reads", over_sum(seconds, OPTIONS, (OURS, READS)), 1.1),
        Target("options on over the hand-written pair with them", ratio(seconds, OPTIONS, HAND_OPTIONS), 1.05),
        Target("options on: temp, parameter copies", contenders[OPTIONS].temp / size, 0.05),
    ]
    if TORCH in seconds:
        targets.append(Target("apply_gradients over PyTorch in place", ratio(seconds, OURS, TORCH), 1.3))
    return targets


def sweep(sizes: Sizes) -> dict[str, Any]:
    """Seconds per window and temp bytes, against k and against parameters, of AdamW."""
    names = (MULTI, STANDARD, HAND, OURS)
    middle = sizes.sweep_widths[len(sizes.sweep_widths) // 2]
    out: dict[str, Any] = {
        "names": names,
        "k": [],
        "parameters": [],
        "middle": _num_parameters(middle, sizes),
    }
    for k in sizes.sweep_k:
        out["k"].append((k, *_point(k, middle, names, sizes)))
    for width in sizes.sweep_widths:
        out["parameters"].append((_num_parameters(width, sizes), *_point(sizes.k, width, names, sizes)))
    return out


def _num_parameters(width: int, sizes: Sizes) -> int:
    return 12 * width**2 * sizes.stream_layers


@functools.cache  # the two sweeps cross
def _point(k: int, width: int, names: tuple[str, ...], sizes: Sizes) -> tuple[dict, dict]:
    contenders = make_contenders(INNER["AdamW"](), k, width, sizes.stream_layers, names)
    repeats = min(3, sizes.stream_repeats)
    seconds = interleave({name: c.window for name, c in contenders.items()}, repeats)
    return (
        {name: median(seconds[name]) for name in names},
        {name: contenders[name].temp / MIB for name in names},
    )
