"""One micro-batch at a time, as a loader gives them: the batch grows with the tokens seen.

A byte-level transformer reads Python's standard library, or any text (--data), paragraph by paragraph. Each
micro-batch is one call to the training step, whatever its number of bytes:

  weight         every byte counts the same: optaccum.apply_gradients(..., weight=bytes in the micro-batch)
  ramp-up        windows of 1, 2, 4, ... micro-batches, doubled every --ramp bytes: optaccum.by_weight
  end of epoch   the last window is short; optaccum.flush takes its update rather than lose it or let it leak
  noise scale    beside it, the batch size that the gradients' own noise asks for: optaccum.noise_scale

With --checkpoints, a run that was killed goes on in the middle of its window, to the same parameters.
It prints what it did and draws figures/streaming_loader.png.
"""

import argparse
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import (
    BLUE,
    DEFAULT,
    ORANGE,
    VERMILION,
    advance,
    make_parser,
    open_checkpoints,
    positive_int,
    progress_bar,
    restore,
    save,
    save_figure,
)
from _sharded_transformer import Size, init_params, loss_fn
from _text import as_rows, paragraphs, read_documents
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

import optaccum

PyTree = Any


class Result(NamedTuple):
    """What a run was, earlier starts included. Lists have an entry per update."""

    first_micro_step: int  # 0, or where a checkpoint let it go on
    tokens: float  # weight that all updates together had: optaccum.weight_total
    losses: list[float]  # nats per byte, over the update's window
    totals: list[float]  # bytes emitted so far
    batch_sizes: list[float]  # bytes in the window
    micro_steps: list[int]  # in the window
    noise_scales: list[float]  # bytes; NaN while unknown
    flushed: list[int]  # the updates that flush made
    params: PyTree


class Programs(NamedTuple):
    """What is compiled."""

    tx: optax.GradientTransformationExtraArgs
    step: Callable[..., Any]  # params, opt_state, rows -> params, opt_state, loss, bytes
    flush: Callable[..., Any]  # params, opt_state -> params, opt_state


def micro_batches(rows: np.ndarray, size: int, seed: int, first: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Micro-batches without end from the `first` on, and whether each is its epoch's last.

    The last one of an epoch is filled up with rows of padding, which have no bytes and so no weight.
    """
    per_epoch = math.ceil(len(rows) / size)
    for i in range(first, 2**62):
        epoch, index = divmod(i, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        chosen = rows[order[index * size : (index + 1) * size]]
        yield np.pad(chosen, [(0, size - len(chosen)), (0, 0)]), index == per_epoch - 1


def make_programs(learning_rate: float, ramp: int, max_k: int) -> Programs:
    """The training step and the flush, around one accumulating optimizer."""
    schedule = optax.warmup_constant_schedule(0.0, learning_rate, 10)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))

    def micro_steps(tokens):  # emitted so far
        return jnp.minimum(2.0 ** jnp.floor(tokens / ramp), max_k)

    tx = optaccum.accumulate(inner, optaccum.by_weight(micro_steps), track_noise_scale=True)

    def mean_loss(params, rows):
        loss = loss_fn(params, rows)
        return loss.total / loss.weight, loss.weight

    def step(params, opt_state, rows):
        (loss, tokens), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, rows)
        params, opt_state = optaccum.apply_gradients(tx, grads, opt_state, params, weight=tokens)
        return params, opt_state, loss, tokens

    def flush(params, opt_state):
        updates, opt_state = optaccum.flush(tx, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return Programs(tx, jax.jit(step, donate_argnums=(0, 1)), jax.jit(flush, donate_argnums=(0, 1)))


def note(record: dict[str, Any], loss: float, tokens: float) -> None:
    """Write a micro-step down as part of the open window."""
    record["window"].append((loss, tokens))


def note_update(record: dict[str, Any], opt_state: PyTree, *, flushed: bool) -> None:
    """Close the window: write down the update that has just been taken."""
    losses, tokens = zip(*record["window"], strict=True)
    if flushed:
        record["flushed"].append(len(record["losses"]))
    record["losses"].append(float(np.average(losses, weights=tokens)))
    record["totals"].append(optaccum.weight_total(opt_state))
    record["batch_sizes"].append(sum(tokens))
    record["micro_steps"].append(len(tokens))
    record["noise_scales"].append(float(optaccum.noise_scale(opt_state).noise_scale))
    record["window"] = []


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What every start of a run must have in common."""
    apart = ("figure", "checkpoints", "checkpoint_every", "epochs")
    return {key: str(value) for key, value in vars(args).items() if key not in apart}


def train(rows: np.ndarray, args: argparse.Namespace) -> Result:
    """All epochs, or what an earlier start left of them."""
    programs = make_programs(args.learning_rate, args.ramp, args.max_k)
    params = init_params(Size(args.layers, args.width, args.heads, args.length), jax.random.key(args.seed))
    state = {"params": params, "opt_state": programs.tx.init(params)}
    lists = ("window", "losses", "totals", "batch_sizes", "micro_steps", "noise_scales", "flushed")
    record = {"settings": settings_of(args)} | {name: [] for name in lists}
    manager = open_checkpoints(args.checkpoints)
    first, state, record = restore(manager, state, record)
    params, opt_state = state["params"], state["opt_state"]

    last = args.epochs * math.ceil(len(rows) / args.microbatch_size)
    bar = progress_bar("training", args.epochs * len(rows), initial=first * args.microbatch_size, unit="paragraph")
    stream = micro_batches(rows, args.microbatch_size, args.seed, first)
    for i, (micro_batch, ends_epoch) in zip(range(first + 1, last + 1), stream, strict=False):
        params, opt_state, loss, tokens = programs.step(params, opt_state, micro_batch)
        note(record, float(loss), float(tokens))
        if optaccum.has_updated(opt_state):
            note_update(record, opt_state, flushed=False)
        elif ends_epoch:
            params, opt_state = programs.flush(params, opt_state)
            note_update(record, opt_state, flushed=True)
        if i % args.checkpoint_every == 0 or i == last:
            save(manager, i, {"params": params, "opt_state": opt_state}, record)
        advance(bar, int(micro_batch.any(axis=1).sum()), loss=float(loss))
    bar.close()
    if manager is not None:
        manager.close()
    kept = {name: record[name] for name in lists if name != "window"}
    return Result(first_micro_step=first, tokens=optaccum.weight_total(opt_state), params=params, **kept)


def draw(result: Result, path: pathlib.Path) -> None:
    """The loss by update; the batch that the ramp gives, beside the one that the noise asks for."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss_axes, size_axes = figure.subplots(1, 2)
    totals = np.array(result.totals)
    loss_axes.plot(totals, result.losses, color=BLUE, linewidth=1.2)
    loss_axes.set(xlabel="bytes seen", ylabel="training loss (nats per byte)", title="One point per update")
    noise = np.array(result.noise_scales)
    size_axes.plot(totals, np.where(noise > 0, noise, np.nan), color=ORANGE, label="gradient noise scale")
    size_axes.plot(totals, result.batch_sizes, ".", color=BLUE, markersize=4, label="batch size")
    short = result.flushed
    size_axes.plot(
        totals[short],
        np.array(result.batch_sizes)[short],
        "v",
        color=VERMILION,
        label="flushed at an epoch's end",
    )
    size_axes.set(yscale="log", xlabel="bytes seen", ylabel="bytes", title="Batch size and noise scale")
    size_axes.legend(frameon=False)
    loss_axes.xaxis.set_major_formatter(EngFormatter())
    for axis in size_axes.xaxis, size_axes.yaxis:
        axis.set_major_formatter(EngFormatter())
    save_figure(figure, path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, figure="figures/streaming_loader.png")
    add = parser.add_argument
    add("--data", type=pathlib.Path, help="text file or folder (default: Python's standard library)")
    add("--max-bytes", type=positive_int, default=300_000, help=f"of text to read {DEFAULT}")
    add("--epochs", type=positive_int, default=3, help=DEFAULT)
    add("--microbatch-size", type=positive_int, default=8, help=f"paragraphs per call {DEFAULT}")
    add("--ramp", type=positive_int, default=60_000, help=f"bytes after which the window doubles {DEFAULT}")
    add("--max-k", type=positive_int, default=12, help=f"most micro-batches in a window {DEFAULT}")
    add("--learning-rate", type=float, default=2e-3, help=f"after 10 updates {DEFAULT}")
    add("--length", type=positive_int, default=128, help=f"most bytes of a row {DEFAULT}")
    add("--layers", type=positive_int, default=2, help=DEFAULT)
    add("--width", type=positive_int, default=64, help=DEFAULT)
    add("--heads", type=positive_int, default=4, help=DEFAULT)
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"--heads must divide --width {args.width}, got {args.heads}")
    return args


def main(argv: Sequence[str] | None = None) -> Result:
    """Train, print and draw."""
    args = parse(argv)
    rows = as_rows(paragraphs(read_documents(args.data, args.max_bytes)), args.length)
    result = train(rows, args)
    print(
        f"{len(result.losses):,} updates from {sum(result.micro_steps):,} micro-batches, "
        f"{len(result.flushed)} of them flushed at an epoch's end; {result.tokens:,.0f} bytes counted.\n"
        f"The largest window had {max(result.batch_sizes):,.0f} bytes; the noise scale is "
        f"{result.noise_scales[-1]:,.0f} bytes."
    )
    draw(result, args.figure)
    return result


if __name__ == "__main__":
    main()
