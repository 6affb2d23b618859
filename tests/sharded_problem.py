"""A small regression, its batch sharded over simulated devices: what the tests of `data_axes` share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optaccum

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
LAYOUTS = {
    "data": ((4,), ("data",), "data"),
    "data and model": ((4, 2), ("data", "model"), "data"),
    "one device and model": ((1, 2), ("data", "model"), "data"),
    "two data axes": ((2, 2, 2), ("replica", "data", "model"), ("replica", "data")),
}
ROWS, NUM_DEVICES = 24, 4
PER_DEVICE = ROWS // NUM_DEVICES


def make_params():
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    w, scale = jax.random.normal(k1, (3, 4)), jax.random.normal(k2, (4,))
    return {"w": w, "scale": scale, "shift": jax.random.normal(k3, (3,)), "none": None}


def make_batch():
    k1, k2, k3 = jax.random.split(jax.random.key(1), 3)
    x, y = jax.random.normal(k1, (ROWS, 3)), jax.random.normal(k2, (ROWS, 4))
    return {"x": x, "y": y, "mask": jax.random.bernoulli(k3, 0.4, (ROWS,)).astype(jnp.float32)}


def errors(params, batch):
    """Squared errors; the scan, over one layer, is what lets `in_place` be chosen."""
    h = jnp.tanh((batch["x"] + params["shift"]) @ params["w"])
    h, _ = jax.lax.scan(lambda h, scale: (h * scale, None), h, params["scale"][None])
    return jnp.sum((h - batch["y"]) ** 2, axis=1)


def mean_loss(params, batch):
    return errors(params, batch).mean()


def mean_term(mean, batch):
    """A mean over examples as a term of a loss."""
    return optaccum.WeightedMean(mean * len(batch["x"]), len(batch["x"]))


def make_mesh(kind, layout="data"):
    shape, names, axes = LAYOUTS[layout]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names)), axes


def put(mesh, axes, params, batch):
    """Parameters sharded over "model" alone, where there is such an axis; rows over the data axes."""
    model = "model" if "model" in mesh.axis_names else None
    specs = {"w": P(None, model), "scale": P(model)}
    params = {
        name: x if x is None else jax.device_put(x, NamedSharding(mesh, specs.get(name, P())))
        for name, x in params.items()
    }
    return params, jax.device_put(batch, NamedSharding(mesh, P(axes)))


def run(loss_fn, kind=AUTO, params=None, batch=None, layout="data", args=(), **options):
    mesh, axes = make_mesh(kind, layout)
    options = {"num_microbatches": 3, **options}
    params, batch = put(mesh, axes, make_params() if params is None else params, batch or make_batch())
    return optaccum.value_and_grad(loss_fn, data_axes=axes, **options)(params, batch, *args)


def micro_batches(n):
    """(device, i) -> that device's micro-batch i, of equal sizes."""
    rows = np.arange(ROWS).reshape(NUM_DEVICES, -1)
    parts = {(d, i): rows[d, i::n] for d in range(NUM_DEVICES) for i in range(n)}
    batch = make_batch()
    return {index: {name: x[part] for name, x in batch.items()} for index, part in parts.items()}
