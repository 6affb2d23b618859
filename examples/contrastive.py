"""Two towers learn what belongs together, by the whole batch's contrastive loss, in a micro-batch's memory.

The left and the right half of each of scikit-learn's handwritten digits (real scans, bundled with it) go
through a network each. InfoNCE asks of every half which of all other halves in the batch is its own: a loss
that does not split into micro-batches, where there are fewer to choose from. The same step, taken three ways:

  whole batch      jax.value_and_grad on all pairs at once
  optaccum         optaccum.chunked: the towers' outputs are the whole batch's, computed (and in the backward
                   pass computed again) one micro-batch at a time
  per micro-batch  the mean of the micro-batches' own losses: what accumulating such a loss comes to

An update takes some calls (--calls-per-update; optaccum.accumulate and optaccum.apply_gradients), each a
batch; checkpoints fall between calls, also in the middle of an update.

It prints a table and draws figures/contrastive.png.
"""

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
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
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import optaccum

TEST_SIZE = 256  # pairs
TEMPERATURE = 0.1


class Pairs(NamedTuple):
    """A data set, a batch or a micro-batch."""

    left: np.ndarray  # shape=(n, 8, 4), float32 in [0, 1]
    right: np.ndarray  # shape=(n, 8, 4), float32 in [0, 1]


class Way(NamedTuple):
    """A way to get the gradient of a batch."""

    name: str
    grad_fn: Callable[[PyTree, Any], Any]  # params, pairs -> loss, grads


class Result(NamedTuple):
    """What was measured of one way."""

    name: str
    test_losses: list[float]  # InfoNCE of the test pairs, one per update
    distances: list[float]  # of the parameters from the whole batch's, relative, one per update
    found: float  # of the test pairs' left halves, how many find their right one
    temp_bytes: int  # scratch memory of the compiled step
    params: PyTree


class Tower(nn.Module):
    """From half a digit to a point on the sphere."""

    width: int

    @nn.compact
    def __call__(self, half: jax.Array) -> jax.Array:
        x = half.reshape(len(half), -1)
        for _ in range(3):
            x = nn.gelu(nn.Dense(self.width)(x))
        x = nn.Dense(32)(x)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Towers(nn.Module):
    """One tower for each half."""

    width: int

    @nn.compact
    def __call__(self, pairs: Any) -> tuple[jax.Array, jax.Array]:
        return Tower(self.width, name="left")(pairs.left), Tower(self.width, name="right")(pairs.right)


def info_nce(left: jax.Array, right: jax.Array) -> jax.Array:
    """The mean over pairs, both ways round: van den Oord et al., 2018, https://arxiv.org/abs/1807.03748."""
    logits = left @ right.T / TEMPERATURE
    own = jnp.arange(len(logits))
    ways_round = [optax.softmax_cross_entropy_with_integer_labels(x, own).mean() for x in (logits, logits.T)]
    return sum(ways_round, jnp.zeros([])) / 2


def make_ways(model: Towers, num_microbatches: int) -> list[Way]:
    """The three ways, the whole batch first."""
    embed: Any = model.apply
    encode = optaccum.chunked(embed, num_microbatches=num_microbatches)

    def whole_loss(params, pairs):
        return info_nce(*embed(params, pairs))

    def chunked_loss(params, pairs):
        return info_nce(*encode(params, pairs))

    return [
        Way("whole batch", jax.value_and_grad(whole_loss)),
        Way("optaccum", jax.value_and_grad(chunked_loss)),
        Way("per micro-batch", optaccum.value_and_grad(whole_loss, num_microbatches=num_microbatches)),
    ]


def compile_step(way: Way, tx: optax.GradientTransformation, *args: Any) -> jax.stages.Compiled:
    """The compiled step for arguments like these: params, opt_state, pairs."""

    def step(params, opt_state, pairs):
        loss, grads = way.grad_fn(params, pairs)
        params, opt_state = optaccum.apply_gradients(tx, grads, opt_state, params)
        return params, opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


def read_pairs(seed: int) -> tuple[Pairs, Pairs]:
    """The halves of all digits, to train on and to test on."""
    digits: Any = load_digits()
    images = np.random.default_rng(seed).permutation((digits.images / 16).astype(np.float32))
    test, train = images[:TEST_SIZE], images[TEST_SIZE:]
    return Pairs(train[:, :, :4], train[:, :, 4:]), Pairs(test[:, :, :4], test[:, :, 4:])


def batch_of(pairs: Pairs, call: int, batch_size: int, seed: int) -> Pairs:
    """The pairs of one call, a function of its number: a resumed run needs no loader's state."""
    epoch, index = divmod(call, len(pairs.left) // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(len(pairs.left))
    rows = order[index * batch_size :][:batch_size]
    return Pairs(pairs.left[rows], pairs.right[rows])


def distance(a: PyTree, b: PyTree) -> jax.Array:
    """How far the parameters a are from b, relative to b's norm."""
    return optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b)


def train(
    names: Sequence[str],
    steps: Sequence[jax.stages.Compiled],
    states: list[tuple[PyTree, PyTree]],
    test_fn: Callable[..., Any],
    pairs: Pairs,
    args: argparse.Namespace,
) -> tuple[list[tuple[PyTree, PyTree]], dict[str, Any]]:
    """Every way on the same pairs; returns their states and what was measured after every update."""
    apart = ("figure", "checkpoints", "checkpoint_every")
    settings = {key: str(value) for key, value in vars(args).items() if key not in apart}
    record = {"settings": settings, **{name: {"test_losses": [], "distances": []} for name in names}}
    manager = open_checkpoints(args.checkpoints)
    start, states, record = restore(manager, states, record)
    num_calls = args.updates * args.calls_per_update
    bar = progress_bar("training", num_calls * args.batch_size, initial=start * args.batch_size, unit="pair")
    for call in range(start, num_calls):
        batch = batch_of(pairs, call, args.batch_size, args.seed)
        losses = []
        for i, step in enumerate(steps):
            *state, loss = step(*states[i], batch)
            states[i] = state[0], state[1]
            losses.append(float(loss))
        if (call + 1) % args.calls_per_update == 0:
            for name, (params, _) in zip(names, states, strict=True):
                test_loss, away = test_fn(params, states[0][0])
                record[name]["test_losses"].append(float(test_loss))
                record[name]["distances"].append(float(away))
        advance(bar, args.batch_size, loss=losses[names.index("optaccum")])
        if (call + 1) % args.checkpoint_every == 0 or call + 1 == num_calls:
            save(manager, call + 1, states, record)
    bar.close()
    if manager is not None:
        manager.close()
    return states, record


def temp_bytes(compiled: jax.stages.Compiled) -> int:
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise SystemExit(f"error: the {jax.default_backend()} backend does not say how much memory a program takes")
    return analysis.temp_size_in_bytes


def table(results: Sequence[Result]) -> str:
    lines = [f"{'':16} {'halves':>7} {'test':>8} {'parameters: distance':>21} {'temp memory':>12}"]
    lines += [f"{'':16} {'found':>7} {'InfoNCE':>8} {'from the whole batch':>21} {'of the step':>12}"]
    for r in results:
        away = "-" if r is results[0] else f"{r.distances[-1]:.1e}"
        memory = f"{r.temp_bytes / 1e6:.2f} MB"
        lines.append(f"{r.name:16} {r.found:7.1%} {r.test_losses[-1]:8.3f} {away:>21} {memory:>12}")
    return "\n".join(lines)


STYLES = {"whole batch": (GREY, 7), "optaccum": (BLUE, 2), "per micro-batch": (VERMILION, 2)}


def draw(results: Sequence[Result], path: pathlib.Path) -> None:
    """Both losses against the whole batch: what they learn, how far they stray, what they need."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    learning, straying, needs = figure.subplots(1, 3, width_ratios=[3, 3, 2])
    for r in results:
        color, width = STYLES[r.name]
        updates = range(1, len(r.test_losses) + 1)
        learning.plot(updates, r.test_losses, color=color, linewidth=width, label=r.name)
        if r is not results[0]:
            straying.plot(updates, np.maximum(r.distances, 1e-9), color=color, linewidth=width, label=r.name)
    title = f"InfoNCE of {TEST_SIZE} test pairs"
    learning.set(xlabel="update", ylabel="loss (nats)", title=title)
    title = "Parameters, beside the whole batch's"
    straying.set(yscale="log", xlabel="update", ylabel="relative distance", title=title)
    bars = needs.barh(
        [r.name for r in results],
        [r.temp_bytes / 1e6 for r in results],
        color=[STYLES[r.name][0] for r in results],
    )
    needs.bar_label(bars, fmt="%.2f", padding=4)
    needs.invert_yaxis()
    needs.margins(x=0.25)
    needs.set(xlabel="MB", title="Temp memory of the step")
    learning.legend(frameon=False)
    straying.legend(frameon=False)
    save_figure(figure, path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, figure="figures/contrastive.png")
    parser.add_argument("--updates", type=positive_int, default=150, help=f"optimizer updates {DEFAULT}")
    parser.add_argument("--batch-size", type=positive_int, default=256, help=f"pairs per call {DEFAULT}")
    parser.add_argument("--microbatches", type=positive_int, default=16, help=f"per call {DEFAULT}")
    parser.add_argument("--calls-per-update", type=positive_int, default=2, help=DEFAULT)
    parser.add_argument("--width", type=positive_int, default=256, help=f"of the towers {DEFAULT}")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help=DEFAULT)
    args = parser.parse_args(argv)
    if args.microbatches > args.batch_size:
        parser.error(f"--batch-size {args.batch_size} cannot make {args.microbatches} micro-batches")
    return args


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run the comparison; returns a result per way, the whole batch first."""
    args = parse(argv)
    pairs, test = read_pairs(args.seed)
    if len(pairs.left) < args.batch_size:
        raise SystemExit(f"error: {len(pairs.left)} training pairs do not fill --batch-size {args.batch_size}")
    model = Towers(args.width)
    batch = batch_of(pairs, 0, args.batch_size, args.seed)
    params = jax.jit(model.init)(jax.random.key(args.seed), batch)
    tx = optaccum.accumulate(optax.adamw(args.learning_rate), args.calls_per_update)
    ways = make_ways(model, args.microbatches)
    steps = [compile_step(way, tx, params, tx.init(params), batch) for way in ways]

    embed: Any = model.apply

    @jax.jit
    def test_fn(params, reference):
        return info_nce(*embed(params, test)), distance(params, reference)

    @jax.jit
    def found_fn(params):
        left, right = embed(params, test)
        return ((left @ right.T).argmax(1) == jnp.arange(TEST_SIZE)).mean()

    # Each way has its own copy of the parameters, since steps donate them.
    states = [(jax.tree.map(jnp.copy, params), tx.init(params)) for _ in ways]
    states, record = train([way.name for way in ways], steps, states, test_fn, pairs, args)
    results = [
        Result(way.name, **record[way.name], found=float(found_fn(p)), temp_bytes=temp_bytes(step), params=p)
        for way, step, (p, _) in zip(ways, steps, states, strict=True)
    ]
    print(
        f"\n{args.updates} updates of {args.calls_per_update} x {args.batch_size} pairs, "
        f"each batch in {args.microbatches} micro-batches\n\n{table(results)}\n"
    )
    draw(results, args.figure)
    return results


if __name__ == "__main__":
    main()
