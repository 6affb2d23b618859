"""One of several JAX processes that train together: `python process_worker.py ADDRESS COUNT INDEX OUTPUT`.

`test_processes` starts them, and trains on the whole batch in one process to compare.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optaccum

ROWS, NUM_STEPS, K = 16, 3, 4
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
MODES = ("stream", "scan", "data_axes")
INNER = optax.adam(0.1)
STREAM = optaccum.accumulate(INNER, K)


def loss_fn(params, batch):
    error = jnp.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"]
    return optaccum.WeightedMean((error**2 * batch["mask"]).sum(), batch["mask"].sum())


def make_problem():
    """Parameters, and the steps' batches, as NumPy arrays."""
    rng = np.random.default_rng(0)

    def make_batch():
        mask = rng.integers(0, 4, size=ROWS)
        return {"x": rng.normal(size=(ROWS, 4)), "y": rng.normal(size=ROWS), "mask": mask}

    params = {"w": rng.normal(size=(4, 6)), "v": rng.normal(size=6)}
    return jax.tree.map(np.float32, (params, [make_batch() for _ in range(NUM_STEPS)]))


def _whole(params, batch):
    out = loss_fn(params, batch)
    return out.total / out.weight


WHOLE = jax.value_and_grad(_whole)


def train_whole(grad_fn=WHOLE):
    """Trains in one process, on one device."""
    params, batches = make_problem()
    opt_state, losses = INNER.init(params), []
    for batch in batches:
        loss, grads = grad_fn(params, batch)
        updates, opt_state = INNER.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    return {**params, "losses": jnp.stack(losses)}


@functools.partial(jax.jit, static_argnames="data_axes", donate_argnums=(0, 1))
def _scan_step(params, opt_state, batch, data_axes):
    grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=K, data_axes=data_axes)
    loss, grads = grad_fn(params, batch)
    updates, opt_state = INNER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _stream_step(params, state, micro_batch):
    def total_and_weight(params):
        out = loss_fn(params, micro_batch)
        return out.total, out.weight

    (total, weight), grads = jax.value_and_grad(total_and_weight, has_aux=True)(params)
    params, state = optaccum.apply_gradients(STREAM, grads, state, params, denominator=weight)
    return params, state, total


def _stream_window(place, params, state, batch):
    totals = []
    for i in range(K):
        micro_batch = place({name: x[i::K] for name, x in batch.items()})
        params, state, total = _stream_step(params, state, micro_batch)
        totals.append(float(total))
    return params, state, sum(totals) / batch["mask"].sum()


def train(mode, kind):
    """Trains on all devices of all processes, each process with its own share of the rows."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(KINDS[kind],))
    index, count = jax.process_index(), jax.process_count()

    def place(batch):
        sharding = NamedSharding(mesh, P("data"))
        own = jax.tree.map(lambda x: np.split(x, count)[index], batch)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), own)

    params, batches = make_problem()
    losses = []
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        state = jax.jit((STREAM if mode == "stream" else INNER).init)(params)
        for batch in batches:
            if mode == "stream":
                params, state, loss = _stream_window(place, params, state, batch)
            else:
                data_axes = "data" if mode == "data_axes" else None
                params, state, loss = _scan_step(params, state, place(batch), data_axes)
            losses.append(float(loss))
    return {**jax.device_get(params), "losses": np.float32(losses)}


def main(address, count, index, output):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(index), initialization_timeout=300)
    results = {f"{mode}-{kind}": train(mode, kind) for mode in MODES for kind in KINDS}
    np.savez(output, **{f"{name}/{key}": x for name, out in results.items() for key, x in out.items()})
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
