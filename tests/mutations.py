"""Are the tests any good? Break the package in one known way at a time, and see that they notice.

`make mutants` runs all; `python tests/mutations.py weight key` those whose description holds one of these.
Each change is made to a copy in a temporary folder, never to the package itself. The test that failed then
runs on the unchanged copy, where it must pass: only so does its failure show that the change was caught.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
STREAMING, DATA_AXES = "streaming/test_accumulate.py", "scanning/test_data_axes.py"


class Mutation(NamedTuple):
    breaks: str  # what it breaks
    old: str  # occurs exactly once in the package
    new: str
    tests: str  # arguments for pytest, files in tests/; one of these tests must fail


MUTATIONS = [
    Mutation(
        "streaming: the weight is dropped",
        "return Count(jnp.where(jnp.isfinite(weight), weight, jnp.nan), scales)",
        "return Count(jnp.ones([], jnp.float32), scales)",
        STREAMING,
    ),
    Mutation(
        "streaming: divided by k instead of W",
        "weight = jnp.where(emits, state.weight_sum, 1)",
        "weight = jnp.where(emits, state.micro_step, 1)",
        STREAMING,
    ),
    Mutation(
        "streaming: the window is never reset",
        "return jnp.where(first, term, total.astype(wide) + term)",
        "return jnp.where(False, term, total.astype(wide) + term)",
        STREAMING,
    ),
    Mutation(
        "streaming: emits a micro-step early",
        "return micro_step >= every_k",
        "return micro_step + 1 >= every_k",
        STREAMING,
    ),
    Mutation(
        "streaming: masks by multiplication",
        "return x if weight is None else jnp.where(weight != 0, x, jnp.zeros_like(x))",
        "return x if weight is None else x * (weight != 0).astype(x.dtype)",
        STREAMING,
    ),
    Mutation(
        "streaming: a skip still adds its weight",
        "weight_sum=_unless(skip, weight_sum, state.weight_sum),",
        "weight_sum=weight_sum,",
        "streaming/test_skip.py",
    ),
    Mutation(
        "streaming: a weight that is not finite stays in the total",
        "counts = emits & jnp.isfinite(state.weight_sum)",
        "counts = emits",
        "streaming/test_skip.py",
    ),
    Mutation(
        "streaming: emit does not end a window",
        'full = (full | as_flag("emit", given.emit)) &',
        "full = full &",
        "streaming/test_emit.py",
    ),
    Mutation(
        "streaming: what is kept takes the layout of what comes",
        "return new if jax.typeof(new).sharding.spec == sharding.spec else jax.sharding.reshard(new, sharding)",
        "return new if sharding else new",
        "streaming/test_layouts.py",
    ),
    Mutation(
        "streaming: the sums of a jitted init are replicated",
        "return zeros_like(leaf, accumulator_dtype_of(",
        "return jnp.zeros_like(leaf, accumulator_dtype_of(",
        "streaming/test_layouts.py -k init",
    ),
    Mutation(
        "flush does not look whether emit is read",
        "if not all(traced.depends_on(i)[0] for i in outputs):",
        "if False:",
        "streaming/test_flush.py -k reach",
    ),
    Mutation(
        "streaming: the sum is rounded to the gradient's dtype",
        "total.astype(wide) + term).astype(total.dtype)",
        "total.astype(wide) + term).astype(grad.dtype).astype(total.dtype)",
        "test_dtypes.py",
    ),
    Mutation(
        "streaming: inner runs on every step, its result dropped",
        "run_if(emits, emit, (target, state.inner_state, state.noise_state))",
        "jax.tree.map(lambda new, old: jnp.where(emits, new, old), emit(old := (target, state.inner_state,"
        " state.noise_state)), old)",
        f"{STREAMING} streaming/test_apply_gradients.py",
    ),
    Mutation(
        "streaming: a window without weight steps the optimizer",
        "emits = full & (state.weight_sum != 0)",
        "emits = full",
        STREAMING,
    ),
    Mutation(
        "streaming: has_updated also for a window without weight",
        "has_updated=emits,",
        "has_updated=full,",
        STREAMING,
    ),
    Mutation(
        "streaming: averaged extra args lose their weight",
        "added(total, value, first, count.weight if count.scales else None)",
        "added(total, value, first)",
        STREAMING,
    ),
    Mutation(
        "streaming: counters overflow",
        "gradient_step=jnp.where(emits, optax.safe_increment(state.gradient_step), state.gradient_step)",
        "gradient_step=jnp.where(emits, state.gradient_step + 1, state.gradient_step)",
        "streaming/test_long_runs.py -k saturate",
    ),
    Mutation(
        "streaming: the total weight in one word",
        "rounded, lost = two_sum(high, weight)",
        "rounded, lost = high + weight, jnp.zeros_like(high)",
        "streaming/test_state.py",
    ),
    Mutation(
        "flush emits where no window is open",
        "is_open = inside.micro_step > 0",
        "is_open = inside.micro_step >= 0",
        "streaming/test_flush.py",
    ),
    Mutation(
        "value_and_update: the backward pass runs at a weight of zero",
        "lax.while_loop(lambda go: go, once, weight != 0)",
        "once(weight != 0)",
        "streaming/test_value_and_update.py -k nan",
    ),
    Mutation(
        "value_and_update: a window does not start afresh",
        "return jax.tree.map(lambda x: jnp.where(operands.first, jnp.zeros_like(x), x), operands.sums)",
        "return operands.sums",
        "streaming/test_value_and_update.py -k gradient_and_apply",
    ),
    Mutation(
        "noise scale: by the formula for equal weights",
        "term = weight * sq_norm if is_mean else sq_norm / jnp.where(counts, weight, 1)",
        "term = sq_norm",
        "streaming/test_noise_scale.py",
    ),
    Mutation(
        "scanning: reduces in the loop",
        "call = with_diff(diff)._replace(batch=micro_batch,",
        "call = with_diff(lax.pmean(diff, options.data_axes or ()))._replace(batch=micro_batch,",
        "scanning/test_data_axes_programs.py -k test_gradients_cross_once",
    ),
    Mutation(
        "scanning: one key for all micro-batches",
        "key = fold_in(key, index)\n        if options.data_axes:",
        "key = fold_in(key, jnp.int32(0))\n        if options.data_axes:",
        f"{DATA_AXES} -k test_keys",
    ),
    Mutation(
        "scanning: one key for all devices",
        "key = fold_in(key, lax.axis_index(options.data_axes))",
        "pass",
        f"{DATA_AXES} -k test_keys",
    ),
    Mutation(
        "scanning: contiguous split instead of strided",
        "shape = (x.shape[0] // n, n, *x.shape[1:])",
        "return x.reshape((n, x.shape[0] // n, *x.shape[1:])).swapaxes(0, 1)",
        "scanning/test_split.py",
    ),
    Mutation(
        "scanning: the carry is not threaded",
        "aux=jax.tree.map(jnp.add, sums.aux, summed),\n            carry=carry,",
        "aux=jax.tree.map(jnp.add, sums.aux, summed),\n            carry=sums.carry,",
        f"{DATA_AXES} -k carry",
    ),
    Mutation(
        "scanning: terms share one denominator",
        "ratio(jnp.ones([], terms[name].total.dtype), weight) for name, weight in weights.items()}",
        "ratio(jnp.ones([], terms[name].total.dtype), sum(weights.values()) / 2) for name, weight in weights.items()}",
        f"{DATA_AXES} -k terms",
    ),
    Mutation(
        "scanning: a short micro-batch weighs as much as a long one",
        "return loss_terms(loss, batch_size_of(micro_batch) / num_rows), carry, aux",
        "return loss_terms(loss, 1.0), carry, aux",
        "test_modes.py -k short",
    ),
    Mutation(
        "scanning: a dropped micro-batch is counted and kept",
        "lambda new, old: jnp.where(kept, new, old), new, dropped)",
        "lambda new, old: new, new, dropped)",
        "scanning/test_data_axes_options.py -k drop",
    ),
    Mutation(
        "scanning: NaN on one device is lost",
        "return x[-1] if kind is Last else (jnp.max if kind is Max else jnp.min)(x, axis=0)",
        "return x[-1] if kind is Last else (jnp.nanmax if kind is Max else jnp.nanmin)(x, axis=0)",
        f"{DATA_AXES} -k nan",
    ),
    Mutation(
        "scanning: differentiates through the references",
        "jax.jvp(leading, primals, tangents)",
        "jax.jvp(fast, primals, tangents)",
        "test_in_place.py -k outer",
    ),
    Mutation(
        "scanning: what no member of a vmap changes is said to differ",
        "lambda path, _: path in found, structs",
        "lambda path, _: True, structs",
        "test_in_place.py -k derivative_of_a_vmap",
    ),
    Mutation(
        "a derivative's rule leaves the axis of a vmap where it lay",
        "lambda x: jnp.squeeze(x[None], 0), tree)",
        "lambda x: x, tree)",
        "test_in_place.py -k derivative_of_a_vmap",
    ),
    Mutation(
        "chunked: without recomputing",
        "@functools.partial(jax.checkpoint, prevent_cse=False)\n",
        "\n",
        "scanning/test_chunked.py -k memory",
    ),
    Mutation(
        "collectives: the counter ignores loops",
        "(in_loops if repeats else outside).update(found[number + 1])",
        "outside.update(found[number + 1])",
        "instruments/test_collectives.py",
    ),
    Mutation(
        "collectives: what an emit does is in a loop",
        "return is_carried and (after.opcode, after.operands)",
        "return False and (after.opcode, after.operands)",
        "instruments/test_collectives.py -k emit",
    ),
    Mutation(
        "collectives: a flag in the carry is enough",
        '(after.opcode, after.operands) == ("constant", ["false"])',
        "True",
        "instruments/test_collectives.py -k twice",
    ),
    Mutation(
        "verify: aux goes unseen",
        "structure.unflatten(grads) if with_grads else (), carry, aux)",
        "structure.unflatten(grads) if with_grads else (), carry, ())",
        "instruments/test_verify.py -k aux",
    ),
    Mutation(
        "verify: what is dropped counts",
        "kept &= jnp.stack(",
        "_ = kept & jnp.stack(",
        "instruments/test_verify.py -k dropped",
    ),
    Mutation(
        "verify: a maximum is divided like a sum",
        "xs[0] if m else sum(map(_ratio, xs, weights))",
        "sum(map(_ratio, xs, weights))",
        "instruments/test_verify.py -k maximum",
    ),
    Mutation(
        "verify: the order of the rows goes unasked",
        "        return _TOGETHER\n",
        "        pass\n",
        "instruments/test_diagnose.py -k rows",
    ),
    Mutation(
        "plan: off by one divisor",
        "return MicrobatchPlan(sizes[-1] // max(fitting), max(fitting),",
        "fitting = fitting[:1]\n    return MicrobatchPlan(sizes[-1] // max(fitting), max(fitting),",
        "instruments/test_plan.py -k memory",
    ),
    Mutation(
        "data_axes: what the loss leaves of its carry crosses",
        "return stopped.get(id(source), source) is jaxpr.invars[num_consts:][argument]",
        "return False",
        "scanning/test_data_axes_programs.py -k leaves",
    ),
    Mutation(
        "nnx: what objects share is not differentiated",
        "return tuple(sorted(places, key=lambda place: place[1] is None))",
        "return tuple(places)",
        "test_nnx_argnums.py",
    ),
    Mutation(
        "nnx: what was sown before the call piles up",
        "        _pop_sown(objects, is_diff)\n        graphdef",
        "        graphdef",
        "test_nnx_argnums.py",
    ),
    Mutation(
        "nnx: the optimizer gets no weight",
        "nnx.as_pure(optimizer.opt_state), params, **nnx.as_pure(extra_args)",
        "nnx.as_pure(optimizer.opt_state), params",
        "test_nnx_optimizer.py",
    ),
    Mutation(
        "linen: FP8 state is trained, not overwritten",
        "overwrites = isinstance(grads, Mapping) and",
        "overwrites = False and",
        "test_linen.py",
    ),
    Mutation(
        "sharded: a device keeps its part of its own gradient",
        "grad = lax.psum_scatter(grad, names, scatter_dimension=dim, tiled=not self.other[dim])",
        "grad = Shard((*[()] * dim, names, *[()] * grad.ndim)[: grad.ndim], self.other).part(grad)",
        "scanning/test_sharded.py -k stacked",
    ),
    Mutation(
        "sharded: what is tied inside a scan is not reduced",
        "return None, grad if across is None else across(grad)",
        "return None, grad if across is None else across.part(grad)",
        "scanning/test_sharded.py -k whole_batch",
    ),
    Mutation(
        "sharded: sums of a bare jit are replicated",
        "return lax.select(never, lax.convert_element_type(x, zeros.dtype), zeros)",
        "return zeros",
        "scanning/test_sharded.py -k layer_by_layer",
    ),
    Mutation(
        "in place: one function has a reference twice",
        "if any(loss.hands_twice({own for own, total in dtypes if own == total}) for loss in losses):",
        "if False:",
        "test_tied.py",
    ),
    Mutation(
        "in place: a scan has one tied parameter twice",
        "return is_tied and all(x is not y for y in args[:i]) and",
        "return is_tied and",
        "test_tied.py",
    ),
]


def copy_package(folder: pathlib.Path) -> None:
    skip = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("optaccum", "tests", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_tests(folder: pathlib.Path, arguments: str) -> subprocess.CompletedProcess[str]:
    files = [f"tests/{word}" if word.endswith(".py") else word for word in arguments.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def verdict(folder: pathlib.Path, mutation: Mutation, sound: set[str]) -> str:
    """How the tests take the package in `folder`, broken so; `sound` collects those that pass without."""
    texts = {path: path.read_text() for path in (folder / "optaccum").rglob("*.py")}
    count = sum(text.count(mutation.old) for text in texts.values())
    if count != 1:
        return f"STALE: its old text occurs {count} times"
    path, text = next((path, text) for path, text in texts.items() if mutation.old in text)
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        result = run_tests(folder, mutation.tests)
    finally:
        path.write_text(text)
    if result.returncode != 1:
        return "SURVIVED" if result.returncode == 0 else f"NOT RUN: pytest exits with {result.returncode}"
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+::\w+)", result.stdout, re.MULTILINE)
    if not failed:
        return "NOT RUN: pytest names no test that failed"
    if failed[0] not in sound and run_tests(folder, failed[0]).returncode:
        return f"NOT RUN: {failed[0]} fails on the unchanged package too"
    sound.add(failed[0])
    return f"caught by {failed[0].split('::')[1]}"


def main(words: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not words or any(word in m.breaks for word in words)]
    started, bad, sound = time.monotonic(), [], set[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        copy_package(folder)
        for mutation in chosen:
            said = verdict(folder, mutation, sound)
            print(f"{mutation.breaks:<62}{said}", flush=True)
            if not said.startswith("caught"):
                bad.append(mutation.breaks)
    caught = len(chosen) - len(bad)
    print(f"{caught} of {len(chosen)} caught in {time.monotonic() - started:.0f} s")
    return 1 if bad or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
