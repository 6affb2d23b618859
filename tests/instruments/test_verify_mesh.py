"""`verify` on a mesh: sharded batches, `data_axes`, and losses that name an axis."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_verify import B, losses, mean_loss, problem, summed

import optaccum


def on_mesh(axis_type, params, batch):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:2])
    return (
        mesh,
        jax.device_put(params, NamedSharding(mesh, P())),
        jax.device_put(batch, NamedSharding(mesh, P("data"))),
    )


@pytest.mark.parametrize(
    ("axis_type", "loss_fn", "ok"), [(AxisType.Auto, mean_loss, True), (AxisType.Explicit, summed, False)]
)
def test_on_a_mesh(axis_type, loss_fn, ok):
    mesh, params, batch = on_mesh(axis_type, *problem())
    with jax.set_mesh(mesh):
        report = optaccum.verify(loss_fn, params, batch, microbatch_size=4, data_axes="data")
    assert report.ok == ok, str(report)
    assert report.num_microbatches == 2  # of the 8 rows on each device
    assert ("is a sum" in report.cause) != ok


def mean_by_name(params, batch):
    """Only runs where the axis has a name, on one device's rows."""
    index = jax.lax.axis_index("data")
    assert len(batch["y"]) <= B // 2
    return mean_loss(params, batch) + 0 * index


def mean_on_the_mesh(params, batch):
    """Names no axis, but needs a mesh."""
    return mean_loss(jax.sharding.reshard(params, P()), batch)


def weighted_by_name(params, batch):
    """The mean over all devices' rows by their weights."""
    weight = jnp.where(batch["y"] > 0, 1, 0.2)
    return (losses(params, batch) * weight).sum() / jax.lax.pmean(weight.sum(), "data")


@pytest.mark.parametrize(
    ("axis_type", "loss_fn", "ok"),
    [
        (AxisType.Auto, weighted_by_name, False),
        (AxisType.Explicit, mean_by_name, True),
        (AxisType.Explicit, mean_on_the_mesh, True),
    ],
)
def test_a_loss_that_only_runs_across_devices(axis_type, loss_fn, ok):
    _, params, batch = on_mesh(axis_type, *problem())
    report = optaccum.verify(loss_fn, params, batch, num_microbatches=4, data_axes=("data",))
    assert report.ok == ok, str(report)
    assert ("unequal weights" in report.cause) != ok


def looked_up(table, batch, wrong):
    """A look-up of sharded rows, for which JAX finds no layout on an Explicit mesh, and a weight for each."""
    each = jnp.square(table[batch["token"]]).sum(1) * batch["weight"]
    if wrong:
        return each.sum() / batch["weight"].sum()
    return optaccum.WeightedMean(each.sum(), batch["weight"].sum())


@pytest.mark.parametrize("wrong", [False, True])
def test_the_whole_batch_on_an_explicit_mesh_is_that_of_all_devices(wrong):
    table = jnp.linspace(-1, 2, 24).reshape(8, 3)
    batch = {"token": jnp.arange(B) * 3 % 8, "weight": jnp.arange(B) % 5 + 1.0}
    _, table, batch = on_mesh(AxisType.Explicit, table, batch)
    report = optaccum.verify(looked_up, table, batch, wrong, num_microbatches=4, data_axes="data")
    assert report.ok != wrong, str(report)
    assert ("unequal weights" in report.cause) == wrong


def test_parameters_that_are_not_on_the_explicit_mesh():
    """JAX then finds no layout for the whole batch's gradient."""
    _, _, x = on_mesh(AxisType.Explicit, (), jnp.arange(32.0).reshape(8, 4))
    w, options = jnp.ones((4, 2)), {"num_microbatches": 2, "data_axes": "data"}
    with pytest.raises(Exception, match="sharded and it is ambiguous"):
        jax.jit(jax.grad(lambda w, x: jnp.mean((x @ w) ** 2)))(w, x)
    assert optaccum.verify(lambda w, x: jnp.mean((x @ w) ** 2), w, x, **options).ok


def test_carry_aux_micro_batches_of_ones_own_and_sharded_parameters():
    params, batch = problem()
    specs = {"w": P(None, "data"), "b": P("data"), "out": P("data")}

    def loss_fn(params, batch, carry, key, alike=True):
        each = losses(params, batch)
        count = carry["count"] + 1 + (0 if alike else 1) * jax.lax.axis_index("data")
        carry = {"count": count, "mean": 0.9 * carry["mean"] + 0.1 * each.mean()}
        noise = optaccum.Stack(jax.random.uniform(key))
        return each.mean(), (carry, {"rows": each, "last": optaccum.Last(batch["y"].sum()), "noise": noise})

    args = {"count": jnp.int32(0), "mean": jnp.float32(0)}, jax.random.key(0)
    options = {"has_aux": True, "carry_argnum": 2, "key_argnum": 3, "data_axes": "data"}
    mesh, _, on_devices = on_mesh(AxisType.Auto, (), batch)
    sharded = jax.device_put(params, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})
    report = optaccum.verify(loss_fn, sharded, on_devices, *args, num_microbatches=4, shard_sums=True, **options)
    assert report.ok, str(report)
    expected = {"aux['rows']", "aux['last']", "aux['noise']", "carry['count']", "carry['mean']"}
    assert expected < set(report.leaves)

    own = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)
    mesh, *_ = on_mesh(AxisType.Explicit, (), ())
    params = jax.device_put(params, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})
    own = jax.device_put(own, NamedSharding(mesh, P(None, "data")))
    unlike = functools.partial(loss_fn, alike=False)  # each device counts by itself
    report = optaccum.verify(unlike, params, own, *args, presplit=True, **options)
    assert report.leaves.pop("carry['count']") > 0.1
    assert max(report.leaves.values()) <= report.rtol
    assert expected - {"carry['count']"} < set(report.leaves)
    assert report.cause.startswith("carry['count'] is not what the same micro-batches give in a Python loop")
