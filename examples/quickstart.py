"""One recipe, trained with and without gradient accumulation: the same model comes out, from less memory.

A small convolutional classifier learns scikit-learn's handwritten digits (real scans, bundled with it) in
batches of 256. Five ways to take the same step run side by side, on the same batches, from the same start:

  whole batch          jax.value_and_grad on all 256 images at once
  optaccum, streaming  8 calls with 32 images each: optaccum.accumulate and optaccum.value_and_update
  optaccum, scanned    1 call: jax.value_and_grad of optaccum.microbatched(num_microbatches=8)
  optax.MultiSteps     8 calls with 32 images each
  optax microbatch     1 call: optax.microbatching.microbatch(microbatch_size=32)

It prints a table and draws figures/quickstart.png.
"""

import argparse
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import optaccum

PyTree = Any
TRAIN_SIZE, TEST_SIZE = 1437, 360  # images


class Images(NamedTuple):
    """A data set, a batch or a micro-batch."""

    pixels: np.ndarray  # shape=(n, 8, 8, 1), float32 in [0, 1]
    labels: np.ndarray  # shape=(n,), int32


class Way(NamedTuple):
    """A way to take the recipe's step."""

    name: str
    init: Callable[[PyTree], PyTree]  # params -> opt_state
    # params, opt_state, images -> params, opt_state, loss
    step: Callable[[PyTree, PyTree, Any], tuple[PyTree, PyTree, jax.Array]]
    calls_per_update: int


class Run(NamedTuple):
    """A way on its way: what it has become, and what was measured."""

    way: Way
    compiled: jax.stages.Compiled
    params: PyTree
    opt_state: PyTree
    losses: list[float]  # one per update
    seconds: list[float]  # one per update


class Result(NamedTuple):
    """What was measured of one way."""

    name: str
    losses: list[float]  # one per update
    test_accuracy: float
    max_difference: float  # of any parameter, from the whole batch's
    temp_bytes: int  # scratch memory of the compiled step
    milliseconds: float  # per update, median


class Conv3x3(nn.Module):
    """A convolution as one matrix product: on CPU, nn.Conv trains ten times slower inside any loop.

    The gradients of XLA's convolution are the slow ones: https://github.com/jax-ml/jax/issues/12868
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        neighbours = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return nn.Dense(self.features)(jnp.concatenate(neighbours, axis=-1))


class Classifier(nn.Module):
    """Two convolutions and two dense layers; smooth, since kinks magnify rounding."""

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = nn.gelu(Conv3x3(32)(pixels))
        x = nn.gelu(Conv3x3(64)(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.gelu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


model = Classifier()


def logits_of(params: PyTree, images: Images) -> Any:
    return model.apply(params, images.pixels)


def loss_fn(params: PyTree, images: Images) -> jax.Array:
    """The mean cross-entropy."""
    logits = logits_of(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, images.labels).mean()


def recipe(num_updates: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer, the same for every way."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, num_updates // 10, num_updates)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2))


def whole_batch(tx: optax.GradientTransformation) -> Way:
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return Way("whole batch", tx.init, step, calls_per_update=1)


def optaccum_streaming(tx: optax.GradientTransformation, num_microbatches: int) -> Way:
    tx = optaccum.accumulate(tx, num_microbatches)
    update = optaccum.value_and_update(loss_fn, tx)

    def step(params, opt_state, micro_batch):
        loss, params, opt_state = update(params, opt_state, micro_batch)
        return params, opt_state, loss

    return Way("optaccum, streaming", tx.init, step, calls_per_update=num_microbatches)


def optaccum_scanned(tx: optax.GradientTransformation, num_microbatches: int) -> Way:
    batch_loss_fn = optaccum.microbatched(loss_fn, num_microbatches=num_microbatches)

    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(batch_loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return Way("optaccum, scanned", tx.init, step, calls_per_update=1)


def optax_multi_steps(tx: optax.GradientTransformation, num_microbatches: int) -> Way:
    multi_steps = optax.MultiSteps(tx, num_microbatches)

    def step(params, opt_state, micro_batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, micro_batch)
        updates, opt_state = multi_steps.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return Way("optax.MultiSteps", multi_steps.init, step, calls_per_update=num_microbatches)


def optax_microbatch(tx: optax.GradientTransformation, microbatch_size: int) -> Way:
    grad_fn = optax.microbatching.microbatch(
        jax.value_and_grad(loss_fn),
        argnums=1,
        microbatch_size=microbatch_size,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )

    def step(params, opt_state, batch):
        loss, grads = grad_fn(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return Way("optax microbatch", tx.init, step, calls_per_update=1)


def load_images(seed: int) -> tuple[Images, Images]:
    """The digits, four fifths to train on and one fifth to test on."""
    digits: Any = load_digits()
    pixels = (digits.images[..., None] / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    parts: Any = train_test_split(
        pixels, labels, train_size=TRAIN_SIZE, test_size=TEST_SIZE, stratify=labels, random_state=seed
    )
    train_pixels, test_pixels, train_labels, test_labels = parts
    return Images(train_pixels, train_labels), Images(test_pixels, test_labels)


def shuffled_batches(images: Images, batch_size: int, seed: int) -> Iterator[Images]:
    """Batches without end; each epoch in an order of its own, without its last incomplete batch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(images.labels))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield jax.tree.map(lambda x, rows=order[start : start + batch_size]: x[rows], images)


def split(batch: Images, n: int) -> list[Images]:
    """Micro-batch i is batch[i::n], for everyone."""
    return [Images(batch.pixels[i::n], batch.labels[i::n]) for i in range(n)]


def start(way: Way, params: PyTree, batch: Images) -> Run:
    """Compile a way's step; it gets its own copy of the parameters, since steps donate them."""
    params = jax.tree.map(jnp.copy, params)
    opt_state = way.init(params)
    images = split(batch, way.calls_per_update)[0]
    compiled = jax.jit(way.step, donate_argnums=(0, 1)).lower(params, opt_state, images).compile()
    return Run(way, compiled, params, opt_state, [], [])


def advance(run: Run, batch: Images) -> Run:
    """Take one update, and time it."""
    params, opt_state, losses = run.params, run.opt_state, []
    begin = time.perf_counter()
    for images in split(batch, run.way.calls_per_update):
        params, opt_state, loss = run.compiled(params, opt_state, images)
        losses.append(loss)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - begin
    return run._replace(
        params=params,
        opt_state=opt_state,
        losses=[*run.losses, float(np.mean(losses))],
        seconds=[*run.seconds, seconds],
    )


@jax.jit
def accuracy(params: PyTree, images: Images) -> jax.Array:
    return jnp.mean(logits_of(params, images).argmax(-1) == images.labels)


def max_difference(a: PyTree, b: PyTree) -> float:
    differences = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)
    return max(jax.tree.leaves(differences))


def temp_bytes(compiled: jax.stages.Compiled) -> int:
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"the {jax.default_backend()} backend does not say how much memory a program takes")
    return analysis.temp_size_in_bytes


def result_of(run: Run, reference: Run, test: Images) -> Result:
    return Result(
        name=run.way.name,
        losses=run.losses,
        test_accuracy=float(accuracy(run.params, test)),
        max_difference=max_difference(run.params, reference.params),
        temp_bytes=temp_bytes(run.compiled),
        milliseconds=1e3 * float(np.median(run.seconds)),
    )


def table(results: Sequence[Result]) -> str:
    lines = [f"{'':20} {'test':>8} {'largest parameter':>18} {'temp memory':>12} {'time per':>10}"]
    lines += [f"{'':20} {'accuracy':>8} {'difference':>18} {'of the step':>12} {'update':>10}"]
    for r in results:
        difference = "-" if r is results[0] else f"{r.max_difference:.1e}"
        memory, duration = f"{r.temp_bytes / 1e6:.1f} MB", f"{r.milliseconds:.1f} ms"
        lines += [f"{r.name:20} {r.test_accuracy:8.1%} {difference:>18} {memory:>12} {duration:>10}"]
    return "\n".join(lines)


# Okabe and Ito's palette, told apart by every kind of colour vision.
COLORS = ["#999999", "#0072B2", "#56B4E9", "#D55E00", "#E69F00"]


def draw(results: Sequence[Result], path: pathlib.Path) -> None:
    """The loss curves on top of each other, the memory side by side."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=[3, 2])
    for i, (r, color) in enumerate(zip(results, COLORS, strict=True)):
        # From wide to narrow, so that each shows on the one below it.
        curves.plot(r.losses, color=color, linewidth=10 - 2 * i, label=r.name, solid_capstyle="butt")
    curves.set(yscale="log", xlabel="update", ylabel="training loss", title="The same training …")
    curves.legend(frameon=False)
    megabytes = [r.temp_bytes / 1e6 for r in results]
    drawn = bars.barh([r.name for r in results], megabytes, color=COLORS)
    bars.bar_label(drawn, fmt="%.1f MB", padding=4)
    bars.invert_yaxis()
    bars.set(xlabel="temp memory of the compiled step (MB)", title="… from less memory")
    bars.margins(x=0.25)
    for axes in curves, bars:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = "(default: %(default)s)"
    parser.add_argument("--updates", type=int, default=200, help=f"optimizer updates {defaults}")
    parser.add_argument("--batch-size", type=int, default=256, help=f"images per update {defaults}")
    parser.add_argument("--microbatches", type=int, default=8, help=f"micro-batches per update {defaults}")
    parser.add_argument("--seed", type=int, default=0, help=f"of data and parameters {defaults}")
    parser.add_argument(
        "--figure", type=pathlib.Path, default="figures/quickstart.png", help=f"picture to draw {defaults}"
    )
    args = parser.parse_args(argv)
    if args.updates < 1:
        parser.error(f"--updates must be at least 1, got {args.updates}")
    if not 1 <= args.batch_size <= TRAIN_SIZE:
        parser.error(f"--batch-size must be from 1 to {TRAIN_SIZE}, the training images; got {args.batch_size}")
    if args.microbatches < 1 or args.batch_size % args.microbatches:
        parser.error(
            f"--microbatches must divide --batch-size {args.batch_size}, got {args.microbatches} "
            "(optaccum takes any number, optax.microbatching does not)"
        )
    return args


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run the comparison; returns a result per way, the whole batch first."""
    args = parse(argv)
    train, test = load_images(args.seed)
    batches = shuffled_batches(train, args.batch_size, args.seed)
    params = model.init(jax.random.key(args.seed), train.pixels[:1])
    tx = recipe(args.updates)
    ways = [
        whole_batch(tx),
        optaccum_streaming(tx, args.microbatches),
        optaccum_scanned(tx, args.microbatches),
        optax_multi_steps(tx, args.microbatches),
        optax_microbatch(tx, args.batch_size // args.microbatches),
    ]
    first = next(batches)
    runs = [start(way, params, first) for way in tqdm(ways, "compiling", unit="way", leave=False, disable=None)]
    progress = tqdm(range(args.updates), "training", unit="update", disable=None)  # where there is a terminal
    for _ in progress:
        batch = next(batches)
        runs = [advance(run, batch) for run in runs]
        progress.set_postfix(loss=f"{runs[0].losses[-1]:.4f}")

    results = [result_of(run, runs[0], test) for run in runs]
    moved = max_difference(params, runs[0].params)
    print(f"\n{args.updates} updates of {args.batch_size} images in {args.microbatches} micro-batches")
    print(f"moved the parameters by up to {moved:.2f}.\n\n{table(results)}")
    draw(results, args.figure)
    print(f"\nThe picture: {args.figure}")
    return results


if __name__ == "__main__":
    main()
