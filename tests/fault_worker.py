"""A small training program that may be killed at any moment and started again; `test_faults` does so.

    python fault_worker.py FOLDER NUM_CALLS PAUSE

It trains to call NUM_CALLS, saves a checkpoint after every call, goes on from the newest that can be read,
and prints each call's number when that call is saved. PAUSE seconds pass in each call and again while a
checkpoint is half written, so that kills fall there too.
"""

import functools
import hashlib
import io
import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaccum

NUM_ROWS = 8


@functools.cache
def make_tx():
    return optaccum.accumulate(
        optax.adamw(0.05),
        lambda step: 2 + step % 2,
        should_skip_update_fn=optax.skip_not_finite,
        averaged_extra_args=("value",),
        track_noise_scale=True,
    )


def init(tx):
    params = {"w": jnp.array([0.3, -0.2, 0.1]), "b": jnp.array(0.1)}
    return params, tx.init(params)


def batch_of(call):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), call), (NUM_ROWS, 3))
    mask = (jnp.arange(NUM_ROWS) % 5 <= call % 4).astype(jnp.float32)  # so that weights differ
    return {"x": jnp.where(call % 7 == 5, jnp.nan, x), "mask": mask}  # and some calls are skipped


def loss_fn(params, batch, key):
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    losses = (jnp.tanh(x @ params["w"] + params["b"]) - jnp.sin(x.sum(-1))) ** 2
    return optaccum.WeightedMean((losses * batch["mask"]).sum(), batch["mask"].sum())


@functools.cache
def make_step(tx):
    grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=3, key_argnum=2, return_info=True)

    @jax.jit
    def step(call, params, state):
        key = jax.random.fold_in(jax.random.key(0), call)
        value, grads, info = grad_fn(params, batch_of(call), key)
        return optaccum.apply_gradients(tx, grads, state, params, weight=info.weight, value=value)

    return step


def save(folder, call, tree, pause=0.0):
    """Under its name only when all of it is on the disk; the two newest are kept."""
    file = io.BytesIO()
    np.savez(file, *map(np.asarray, jax.tree.leaves(tree)))
    data = file.getvalue()
    data = hashlib.sha256(data).digest() + data
    partial = folder / "partial"
    with partial.open("wb") as f:
        f.write(data[: len(data) // 2])
        f.flush()
        time.sleep(pause)
        f.write(data[len(data) // 2 :])
        f.flush()
        os.fsync(f.fileno())
    partial.replace(folder / f"{call:06d}.checkpoint")
    for old in checkpoints(folder)[:-2]:
        old.unlink()


def checkpoints(folder):
    return sorted(folder.glob("*.checkpoint"))


def load(path, like):
    data = path.read_bytes()
    digest, data = data[:32], data[32:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(f"{path.name} is not what was written: {len(data)} bytes, with another checksum.")
    with np.load(io.BytesIO(data)) as arrays:
        return jax.tree.structure(like).unflatten([jnp.asarray(arrays[name]) for name in arrays.files])


def restore(folder, like):
    """The newest checkpoint that can be read, and its call; (0, like) where there is none."""
    for path in reversed(checkpoints(folder)):
        try:
            return int(path.stem), load(path, like)
        except ValueError as error:
            print(f"refused: {error}", file=sys.stderr)
            path.rename(path.with_suffix(".refused"))
    return 0, like


def main(folder, num_calls, pause):
    terminated = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))  # finish the call, and go
    tx = make_tx()
    step = make_step(tx)
    first, tree = restore(folder, init(tx))
    for call in range(first, num_calls):
        time.sleep(pause)
        tree = jax.block_until_ready(step(call, *tree))
        save(folder, call + 1, tree, pause)
        print(call + 1, flush=True)
        if terminated:
            sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
