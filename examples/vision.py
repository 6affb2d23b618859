"""Images too large for the device: as few micro-batches as its memory needs, found before anything runs.

A convolutional network with BatchNorm learns scikit-learn's handwritten digits (real scans, bundled with it),
scaled up to --resolution, or the images in a folder with one folder per class (--data). The whole batch need
not fit the --memory: optaccum.plan_microbatches compiles the training step for one number of micro-batches
after another, reads how much memory each would take, and the smallest number that fits is trained with.

An update takes some calls (--calls-per-update; optaccum.accumulate in an optaccum.linen.TrainState), each a
batch in as many micro-batches as planned (optaccum.value_and_grad), from one to the next of which BatchNorm's
statistics are handed on (carry_argnum). Checkpoints fall between calls, also in the middle of an update.

Each micro-batch is normalised by its own mean and variance: with BatchNorm its size is part of the model, and
no accumulation gives the whole batch's gradient.

It prints the plan and draws figures/vision.png.
"""

import argparse
import pathlib
import re
from collections.abc import Callable, Sequence
from functools import partial
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
from matplotlib.image import imread
from sklearn.datasets import load_digits

import optaccum
from optaccum.linen import TrainState

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Images(NamedTuple):
    """A data set, a batch or a micro-batch; scaled up to the resolution where the network takes them."""

    pixels: np.ndarray  # shape=(n, height, width, channels), uint8
    labels: np.ndarray  # shape=(n,), int32


class Training(TrainState):
    """What a call of the training step takes and gives back; a checkpoint's arrays."""

    batch_stats: PyTree


class Result(NamedTuple):
    """What was planned and what came of it."""

    plan: optaccum.MicrobatchPlan
    losses: list[float]  # one per call
    test_accuracy: float
    training: Training


class Conv3x3(nn.Module):
    """A convolution as one matrix product: on CPU, nn.Conv trains 20 times slower inside any loop.

    The gradients of XLA's convolution are the slow ones: https://github.com/jax-ml/jax/issues/12868
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        starts = [(i, j) for i in range(3) for j in range(3)]
        neighbours = [x[:, i : i + height : self.stride, j : j + width : self.stride] for i, j in starts]
        return nn.Dense(self.features, use_bias=False)(jnp.concatenate(neighbours, axis=-1))


class Classifier(nn.Module):
    """Convolutions that halve the resolution, each with a BatchNorm, until 4 x 4 or less is left."""

    num_classes: int
    resolution: int
    momentum: float

    @nn.compact
    def __call__(self, pixels: jax.Array, *, train: bool) -> jax.Array:
        shape = (len(pixels), self.resolution, self.resolution, pixels.shape[-1])
        x = jax.image.resize(pixels.astype(jnp.float32) / 255, shape, "linear")
        features = 16
        while x.shape[1] > 4:
            x = Conv3x3(features, stride=2)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x))
            features = min(2 * features, 64)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def make_loss_fn(num_classes: int, resolution: int, num_microbatches: int) -> Callable[..., Any]:
    """The loss of a micro-batch; statistics reach as far back for any number of micro-batches."""
    model = Classifier(num_classes, resolution, momentum=0.9 ** (1 / num_microbatches))

    def loss_fn(params, batch, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, new = model.apply(variables, batch.pixels, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses.mean(), (new["batch_stats"], ())

    return loss_fn


def make_step(num_microbatches: int, *, num_classes: int, resolution: int) -> Callable[..., Any]:
    """The training step for some number of micro-batches: what is planned with is what is trained with."""
    grad_fn = optaccum.value_and_grad(
        make_loss_fn(num_classes, resolution, num_microbatches),
        num_microbatches=num_microbatches,
        has_aux=True,
        carry_argnum=2,
        return_info=True,
    )

    def step(training: Training, batch: Images) -> tuple[Training, jax.Array]:
        (loss, (batch_stats, _)), grads, info = grad_fn(training.params, batch, training.batch_stats)
        return training.apply_gradients(grads=grads, weight=info.weight, batch_stats=batch_stats), loss

    return jax.jit(step, donate_argnums=0)


def read_images(folder: pathlib.Path | None, resolution: int) -> tuple[Images, int]:
    """The digits, or the images of a folder that holds a folder per class; and the number of classes."""
    if folder is None:
        digits: Any = load_digits()
        pixels = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
        return Images(pixels, digits.target.astype(np.int32)), 10
    classes = sorted(p for p in folder.glob("*") if p.is_dir())
    files = [(file, label) for label, c in enumerate(classes) for file in sorted(c.iterdir()) if file.is_file()]
    if len(classes) < 2 or not files:
        raise SystemExit(f"error: --data {folder} expects a folder with a folder of images for each class")
    pixels = np.stack([read_image(file, resolution) for file, _ in files])
    return Images(pixels, np.array([label for _, label in files], np.int32)), len(classes)


def read_image(file: pathlib.Path, resolution: int) -> np.ndarray:
    """The middle square of an image, scaled; shape=(resolution, resolution, 3), uint8."""
    try:
        image = np.asarray(imread(file))
    except Exception as error:
        raise SystemExit(f"error: {file} is not an image that matplotlib can read: {error}") from error
    if image.dtype != np.uint8:  # PNG: floats up to 1
        image = np.round(255 * image).astype(np.uint8)
    image = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image[..., :3]
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    middle = image[top : top + side, left : left + side].astype(np.float32)
    scaled = jax.image.resize(middle, (resolution, resolution, 3), "linear")
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8)


def batch_of(images: Images, call: int, batch_size: int, seed: int) -> Images:
    """The images of one call, a function of its number: a resumed run needs no loader's state."""
    epoch, index = divmod(call, len(images.labels) // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(len(images.labels))
    rows = order[index * batch_size :][:batch_size]
    return Images(images.pixels[rows], images.labels[rows])


def plan(
    make_step_fn: Callable[[int], Callable[..., Any]], training: Training, batch: Images, memory: int | None
) -> optaccum.MicrobatchPlan:
    """As few micro-batches as the memory needs; the bar moves with each program compiled."""
    bar = progress_bar("planning", 0, unit="program")

    def on_probe(probe):
        num_microbatches, num_bytes = probe
        bar.set_postfix_str(f"{num_microbatches} micro-batches need {num_bytes / 1e6:,.0f} MB", refresh=False)
        bar.update()

    structs = jax.eval_shape(lambda *args: args, training, batch)
    try:
        return optaccum.plan_microbatches(
            make_step_fn, structs, batch_size=len(batch.labels), memory_limit=memory, on_probe=on_probe
        )
    except ValueError as error:
        raise SystemExit(f"error: --memory: {error}") from error
    finally:
        bar.close()


def train(
    step: Callable[..., Any],
    training: Training,
    images: Images,
    args: argparse.Namespace,
    settings: dict[str, Any],
) -> tuple[Training, list[float]]:
    """All calls that are left; returns what was trained and the loss of every call."""
    manager = open_checkpoints(args.checkpoints)
    start, training, record = restore(manager, training, {"settings": settings, "losses": []})
    num_calls = args.updates * args.calls_per_update
    bar = progress_bar("training", num_calls * args.batch_size, initial=start * args.batch_size, unit="image")
    for call in range(start, num_calls):
        training, loss = step(training, batch_of(images, call, args.batch_size, args.seed))
        record["losses"].append(float(loss))
        advance(bar, args.batch_size, loss=float(loss))
        if (call + 1) % args.checkpoint_every == 0 or call + 1 == num_calls:
            save(manager, call + 1, training, record)
    bar.close()
    if manager is not None:
        manager.close()
    return training, record["losses"]


def accuracy(training: Training, images: Images, batch_size: int) -> float:
    """On as many images at once as a micro-batch has, with the running statistics."""
    variables = {"params": training.params, "batch_stats": training.batch_stats}

    @jax.jit
    def predict(pixels):
        logits: Any = training.apply_fn(variables, pixels, train=False)
        return logits.argmax(-1)

    correct = 0
    for start in range(0, len(images.labels), batch_size):
        rows = slice(start, start + batch_size)
        correct += int((np.asarray(predict(images.pixels[rows])) == images.labels[rows]).sum())
    return correct / len(images.labels)


def draw(result: Result, path: pathlib.Path) -> None:
    """What each number of micro-batches would need, and the training with the one chosen."""
    plan = result.plan
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    needs, curve = figure.subplots(1, 2)
    probes = [probe for probe in sorted(plan.probes) if np.isfinite(probe.num_bytes)]
    colors = [BLUE if p.num_microbatches == plan.num_microbatches else GREY for p in probes]
    bars = needs.bar([str(p.num_microbatches) for p in probes], [p.num_bytes / 1e6 for p in probes], color=colors)
    needs.bar_label(bars, fmt="%.0f", padding=2)
    limit = plan.memory_limit / 1e6
    needs.axhline(limit, color=VERMILION, linestyle="--", label=f"memory: {limit:,.0f} MB")
    needs.set(
        xlabel="micro-batches (blue: chosen)",
        ylabel="memory of the step (MB)",
        title="What the step would need …",
    )
    needs.legend(frameon=False)
    curve.plot(range(1, len(result.losses) + 1), result.losses, color=BLUE)
    title = f"… and the training: {result.test_accuracy:.1%} right on test images"
    curve.set(yscale="log", xlabel="call", ylabel="training loss", title=title)
    save_figure(figure, path)


def memory_size(text: str) -> int | None:
    """An argument's type: bytes, with a unit; None for "device"."""
    if text == "device":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]I?B)?", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 64MB or 1.5GiB, or device; got {text}")
    return int(float(match[1]) * UNITS[match[2] or ""])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, figure="figures/vision.png")
    parser.add_argument("--data", type=pathlib.Path, help="folder with a folder per class (default: digits)")
    parser.add_argument("--resolution", type=positive_int, default=64, help=f"pixels along a side {DEFAULT}")
    parser.add_argument(
        "--memory", type=memory_size, default="16MB", help=f"of the device; device: what it tells {DEFAULT}"
    )
    parser.add_argument("--updates", type=positive_int, default=40, help=f"optimizer updates {DEFAULT}")
    parser.add_argument("--batch-size", type=positive_int, default=128, help=f"images per call {DEFAULT}")
    parser.add_argument("--calls-per-update", type=positive_int, default=2, help=DEFAULT)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help=DEFAULT)
    args = parser.parse_args(argv)
    if args.resolution < 5:
        parser.error(f"--resolution must be 5 or more, got {args.resolution}")
    return args


def main(argv: Sequence[str] | None = None) -> Result:
    """Plan, then train."""
    args = parse(argv)
    images, num_classes = read_images(args.data, args.resolution)
    order = np.random.default_rng(args.seed).permutation(len(images.labels))
    images = Images(images.pixels[order], images.labels[order])
    num_test = len(order) // 5
    test, images = Images(*(x[:num_test] for x in images)), Images(*(x[num_test:] for x in images))
    if len(images.labels) < args.batch_size:
        raise SystemExit(f"error: {len(images.labels)} images do not fill --batch-size {args.batch_size}")

    tx = optaccum.accumulate(optax.adam(args.learning_rate), args.calls_per_update)
    model = Classifier(num_classes, args.resolution, momentum=0.9)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(args.seed), images.pixels[:1])
    training = Training.create(apply_fn=model.apply, tx=tx, **variables)
    make_step_fn = partial(make_step, num_classes=num_classes, resolution=args.resolution)
    batch = batch_of(images, 0, args.batch_size, args.seed)
    planned = plan(make_step_fn, training, batch, args.memory)
    print(planned)

    apart = ("figure", "checkpoints", "checkpoint_every", "memory")
    settings: dict[str, Any] = {key: str(value) for key, value in vars(args).items() if key not in apart}
    settings["num_microbatches"] = planned.num_microbatches  # part of a model with BatchNorm
    step = make_step_fn(planned.num_microbatches)
    training, losses = train(step, training, images, args, settings)
    result = Result(planned, losses, accuracy(training, test, planned.microbatch_size), training)
    print(
        f"\n{args.updates} updates of {args.calls_per_update} x {args.batch_size} images at "
        f"{args.resolution} x {args.resolution}, {planned.microbatch_size} at once: "
        f"{result.test_accuracy:.1%} right on {num_test} test images"
    )
    draw(result, args.figure)
    return result


if __name__ == "__main__":
    main()
