"""Train on many devices and hosts: TPU pods, GPUs, or CPU devices that this program simulates.

The program that every host of a pod runs. A byte-level transformer learns the sources of Python's standard
library; --data takes any text.

  mesh          axes "data" (rows of the batch) and "model" (heads and hidden units, --model-devices)
  window        --calls-per-update calls, each a batch of Grain's in --microbatches: a window of windows
  reduction     gradients cross the data axis once per call, after its loop (data_axes="data"); with --fsdp
                parameters are gathered once per call, and gradients reduce-scattered (or in two other ways)
  checkpoints   Orbax, each host its own shards, also in the middle of a window; start again to go on
  pre-emption   SIGTERM to any host: all stop at the same call, with a checkpoint

  one TPU VM       python examples/tpu_data_parallel.py --checkpoints gs://bucket/run
  a TPU pod        the same on every host, with --distributed
  a laptop         python examples/tpu_data_parallel.py --simulate-devices 8 --model-devices 2
  before any       python examples/tpu_data_parallel.py --compile-for v5e:16x16 --batch-size 1024 --memory
  which sharding?  the same with --fsdp

docs/running.md says more. Process 0 prints, and draws figures/tpu_data_parallel.png.
"""

import argparse
import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import _common
import _compile_for
import _hosts
import _sharded_transformer as transformer
import _targets
import _text
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from matplotlib.figure import Figure

import optaccum

PyTree = Any
FSDP = ("window", "sums", "layers")


class Result(NamedTuple):
    """What a run was."""

    first_call: int  # 0, or where a checkpoint let it go on
    calls: int  # so far, earlier starts included
    updates: int
    losses: list[float]  # one per call, earlier starts included
    tokens: int  # that the parameters have been trained on
    stopped: bool  # by SIGTERM or --stop-after, before its end
    collectives: optaccum.CollectiveCounts | None  # in one call's program; None where no call was left
    record: dict[str, Any]  # what checkpoints keep beside the arrays


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _common.make_parser(__doc__, figure="figures/tpu_data_parallel.png")
    count, default = _common.positive_int, _common.DEFAULT
    run = parser.add_argument_group("training")
    run.add_argument(
        "--data",
        type=pathlib.Path,
        metavar="PATH",
        help="a text file or folder (default: Python's own sources)",
    )
    run.add_argument("--max-bytes", type=count, default=2_000_000, help=f"of it to read {default}")
    run.add_argument("--updates", type=count, default=60, help=f"optimizer updates {default}")
    run.add_argument("--calls-per-update", type=count, default=4, help=f"batches in a window {default}")
    run.add_argument("--batch-size", type=count, default=32, help=f"rows per call, over all hosts {default}")
    run.add_argument("--microbatches", type=count, default=2, help=f"in each call {default}")
    run.add_argument("--learning-rate", type=float, default=3e-3, help=f"its peak {default}")
    run.add_argument("--stop-after", type=count, metavar="CALLS", help="stop there, as if pre-empted")
    model = parser.add_argument_group("model")
    model.add_argument("--layers", type=count, default=2, help=default)
    model.add_argument("--width", type=count, default=64, help=default)
    model.add_argument("--heads", type=count, default=4, help=default)
    model.add_argument("--length", type=count, default=128, help=f"bytes in a row {default}")
    model.add_argument("--bfloat16", action="store_true", help="compute in it; sums stay float32")
    model.add_argument("--model-devices", type=count, default=1, help=f"that share a layer {default}")
    model.add_argument(
        "--fsdp",
        nargs="?",
        const="window",
        choices=FSDP,
        help="shard parameters over the data axis too: gathered once per call (window, the default), with sharded "
        "sums besides (sums), or in each layer of each micro-batch (layers); with --memory: all three, as a table",
    )
    _hosts.add_arguments(parser)
    _compile_for.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.memory is not None and not args.compile_for:
        parser.error("--memory goes with --compile-for")
    if args.width % args.heads or args.heads % args.model_devices:
        parser.error(
            f"--model-devices {args.model_devices} must divide --heads {args.heads}, which must divide "
            f"--width {args.width}"
        )
    return args


def settings_of(args: argparse.Namespace, rows: np.ndarray) -> dict[str, Any]:
    """What every start of a run must have in common; another number of devices or hosts is welcome."""
    training = ("updates", "calls_per_update", "batch_size", "microbatches", "learning_rate", "seed")
    names = (*training, "layers", "width", "heads", "length", "bfloat16")
    return {name: getattr(args, name) for name in names} | {"data": _hosts.fingerprint(rows)}


def compare_hosts(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """What every host must have in common besides, so that they run one program and read one checkpoint."""
    names = ["model_devices", "fsdp", "checkpoint_every", "stop_after"]
    _hosts.check_agreement(
        settings
        | {name: getattr(args, name) for name in names}
        | {
            "checkpoints": str(args.checkpoints),
            "steps in it": _hosts.steps_in(args.checkpoints),
            "jax": jax.__version__,
        }
    )


def batches(rows: np.ndarray, args: argparse.Namespace, first_call: int) -> Iterator[np.ndarray]:
    """This host's rows of each batch, from `first_call` on, read ahead in threads of Grain's.

    Each epoch has an order of its own. A batch depends on the seed and the call alone, so the number of calls
    is all that a checkpoint needs to know of the input, and another number of hosts may go on with it.
    """
    order = grain.MapDataset.source(list(rows)).seed(args.seed).shuffle().repeat()
    mine = order[jax.process_index() :: jax.process_count()]
    mine = mine.batch(args.batch_size // jax.process_count())
    return iter(mine[first_call:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformationExtraArgs:
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, args.updates // 10, args.updates)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2))
    return optaccum.accumulate(inner, args.calls_per_update)


def specs_of(args: argparse.Namespace) -> PyTree:
    return transformer.FSDP_SPECS if args.fsdp else transformer.SPECS


def make_step(args: argparse.Namespace, tx: optax.GradientTransformationExtraArgs, mesh: Mesh) -> Callable[..., Any]:
    """One call: a batch's gradient, crossing hosts once, enters the window."""
    dtype = jnp.bfloat16 if args.bfloat16 else jnp.float32
    once = {"data_axes": "data", "param_specs": specs_of(args), "gather_dtype": dtype}
    once["shard_sums"] = args.fsdp == "sums"
    rows_on = NamedSharding(mesh, P("data")) if args.fsdp == "layers" else None
    grad_fn = optaccum.value_and_grad(
        functools.partial(transformer.loss_fn, dtype=dtype, rows_on=rows_on),
        num_microbatches=args.microbatches,
        return_info=True,
        **({} if args.fsdp == "layers" else once),
    )

    def step(params, opt_state, rows, stop):
        loss, grads, info = grad_fn(params, rows)
        params, opt_state = optaccum.apply_gradients(tx, grads, opt_state, params, weight=info.weight)
        return params, opt_state, {"loss": loss, "tokens": info.weight, "stop": stop.any()}

    return step


def make_init(args: argparse.Namespace, tx: optax.GradientTransformationExtraArgs, mesh: Mesh) -> Any:
    """From a key to parameters and optimizer state, made where they will live: no host ever holds a large model."""
    size = transformer.Size(args.layers, args.width, args.heads, args.length)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs_of(args), is_leaf=lambda x: isinstance(x, P))

    def init(key):
        params = jax.lax.with_sharding_constraint(transformer.init_params(size, key), shardings)
        return {"params": params, "opt_state": tx.init(params)}

    like_params = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(init, jax.random.key(args.seed))["opt_state"],
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    return jax.jit(init, out_shardings={"params": shardings, "opt_state": like_params})


def open_checkpoints(folder: epath.Path | None) -> ocp.CheckpointManager | None:
    """As the other programs do it; and while training goes on, where the device has a memory of its own."""
    if folder is None or jax.default_backend() == "cpu":
        return _common.open_checkpoints(folder)
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))


def jit_step(step: Callable[..., Any], state: PyTree, mesh: Mesh) -> Any:
    """The step, jitted; what it returns lives where it came from, and in the same memory."""
    kept = jax.tree.map(lambda x: x.sharding, (state["params"], state["opt_state"]))
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=(*kept, NamedSharding(mesh, P())))


def compile_for(args: argparse.Namespace) -> _compile_for.CompiledFor | dict[str, _compile_for.Setting]:
    """What one call needs on devices that are not here; with --fsdp and --memory, in each way to shard."""
    target = _targets.find(args.compile_for)
    mesh, tx = _compile_for.make_mesh(target, args.model_devices, args.batch_size), make_optimizer(args)
    state = jax.eval_shape(make_init(args, tx, mesh), jax.random.key(args.seed))
    by_row = NamedSharding(mesh, P("data"))
    rows = jax.ShapeDtypeStruct((args.batch_size, args.length + 1), np.uint8, sharding=by_row)
    stop = jax.ShapeDtypeStruct((args.batch_size,), np.bool_, sharding=by_row)

    def make_jitted(num_microbatches, fsdp=args.fsdp):
        varied = argparse.Namespace(**vars(args) | {"microbatches": num_microbatches, "fsdp": fsdp})
        return jit_step(make_step(varied, tx, mesh), state, mesh)

    rows_per_device = args.batch_size // mesh.shape["data"]
    step_args = state["params"], state["opt_state"], rows, stop
    if args.fsdp and args.memory is not None:
        steps = {name: functools.partial(make_jitted, fsdp=name) for name in FSDP}
        memory = args.memory * _targets.GIB or target.memory
        return _compile_for.compare(steps, step_args, mesh, args.layers, rows_per_device, memory)
    return _compile_for.report(target, make_jitted, step_args, args.microbatches, rows_per_device, args.memory)


def note(record: dict[str, Any], metrics: PyTree, bar: Any, num_rows: int, began: float) -> bool:
    """Wait for a call's metrics and write them down; returns whether a host wishes to stop."""
    loss, tokens, stop = float(metrics["loss"]), float(metrics["tokens"]), bool(metrics["stop"])
    seconds = time.perf_counter() - began
    for name, value in {"losses": loss, "tokens": tokens, "seconds": seconds}.items():
        record[name].append(value)
    _common.advance(bar, num_rows, loss=loss)
    return stop


class Run(NamedTuple):
    """What stays the same from call to call."""

    args: argparse.Namespace
    mesh: Mesh
    rows: np.ndarray
    step: Callable[..., Any]
    manager: ocp.CheckpointManager | None
    stop_wishes: list[bool]


def run_calls(run: Run, first_call: int, state: PyTree, record: dict[str, Any]) -> tuple[PyTree, bool, Any]:
    """The calls after `first_call`; returns the state, whether they stopped early, and the step's program.

    A call's metrics are read while the next one runs. The wish to stop is one of them: it travels with the
    batch, any host's reaches all in the same call, and so all stop after the same one.
    """
    args, total = run.args, run.args.updates * run.args.calls_per_update
    to_devices = functools.partial(jax.make_array_from_process_local_data, NamedSharding(run.mesh, P("data")))
    bar = _common.progress_bar("training", total * args.batch_size, initial=first_call * args.batch_size, unit="row")
    bar.disable |= jax.process_index() > 0
    compiled, behind, stopped, began = None, None, False, time.perf_counter()
    for call, local_rows in zip(range(first_call + 1, total + 1), batches(run.rows, args, first_call), strict=False):
        rows, stop = to_devices(local_rows), to_devices(np.full(len(local_rows), bool(run.stop_wishes)))
        if compiled is None:
            jitted = jit_step(run.step, state, run.mesh)
            compiled = jitted.lower(state["params"], state["opt_state"], rows, stop).compile()
            _hosts.wait_for_all("compiled", args.timeout)  # links between hosts time out earlier
            began = time.perf_counter()
        params, opt_state, metrics = compiled(state["params"], state["opt_state"], rows, stop)
        state = {"params": params, "opt_state": opt_state}
        stopped |= behind is not None and note(record, behind, bar, args.batch_size, began)
        stopped |= call == args.stop_after
        behind = metrics
        if stopped or call == total or call % args.checkpoint_every == 0:
            stopped |= note(record, behind, bar, args.batch_size, began)
            behind = None
            _common.save(run.manager, call, state, record)
        if stopped:
            break
    bar.close()
    return state, stopped and len(record["losses"]) < total, compiled


def train(args: argparse.Namespace) -> Result:
    """From the newest checkpoint, or the start, to the end or a wish to stop."""
    rows = _text.as_rows(_text.read_documents(args.data, args.max_bytes), args.length)
    settings = settings_of(args, rows)
    compare_hosts(args, settings)
    mesh = _hosts.make_mesh(args.model_devices, args.batch_size, args.microbatches)
    tx = make_optimizer(args)
    with contextlib.ExitStack() as stack:
        stop_wishes = stack.enter_context(_hosts.sigterm_noted())
        manager = open_checkpoints(args.checkpoints)
        stack.callback(lambda: manager and manager.close())
        record = {"settings": settings, "starts": [], "losses": [], "tokens": [], "seconds": []}
        first_call, state, record = _common.restore(
            manager, make_init(args, tx, mesh)(jax.random.key(args.seed)), record
        )
        record["starts"].append(first_call)
        _hosts.say(
            f"{jax.process_count()} hosts, {dict(mesh.shape)} devices, {len(rows):,} rows of text; "
            f"from call {first_call}"
        )
        run = Run(args, mesh, rows, make_step(args, tx, mesh), manager, stop_wishes)
        state, stopped, compiled = run_calls(run, first_call, state, record)
    return Result(
        first_call=first_call,
        calls=len(record["losses"]),
        updates=int(state["opt_state"].gradient_step),
        losses=record["losses"],
        tokens=int(optaccum.weight_total(state["opt_state"])),
        stopped=stopped,
        collectives=None if compiled is None else optaccum.count_collectives(compiled),
        record=record,
    )


def draw(result: Result, args: argparse.Namespace) -> None:
    """The loss over all starts, and how fast each went."""
    record, k = result.record, args.calls_per_update
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss_axes, speed_axes = figure.subplots(1, 2, width_ratios=[3, 2])
    calls, losses, tokens = (
        np.arange(1, result.calls + 1),
        np.array(record["losses"]),
        np.array(record["tokens"]),
    )
    loss_axes.plot(calls, losses, ".", color=_common.GREY, markersize=3, label="one call")
    whole = result.calls // k * k
    windows = [np.average(losses[i : i + k], weights=tokens[i : i + k]) for i in range(0, whole, k)]
    loss_axes.plot(calls[k - 1 :: k], windows, color=_common.BLUE, label=f"one update, {k} calls")
    ends = [*record["starts"][1:], result.calls]
    for start, end in zip(record["starts"], ends, strict=True):
        seconds = np.diff(record["seconds"][start:end:k])
        speed_axes.plot(calls[start:end:k][1:], k * args.batch_size / seconds, color=_common.BLUE)
    for axes in loss_axes, speed_axes:
        for i, start in enumerate(record["starts"][1:]):
            axes.axvline(start, color=_common.VERMILION, linestyle="--", linewidth=1, label="" if i else "resumed")
    loss_axes.set(xlabel="call", ylabel="loss (nats per byte)", title="Training loss")
    speed_axes.set(xlabel="call", ylabel="rows per second", title="Speed, saving included", ylim=(0, None))
    loss_axes.legend(frameon=False)
    _common.save_figure(figure, args.figure)


def main(argv: Sequence[str] | None = None) -> Any:
    """Train, and draw the training so far; or say what it would need."""
    args = parse(argv)
    if args.compile_for:
        jax.config.update("jax_platforms", "cpu")
        return compile_for(args)
    _hosts.start(args)
    result = train(args)
    _hosts.say(
        f"{'stopped' if result.stopped else 'done'} after call {result.calls}: {result.updates} updates, "
        f"{result.tokens:,} bytes of text, loss {result.losses[-1]:.4f}"
    )
    if jax.process_index() == 0:
        draw(result, args)
    return result


if __name__ == "__main__":
    main()
