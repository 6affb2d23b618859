"""Fine-tune with LoRA: micro-batches of so many bytes, and updates of so many bytes, however many that takes.

A small byte-level transformer first learns Python's standard library, or any folder of Python files (--data).
Then it is frozen, and LoRA (nnx.LoRAParam) alone learns to write a function's docstring after its header:

  one program          documents are packed into rows, rows into micro-batches; a call runs as many as it fills:
                       optaccum.nnx.value_and_grad(..., presplit=True, count_argnum=2)
  every byte counts    the same, of the docstrings alone: optaccum.WeightedMean, and weight= between calls
  updates by bytes     a window takes calls until it has --update-bytes: optaccum.until_weight
  LoRA alone           has gradients, sums and optimizer state: nnx.DiffState(0, nnx.LoRAParam)

With --checkpoints, a run that was killed goes on in the middle of its window, to the same parameters. It prints
a table and draws figures/finetune_lora.png.
"""

import argparse
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import (
    BLUE,
    DEFAULT,
    GREY,
    ORANGE,
    advance,
    make_parser,
    open_checkpoints,
    positive_int,
    progress_bar,
    restore,
    save,
    save_figure,
)
from _lora_transformer import BASE, Size, Transformer
from _packing import Pair, Rows, as_micro_batches, function_pairs, pack, whole_rows
from _text import read_documents
from flax import nnx
from matplotlib.figure import Figure

import optaccum
import optaccum.nnx


class Result(NamedTuple):
    """What was measured, earlier starts included."""

    first_call: int  # 0, or where a checkpoint let it go on
    bits_per_byte: dict[str, float]  # of held-out docstrings, before and after
    losses: list[float]  # nats per byte, one per update
    update_bytes: list[float]  # one per update
    calls: list[int]  # one per update
    counts: list[int]  # micro-batches that ran, one per call
    most: int  # micro-batches that any call has room for
    lora: list[jax.Array]


def loss_fn(model: Transformer, rows: Rows, count: Any = None) -> optaccum.WeightedMean:
    """The cross-entropy of what is counted, over its bytes; `count` is for the loop."""
    logits = model(rows.inputs, rows.document, rows.position)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets.astype(jnp.int32))
    return optaccum.WeightedMean(jnp.where(rows.counted, losses, 0.0).sum(), rows.counted.sum())


def pretrain(model: Transformer, rows: Rows, args: argparse.Namespace) -> None:
    """Train all but LoRA on text as it stands."""
    schedule = optax.cosine_decay_schedule(3e-3, args.base_updates)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, b2=0.98), wrt=BASE)
    grad_fn = optaccum.nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, BASE), num_microbatches=2)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, rows):
        loss, grads = grad_fn(model, rows)
        optaccum.nnx.apply_gradients(optimizer, model, grads)
        return loss

    rng = np.random.default_rng(args.seed)
    bar = progress_bar("the base", args.base_updates * args.base_rows, unit="row")
    for _ in range(args.base_updates):
        chosen = rng.choice(len(rows.inputs), args.base_rows)
        loss = step(model, optimizer, Rows(*(x[chosen] for x in rows)))
        advance(bar, args.base_rows, loss=float(loss))
    bar.close()


def make_step() -> Callable[..., Any]:
    """One call: as many micro-batches as there are, then the window is closed if it has its bytes."""
    grad_fn = optaccum.nnx.value_and_grad(
        loss_fn,
        argnums=nnx.DiffState(0, nnx.LoRAParam),
        presplit=True,
        count_argnum=2,
        return_info=True,
    )

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, batch, count, is_last):
        loss, grads, info = grad_fn(model, batch, count)
        optaccum.nnx.apply_gradients(optimizer, model, grads, weight=info.weight, emit=is_last)
        return loss, info.weight

    return step


def rows_of_call(pairs: Sequence[Pair], call: int, args: argparse.Namespace) -> Rows:
    """The rows of one call, a function of its number: a resumed run needs no loader's state."""
    epoch, index = divmod(call, len(pairs) // args.documents)
    order = np.random.default_rng([args.seed, epoch]).permutation(len(pairs))
    return pack([pairs[i] for i in order[index * args.documents :][: args.documents]], args.length)


def arrays_of(objects: Any, kinds: Any) -> list[jax.Array]:
    """The arrays in some kinds of Variables, for a checkpoint."""
    return jax.tree.leaves(nnx.state(objects, kinds))


def put_back(arrays: Sequence[jax.Array], objects: Any, kinds: Any) -> None:
    """The inverse of `arrays_of`."""
    structure = jax.tree.structure(nnx.state(objects, kinds))
    nnx.update(objects, jax.tree.unflatten(structure, arrays))


def train(model: Transformer, pairs: Sequence[Pair], args: argparse.Namespace) -> dict[str, Any]:
    """All calls, or what an earlier start left of them; LoRA alone changes."""
    rows = [rows_of_call(pairs, call, args) for call in range(args.calls)]
    most = max(math.ceil(len(x.inputs) / args.microbatch_rows) for x in rows)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(args.learning_rate))
    tx = optaccum.accumulate(inner, optaccum.until_weight(args.update_bytes))
    optimizer, step = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam), make_step()
    record: dict[str, Any] = {"settings": settings_of(args)}
    record |= {name: [] for name in ("window", "losses", "update_bytes", "calls", "counts")}
    manager = open_checkpoints(args.checkpoints and args.checkpoints / "lora")
    trained = (model, optimizer), (nnx.LoRAParam, nnx.OptState)
    first, arrays, record = restore(manager, arrays_of(*trained), record)
    put_back(arrays, *trained)

    bar = progress_bar("LoRA", args.calls * args.documents, initial=first * args.documents, unit="docstring")
    for call in range(first, args.calls):
        batch, count = as_micro_batches(rows[call], args.microbatch_rows, most)
        is_last = np.bool_(call + 1 == args.calls)  # which ends its window, full or not
        loss, num_bytes = step(model, optimizer, batch, np.int32(count), is_last)
        note(record, float(loss), float(num_bytes), count)
        if optaccum.has_updated(optimizer.opt_state):
            note_update(record)
        if (call + 1) % args.checkpoint_every == 0 or is_last:
            save(manager, call + 1, arrays_of(*trained), record)
        advance(bar, args.documents, loss=float(loss))
    bar.close()
    if manager is not None:
        manager.close()
    return record | {"first_call": first, "most": most}


def note(record: dict[str, Any], loss: float, num_bytes: float, count: int) -> None:
    """Write a call down as part of the open window."""
    record["window"].append((loss, num_bytes))
    record["counts"].append(count)


def note_update(record: dict[str, Any]) -> None:
    """Close the window: write down the update that has just been taken."""
    losses, num_bytes = zip(*record["window"], strict=True)
    record["losses"].append(float(np.average(losses, weights=num_bytes)))
    record["update_bytes"].append(sum(num_bytes))
    record["calls"].append(len(num_bytes))
    record["window"] = []


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What every start of a run must have in common."""
    apart = ("figure", "checkpoints", "checkpoint_every")
    return {key: str(value) for key, value in vars(args).items() if key not in apart}


def make_base(rows: Rows, args: argparse.Namespace) -> Transformer:
    """The model that is fine-tuned, trained now or by an earlier start."""
    size = Size(args.layers, args.width, args.heads, args.length, args.rank)
    model = Transformer(size, nnx.Rngs(args.seed))
    manager = open_checkpoints(args.checkpoints and args.checkpoints / "base")
    record = {"settings": settings_of(args)}
    done, arrays, record = restore(manager, arrays_of(model, BASE), record)
    put_back(arrays, model, BASE)
    if not done:
        pretrain(model, rows, args)
        save(manager, args.base_updates, arrays_of(model, BASE), record)
    if manager is not None:
        manager.close()
    return model


def bits_per_byte(model: Transformer, rows: Rows, size: int) -> float:
    """Of what is counted, in batches of `size` rows."""
    batches, num_batches = as_micro_batches(rows, size, math.ceil(len(rows.inputs) / size))
    terms_fn = nnx.jit(loss_fn)
    terms = [terms_fn(model, Rows(*(x[i] for x in batches))) for i in range(num_batches)]
    return sum(float(t.total) for t in terms) / sum(float(t.weight) for t in terms) / math.log(2)


def draw(result: Result, asked: int, path: pathlib.Path) -> None:
    """The loss by update; what updates and calls were made of."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curve, sizes, counts = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    curve.plot(np.cumsum(result.update_bytes), result.losses, color=BLUE, linewidth=1.2)
    curve.set(xlabel="bytes of docstrings", ylabel="training loss (nats per byte)", title="A point per update")
    sizes.hist(result.update_bytes, color=ORANGE)
    sizes.axvline(asked, color=GREY, linestyle="--")
    sizes.set(xlabel="bytes in an update", title="Closed by bytes")
    counts.hist(result.counts, bins=np.arange(result.most + 1) + 0.5, color=BLUE)
    counts.set(xlabel="micro-batches in a call", title="One program")
    save_figure(figure, path)


def table(result: Result, model: Transformer) -> str:
    trained, base = (sum(x.size for x in jax.tree.leaves(nnx.state(model, f))) for f in (nnx.LoRAParam, BASE))
    lines = [
        f"{'':10} {'bits per byte':>24} {'parameters':>12}",
        f"{'':10} {'(held-out docstrings)':>24} {'trained':>12}",
    ]
    for (name, bits), size in zip(result.bits_per_byte.items(), (base, trained), strict=True):
        lines.append(f"{name:10} {bits:24.3f} {size:12,}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, figure="figures/finetune_lora.png")
    add = parser.add_argument
    add("--data", type=pathlib.Path, help="folder of Python files (default: Python's standard library)")
    add("--max-bytes", type=positive_int, default=4_000_000, help=f"of text to read {DEFAULT}")
    add("--base-updates", type=positive_int, default=120, help=f"of the model that is fine-tuned {DEFAULT}")
    add("--base-rows", type=positive_int, default=16, help=f"per update of that {DEFAULT}")
    add("--calls", type=positive_int, default=100, help=f"of fine-tuning {DEFAULT}")
    add("--documents", type=positive_int, default=24, help=f"docstrings per call {DEFAULT}")
    add("--microbatch-rows", type=positive_int, default=2, help=f"rows of a micro-batch {DEFAULT}")
    add("--update-bytes", type=positive_int, default=5000, help=f"that end a window {DEFAULT}")
    add("--learning-rate", type=float, default=1e-2, help=DEFAULT)
    add("--length", type=positive_int, default=256, help=f"bytes of a row {DEFAULT}")
    add("--rank", type=positive_int, default=4, help=f"of LoRA {DEFAULT}")
    add("--layers", type=positive_int, default=2, help=DEFAULT)
    add("--width", type=positive_int, default=64, help=DEFAULT)
    add("--heads", type=positive_int, default=4, help=DEFAULT)
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"--heads must divide --width {args.width}, got {args.heads}")
    return args


def main(argv: Sequence[str] | None = None) -> Result:
    """Train the base, fine-tune it, print and draw."""
    args = parse(argv)
    documents = read_documents(args.data, args.max_bytes)
    held_out = documents[::8]  # whole files
    documents = [document for i, document in enumerate(documents) if i % 8]
    pairs, held_out_pairs = (function_pairs(x, args.length) for x in (documents, held_out))
    if len(pairs) < args.documents or not held_out_pairs:
        raise SystemExit(
            f"error: {len(pairs)} functions with docstrings to learn from and {len(held_out_pairs)} to test on; "
            f"expected --documents {args.documents}, and 1. Take more --max-bytes, or other --data."
        )
    model = make_base(whole_rows(documents, args.length), args)
    test = pack(held_out_pairs[:400], args.length)
    before = bits_per_byte(model, test, args.base_rows)
    record = train(model, pairs, args)
    bits = {"base": before, "with LoRA": bits_per_byte(model, test, args.base_rows)}
    names = ("first_call", "losses", "update_bytes", "calls", "counts", "most")
    lora = arrays_of(model, nnx.LoRAParam)
    result = Result(bits_per_byte=bits, lora=lora, **{name: record[name] for name in names})
    sizes, ran = np.array(result.update_bytes), sum(result.counts)
    print(
        f"\n{len(sizes)} updates of {sizes.mean():,.0f} bytes (standard deviation {sizes.std():,.0f}) in "
        f"{args.calls} calls\nof {min(result.counts)} to {max(result.counts)} micro-batches; {ran} ran, where padding "
        f"would have run {args.calls * result.most}.\n\n{table(result, model)}\n"
    )
    draw(result, args.update_bytes, args.figure)
    return result


if __name__ == "__main__":
    main()
