"""A byte-level transformer learns real text: documents of all lengths, in micro-batches, counted by bytes.

The text is that of Python's own standard library, or any file or folder (--data). Its paragraphs are the
documents. Padded to one length, they put different numbers of bytes into micro-batches of equally many
documents: the loss is optaccum.WeightedMean(total, bytes), so that every byte of an update counts the same.

An update takes some calls (--calls-per-update; optaccum.accumulate and optaccum.apply_gradients), each with a
part of the documents, which optaccum.value_and_grad scans in micro-batches: a window of windows. Checkpoints
fall between calls, also in the middle of an update; a run that was killed and is started again ends with the
same parameters to the last bit.

--experts adds a mixture of experts, and two terms to the loss that have denominators of their own: a router
z-loss per routed token and an imbalance per document. --compare trains three ways side by side: the whole
batch at once, optaccum, and the mean of the micro-batches' means.

It prints a table and draws figures/language_model.png.
"""

import argparse
import math
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import (
    BLUE,
    DEFAULT,
    GREY,
    VERMILION,
    PyTree,
    advance,
    make_parser,
    open_checkpoints,
    positive_int,
    progress_bar,
    restore,
    save,
    save_figure,
)
from _text import as_rows, paragraphs, read_documents
from _transformer import REMAT, Size, Transformer, has_host_memory
from matplotlib.figure import Figure

import optaccum

PROMPT = 8  # bytes at the start of a document that are read, not predicted: nothing comes before them
Z_COEFFICIENT, IMBALANCE_COEFFICIENT = 1e-3, 1e-2


class Way(NamedTuple):
    """A way to take the recipe's update."""

    name: str
    calls: int  # per update
    tx: optax.GradientTransformation
    # params, opt_state, documents -> params, opt_state, loss, weight
    step: Callable[[PyTree, PyTree, Any], tuple[PyTree, PyTree, jax.Array, jax.Array]]


class Result(NamedTuple):
    """What became of one way."""

    name: str
    losses: list[float]  # one per update
    bits_per_byte: float  # on held-out documents
    distance: float  # of the parameters from the whole batch's, relative; NaN without --compare
    params: PyTree


def batch_of(rows: np.ndarray, update: int, batch_size: int, seed: int) -> np.ndarray:
    """The documents of one update, a function of its number: a resumed run needs no loader's state."""
    epoch, index = divmod(update, len(rows) // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    return rows[order[index * batch_size :][:batch_size]]


def loss_terms(model: Transformer, params: PyTree, batch: Any) -> dict[str, optaccum.WeightedMean]:
    """Terms that add up, each with its own denominator: bytes predicted, tokens routed, documents."""
    inputs, targets = batch[:, :-1].astype(jnp.int32), batch[:, 1:].astype(jnp.int32)
    is_token = targets != 0
    outputs: Any = model.apply(params, inputs, is_token)
    logits, routers = outputs
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    is_predicted = is_token & (jnp.arange(targets.shape[1]) >= PROMPT)
    total = jnp.where(is_predicted, losses, 0.0).sum()
    terms = {"bytes": optaccum.WeightedMean(total, is_predicted.sum())}
    if routers is not None:  # one of each layer
        z, imbalance = Z_COEFFICIENT * routers.z.sum(), IMBALANCE_COEFFICIENT * routers.imbalance.sum()
        terms["router z"] = optaccum.WeightedMean(z, routers.num_tokens.sum())
        terms["imbalance"] = optaccum.WeightedMean(imbalance, len(batch) * model.size.layers)
    return terms


def plain_loss(model: Transformer, params: PyTree, batch: Any) -> jax.Array:
    """The same as one number: what a program without accumulation differentiates."""
    terms = loss_terms(model, params, batch).values()
    return sum((term.total / jnp.maximum(term.weight, 1) for term in terms), jnp.zeros([]))


def recipe(num_updates: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer, the same for every way."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(20, num_updates // 5), num_updates)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1))


def accumulated(model: Transformer, inner: optax.GradientTransformation, calls: int, n: int) -> Way:
    """Every byte counts the same: in the scan by WeightedMean, between calls by the weight."""
    grad_fn = optaccum.value_and_grad(partial(loss_terms, model), num_microbatches=n, return_info=True)
    tx = optaccum.accumulate(inner, calls)

    def step(params, opt_state, batch):
        loss, grads, info = grad_fn(params, batch)
        params, opt_state = optaccum.apply_gradients(tx, grads, opt_state, params, weight=info.weight)
        return params, opt_state, loss, info.weight

    return Way("optaccum", calls, tx, step)


def one_call(name: str, grad_fn: Callable[..., Any], tx: optax.GradientTransformation) -> Way:
    """An update from one batch's gradient."""

    def step(params, opt_state, batch):
        loss, grads = grad_fn(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, jnp.ones([])

    return Way(name, 1, tx, step)


def make_ways(model: Transformer, args: argparse.Namespace) -> list[Way]:
    """What is trained: optaccum, and with --compare the whole batch and the mean of means."""
    tx, n, loss_fn = recipe(args.updates), args.microbatches, partial(plain_loss, model)
    ways = [accumulated(model, tx, args.calls_per_update, n // args.calls_per_update)]
    if args.compare:
        # A scalar loss stands for a mean over documents: micro-batches count by documents, not by bytes.
        mean_of_means = optaccum.value_and_grad(loss_fn, num_microbatches=n)
        ways += [
            one_call("whole batch", jax.value_and_grad(loss_fn), tx),
            one_call("mean of means", mean_of_means, tx),
        ]
    return ways


def train(
    ways: Sequence[Way], params: PyTree, rows: np.ndarray, args: argparse.Namespace
) -> tuple[list[PyTree], dict[str, list[float]]]:
    """Train every way on the same documents; returns their parameters and losses."""
    # Each way has its own copy of the parameters, since steps donate them.
    states = [(jax.tree.map(jnp.copy, params), way.tx.init(params)) for way in ways]
    steps = [jax.jit(way.step, donate_argnums=(0, 1)) for way in ways]
    record: dict[str, Any] = {
        "settings": settings_of(args),
        "losses": {way.name: [] for way in ways},
        "window": [],
    }
    manager = open_checkpoints(args.checkpoints)
    start, states, record = restore(manager, states, record)

    num_calls = args.updates * args.calls_per_update
    documents_per_call = args.batch_size / args.calls_per_update
    bar = progress_bar(
        "training", args.updates * args.batch_size, initial=int(start * documents_per_call), unit="document"
    )
    for call in range(start, num_calls):
        update, index = divmod(call, args.calls_per_update)
        batch = batch_of(rows, update, args.batch_size, args.seed)
        is_last = index == args.calls_per_update - 1
        for i, (way, step) in enumerate(zip(ways, steps, strict=True)):
            if way.calls == 1 and not is_last:
                continue  # takes the whole batch when the others have it
            part = batch[index :: args.calls_per_update] if way.calls > 1 else batch
            params, opt_state, loss, weight = step(*states[i], part)
            states[i] = params, opt_state
            window = record["window"] if i == 0 else []
            window.append((float(loss), float(weight)))
            if is_last:
                record["losses"][way.name].append(weighted_mean(window))
                window.clear()
            if i == 0:
                advance(bar, len(range(index, args.batch_size, args.calls_per_update)), loss=float(loss))
        if (call + 1) % args.checkpoint_every == 0 or call + 1 == num_calls:
            save(manager, call + 1, states, record)
    bar.close()
    if manager is not None:
        manager.close()
    return [params for params, _ in states], record["losses"]


def weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in pairs) / max(sum(weight for _, weight in pairs), 1)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that began."""
    apart = ("figure", "checkpoints", "checkpoint_every")
    return {key: str(value) for key, value in vars(args).items() if key not in apart}


def bits_per_byte(model: Transformer, trained: Sequence[PyTree], rows: np.ndarray) -> list[float]:
    terms_fn = jax.jit(partial(loss_terms, model))
    terms = [terms_fn(params, rows)["bytes"] for params in trained]
    return [float(term.total / term.weight) / math.log(2) for term in terms]


def distance(a: PyTree, b: PyTree) -> float:
    """How far the parameters a are from b, relative to b's norm."""
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b))


STYLES = {"whole batch": (GREY, 7), "mean of means": (VERMILION, 2), "optaccum": (BLUE, 1.5)}


def draw(results: Sequence[Result], path: pathlib.Path) -> None:
    """The losses on top of each other, and with --compare how far each strays from the whole batch's."""
    by_name = {result.name: result for result in results}
    whole = by_name.get("whole batch")
    figure = Figure(figsize=(11, 4.2) if whole else (7, 4.2), layout="constrained")
    curves, *others = np.atleast_1d(figure.subplots(1, 2 if whole else 1))
    for name, (color, width) in STYLES.items():
        if name not in by_name:
            continue
        losses = by_name[name].losses
        updates = range(1, len(losses) + 1)
        curves.plot(updates, losses, color=color, linewidth=width, label=name, solid_capstyle="butt")
        if whole is not None and name != "whole batch":
            gap = np.abs(np.subtract(losses, whole.losses)) / np.abs(whole.losses)
            others[0].plot(updates, np.maximum(gap, 1e-9), color=color, linewidth=1.5, label=name)
    curves.set(xlabel="update", ylabel="training loss (nats per byte)", title="The training")
    curves.legend(frameon=False)
    for axes in others:
        axes.set(
            yscale="log",
            xlabel="update",
            ylabel="relative difference",
            title="The loss, beside the whole batch's",
        )
        axes.legend(frameon=False)
    save_figure(figure, path)


def table(results: Sequence[Result]) -> str:
    lines = [f"{'':14} {'bits per byte':>14} {'parameters: distance':>22}"]
    lines += [f"{'':14} {'(held out)':>14} {'from the whole batch':>22}"]
    for r in results:
        away = "-" if math.isnan(r.distance) or r.name == "whole batch" else f"{r.distance:.1e}"
        lines.append(f"{r.name:14} {r.bits_per_byte:14.3f} {away:>22}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, figure="figures/language_model.png")
    parser.add_argument("--data", type=pathlib.Path, help="text file or folder (default: Python's standard library)")
    parser.add_argument("--max-bytes", type=positive_int, default=4_000_000, help=f"of text to read {DEFAULT}")
    parser.add_argument("--updates", type=positive_int, default=150, help=f"optimizer updates {DEFAULT}")
    parser.add_argument("--batch-size", type=positive_int, default=64, help=f"documents per update {DEFAULT}")
    parser.add_argument("--microbatches", type=positive_int, default=8, help=f"micro-batches per update {DEFAULT}")
    parser.add_argument("--calls-per-update", type=positive_int, help="calls per update (default: 4; 1 with --experts)")
    parser.add_argument("--length", type=positive_int, default=128, help=f"most bytes of a document {DEFAULT}")
    parser.add_argument("--layers", type=positive_int, default=4, help=DEFAULT)
    parser.add_argument("--width", type=positive_int, default=64, help=DEFAULT)
    parser.add_argument("--heads", type=positive_int, default=4, help=DEFAULT)
    parser.add_argument("--experts", type=int, default=0, help="per layer; 0 for a dense layer (default)")
    parser.add_argument(
        "--remat",
        choices=REMAT,
        default="none",
        help="what the backward pass computes again: nothing; each layer (full); what is no matrix product "
        f"(dots); each layer, from its input offloaded to the host's memory {DEFAULT}",
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; all sums stay float32")
    parser.add_argument("--compare", action="store_true", help="train the whole batch and the mean of means too")
    args = parser.parse_args(argv)
    args.calls_per_update = args.calls_per_update or (1 if args.experts else math.gcd(4, args.microbatches))
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.batch_size < args.microbatches:
        parser.error(f"--batch-size {args.batch_size} cannot make {args.microbatches} micro-batches")
    if args.microbatches % args.calls_per_update:
        parser.error(f"--calls-per-update must divide --microbatches {args.microbatches}, got {args.calls_per_update}")
    if args.width % args.heads:
        parser.error(f"--heads must divide --width {args.width}, got {args.heads}")
    if args.length <= PROMPT:
        parser.error(f"--length must be over {PROMPT}, got {args.length}")
    if args.experts < 0 or args.experts == 1:
        parser.error(f"--experts expects 0, or 2 or more; got {args.experts}")
    if args.experts and args.calls_per_update > 1:
        parser.error(
            "--experts needs --calls-per-update 1: its terms have denominators of their own, which the first "
            "gradient needs from the whole update"
        )
    if args.remat == "offload" and not has_host_memory():
        parser.error(
            f"--remat offload: the {jax.default_backend()} backend has no pinned_host memory to offload to; "
            "take --remat full"
        )


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Train; returns a result per way, optaccum first."""
    args = parse(argv)
    dtype = jnp.bfloat16 if args.bf16 else jnp.float32
    model = Transformer(Size(args.layers, args.width, args.heads, args.length, args.experts, args.remat, dtype))
    rows = as_rows(paragraphs(read_documents(args.data, args.max_bytes)), args.length)
    rows = np.random.default_rng(args.seed).permutation(rows)
    num_held_out = min(256, len(rows) // 5)
    held_out, rows = rows[:num_held_out], rows[num_held_out:]
    if len(rows) < args.batch_size:
        raise SystemExit(f"error: {len(rows)} documents do not fill --batch-size {args.batch_size}")

    inputs = jnp.zeros((1, args.length), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(args.seed), inputs, inputs == 0)
    lengths = (rows[:, 1:] != 0).sum(1)
    print(
        f"{len(rows):,} documents of {lengths.mean():.0f} bytes (standard deviation {lengths.std():.0f}); "
        f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters"
    )
    ways = make_ways(model, args)
    trained, losses = train(ways, params, rows, args)
    by_name = dict(zip((way.name for way in ways), trained, strict=True))
    results = [
        Result(
            name,
            losses[name],
            bits,
            distance(params, by_name["whole batch"]) if args.compare else math.nan,
            params,
        )
        for (name, params), bits in zip(by_name.items(), bits_per_byte(model, trained, held_out), strict=True)
    ]
    print(f"\n{args.updates} updates of {args.batch_size} documents in {args.microbatches} micro-batches\n")
    print(f"{table(results)}\n")
    draw(results, args.figure)
    return results


if __name__ == "__main__":
    main()
