"""`data_axes` on simulated devices, against the whole batch on one device."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, assert_trees_equal
from jax.sharding import NamedSharding, PartitionSpec as P
from sharded_problem import (
    AUTO,
    EXPLICIT,
    KINDS,
    LAYOUTS,
    NUM_DEVICES,
    PER_DEVICE,
    ROWS,
    errors,
    make_batch,
    make_mesh,
    make_params,
    mean_loss,
    mean_term,
    micro_batches,
    put,
    run,
)

import optaccum


@KINDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "in_place"), [(3, True), (4, False)])  # 6 rows on each device
def test_whole_batch(kind, layout, n, in_place):
    out = run(mean_loss, kind, layout=layout, num_microbatches=n, in_place=in_place)
    assert_trees_close(out, jax.value_and_grad(mean_loss)(make_params(), make_batch()), rtol=1e-5, atol=1e-6)
    if "model" in LAYOUTS[layout][1]:
        assert out[1]["w"].sharding.spec == P(None, "model")
    half = jax.tree.map(lambda x: x[: ROWS // 2], make_batch())  # half of the devices
    with pytest.raises(AssertionError, match="differ beyond"):
        assert_trees_close(out, jax.value_and_grad(mean_loss)(make_params(), half), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kinds", [(AUTO, EXPLICIT), (EXPLICIT, AUTO)], ids=str)
def test_mixed_mesh(kinds):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    args = put(mesh, "data", make_params(), make_batch())
    out = optaccum.value_and_grad(mean_loss, num_microbatches=3, data_axes="data")(*args)
    assert_trees_close(out, jax.value_and_grad(mean_loss)(make_params(), make_batch()), rtol=1e-5, atol=1e-6)


@KINDS
@pytest.mark.parametrize("how", ["in jit", "in jit under set_mesh", "host arrays under set_mesh"])
def test_where_the_mesh_comes_from(kind, how):
    mesh, axes = make_mesh(kind, "data and model")
    grad_fn = optaccum.value_and_grad(mean_loss, num_microbatches=3, data_axes=axes)
    params, batch = put(mesh, axes, make_params(), make_batch())
    if how.startswith("host"):
        params, batch = jax.device_get((make_params(), make_batch()))
    with jax.set_mesh(mesh) if "set_mesh" in how else contextlib.nullcontext():
        out = (jax.jit(grad_fn) if "jit" in how else grad_fn)(params, batch)
    assert_trees_close(out, jax.value_and_grad(mean_loss)(make_params(), make_batch()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [P("model"), P(("data", "model")), P(("model", "data")), P(None, "data")], ids=str)
def test_batch_placed_otherwise_on_an_explicit_mesh(spec):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(EXPLICIT,) * 2)
    params, x = jax.random.normal(jax.random.key(0), (4,)), jax.random.normal(jax.random.key(1), (12, 4))

    def loss_fn(params, x):
        return jnp.mean((x * params) ** 3, axis=1).mean()

    args = jax.device_put(params, NamedSharding(mesh, P())), jax.device_put(x, NamedSharding(mesh, spec))
    out = optaccum.value_and_grad(loss_fn, num_microbatches=3, data_axes="data")(*args)
    assert_trees_close(out, jax.value_and_grad(loss_fn)(params, x), rtol=1e-5)


def _masked_loss(params, batch):
    return optaccum.WeightedMean((errors(params, batch) * batch["mask"]).sum(), batch["mask"].sum())


def _mean_of_means(params, batch):
    return (errors(params, batch) * batch["mask"]).sum() / jnp.maximum(batch["mask"].sum(), 1)


MASKS = {
    "ragged": make_batch()["mask"],
    "one device": jnp.where(jnp.arange(ROWS) // PER_DEVICE == 2, make_batch()["mask"] + 0.25, 0),
    "one row": jnp.zeros(ROWS).at[17].set(3.0),
}


@KINDS
@pytest.mark.parametrize("mask", MASKS)
def test_ragged_weights(kind, mask):
    batch = make_batch() | {"mask": MASKS[mask]}
    weight = batch["mask"].sum()

    def whole(params, batch):
        return (errors(params, batch) * batch["mask"]).sum() / weight

    expected = jax.value_and_grad(whole)(make_params(), batch)
    *out, info = run(_masked_loss, kind, batch=batch, return_info=True)
    assert_trees_close(tuple(out), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info.weight, weight, rtol=1e-6)
    with pytest.raises(AssertionError, match="differ beyond"):
        assert_trees_close(run(_mean_of_means, kind, batch=batch), expected, rtol=1e-2)


@KINDS
def test_no_weight_anywhere(kind):
    value, grads = run(_masked_loss, kind, batch=make_batch() | {"mask": jnp.zeros(ROWS)})
    assert float(value) == 0
    assert_trees_equal(grads, jax.tree.map(jnp.zeros_like, make_params()))


@KINDS
def test_terms_with_their_own_denominators(kind):
    def loss_fn(params, batch):
        routed = batch["x"][:, 0] > 0.3
        router = optaccum.WeightedMean((routed * batch["x"][:, 1] * params["shift"][0] ** 2).sum(), routed.sum())
        plain = mean_term(mean_loss(params, batch), batch)
        return {"tokens": _masked_loss(params, batch), "router": router, "plain": plain}

    def whole(params, batch):
        terms = loss_fn(params, batch)
        return sum(term.total / term.weight for term in terms.values())

    expected = jax.value_and_grad(whole)(make_params(), make_batch())
    assert_trees_close(run(loss_fn, kind), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError, match="differ beyond"):
        assert_trees_close(run(lambda *args: whole(*args) * 1.0, kind), expected, rtol=1e-2)


def _aux(params, batch):
    x = batch["x"]
    return {
        "sum": optaccum.Sum((x > 0).sum(0)),
        "max": optaccum.Max({"float": x.max(0), "bool": x[:, 0] > 1.5, "int": jnp.int8(x * 50).max(0)}),
        "min": optaccum.Min({"bool": x.min() > -9, "float": x.min(1).min()}),
        "mean": optaccum.WeightedMean((x.T @ batch["mask"]), batch["mask"].sum()),
        "last": optaccum.Last({"rows": x, "key": jax.random.wrap_key_data(jnp.uint32(x[0, :2] * 100 + 500))}),
        "stack": optaccum.Stack(x[:, 0].sum()),
        "rows": (x * 2, jnp.argmax(x, 1)),
        "columns": x.T,
        "bare": x[:, 2].mean(),
    }


def _any(max_of_rows):
    return max_of_rows | {"bool": max_of_rows["bool"].any()}


def _loss_and_aux(params, batch):
    aux = _aux(params, batch)
    aux["max"] = optaccum.Max(_any(aux["max"].value))
    return mean_loss(params, batch), aux


@KINDS
def test_aux(kind):
    (_, aux), _ = run(_loss_and_aux, kind, has_aux=True)
    batch, parts = make_batch(), micro_batches(3)
    whole = _aux(None, batch)
    last = parts[NUM_DEVICES - 1, 2]["x"]
    expected = {
        "sum": whole["sum"].value,
        "max": _any(whole["max"].value),
        "min": whole["min"].value,
        "mean": whole["mean"].total / whole["mean"].weight,
        "last": {"rows": last, "key": jax.random.wrap_key_data(jnp.uint32(last[0, :2] * 100 + 500))},
        "stack": jnp.stack([parts[d, i]["x"][:, 0].sum() for d in range(NUM_DEVICES) for i in range(3)]),
        "rows": whole["rows"],
        "columns": whole["columns"],
        "bare": whole["bare"],
    }
    assert_trees_close(aux, expected, rtol=1e-6, atol=1e-6)


@KINDS
@pytest.mark.parametrize("num_devices", [1, 2])
def test_aux_and_carry_that_another_axis_divides(kind, num_devices):
    mesh = jax.make_mesh((num_devices, 2), ("data", "model"), axis_types=(kind,) * 2)
    w, x = jnp.linspace(-1, 1, 4), jax.random.normal(jax.random.key(0), (8, 4))
    kinds = optaccum.Max, optaccum.Last, optaccum.Sum

    def loss_fn(w, x, carry):
        h = x * w
        return jnp.mean(h.sum(1)), (carry + x.mean(0), [kind(h[-1]) for kind in kinds])

    def sums(w, x):
        return optaccum.Sum((x * w).sum(0))

    args = (jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((w, P("model")), (x, P("data", "model"))))
    w_of_all, x_of_all = args
    carry = jax.device_put(jnp.zeros(4), NamedSharding(mesh, P("model")))
    options = {"num_microbatches": 2, "data_axes": "data"}
    grad_fn = optaccum.value_and_grad(loss_fn, has_aux=True, carry_argnum=2, **options)
    (_, (carry, aux)), grads = grad_fn(w_of_all, x_of_all, carry)
    rows = 8 // num_devices
    last = (x * w).reshape(num_devices, rows, 4)[:, -2:].reshape(-1, 4)
    wanted = last.max(0), last[-1], last.sum(0)
    assert_trees_close(tuple(aux), wanted, rtol=1e-6, atol=1e-6)
    assert_trees_close((carry, grads), (2 * x.mean(0), x.mean(0)), rtol=1e-6, atol=1e-6)
    assert_trees_close(optaccum.chunked(sums, **options)(w_of_all, x_of_all), (x * w).sum(0), rtol=1e-6, atol=1e-6)
    assert all((jnp.abs(x - wanted[1]) > 1e-2).any() for x in (wanted[0], wanted[2]))


def test_nan_on_one_device_is_not_lost():
    batch = make_batch() | {"mask": make_batch()["mask"].at[PER_DEVICE].set(jnp.nan)}

    def loss_fn(params, batch):
        return mean_loss(params, batch), (
            optaccum.Max(batch["mask"].max()),
            optaccum.Min(batch["mask"].min()),
        )

    (_, extremes), _ = run(loss_fn, batch=batch, has_aux=True)
    assert np.isnan(extremes).all()
    (_, extremes), _ = run(loss_fn, has_aux=True)
    assert_trees_equal(extremes, (jnp.float32(1), jnp.float32(0)))


@KINDS
def test_carry_is_averaged(kind):
    def loss_fn(params, batch, carry):
        loss = jnp.mean(errors(params, batch) * (1 + carry["mean"][0] ** 2))
        mean = 0.5 * carry["mean"] + 0.5 * batch["x"].mean(0)
        return loss, ({"mean": mean, "half": (mean[0] * 2).astype(jnp.bfloat16)}, batch["y"])

    start = {"mean": jnp.ones(3), "half": jnp.bfloat16(0)}
    (value, (carry, y)), grads = run(loss_fn, kind, args=(start,), has_aux=True, carry_argnum=2)
    parts, means, values = micro_batches(3), [], []
    expected_grads = jax.tree.map(jnp.zeros_like, make_params())
    for d in range(NUM_DEVICES):
        state = start
        for i in range(3):
            fn = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, (state, _)), g = fn(make_params(), parts[d, i], state)
            values.append(loss)
            expected_grads = jax.tree.map(lambda a, b: a + b / 12, expected_grads, g)
        means.append(state["mean"])
    assert_trees_close(carry["mean"], jnp.stack(means).mean(0), rtol=1e-5)
    assert_trees_close(value, jnp.stack(values).mean(), rtol=1e-5)
    assert_trees_close(grads, expected_grads, rtol=1e-5, atol=1e-6)
    assert_trees_equal(y, make_batch()["y"])
    assert carry["half"].dtype == jnp.bfloat16
    assert np.ptp(np.stack(means), axis=0).min() > 1e-2, "the devices' statistics are the same anyhow"


@KINDS
def test_counters_flags_and_keys_of_a_carry_come_back_as_they_are(kind):
    """Haiku's and Equinox's BatchNorm counters, Keras' seeds; inside a scan over layers too."""

    def loss_fn(params, batch, carry):
        def layer(state, scale):
            h, count = state
            return (h * scale, count + 1), None

        (h, count), _ = jax.lax.scan(layer, (batch["x"].sum(1), carry["count"]), jnp.ones(2))
        key, own = jax.random.split(carry["key"])
        drawn = jax.random.fold_in(own, jax.lax.axis_index("data"))  # differs by device; the key does not
        loss = mean_loss(params, batch) + 0 * h.mean() + 0 * jax.random.normal(drawn)
        return loss, ({"count": count, "seen": ~carry["seen"], "key": key}, ())

    carry = {"count": jnp.int32(5), "seen": jnp.bool_(False), "key": jax.random.key(0)}
    (_, (new, _)), _ = run(loss_fn, kind, args=(carry,), has_aux=True, carry_argnum=2, num_microbatches=3)
    key = carry["key"]
    for _ in range(3):
        key = jax.random.split(key)[0]
    assert_trees_equal(new, {"count": jnp.int32(11), "seen": jnp.bool_(True), "key": key})


@pytest.mark.parametrize("what", ["rows", "key"])
def test_an_integer_of_a_carry_that_differs_by_device_is_refused(what):
    def loss_fn(params, batch, carry, key):
        own = (batch["x"] > 0).sum() if what == "rows" else jax.random.randint(key, (), 0, 9)
        return mean_loss(params, batch), ({"n": carry["n"] + own}, ())

    with pytest.raises(TypeError, match=r"carry\['n'\], of dtype int32.*alike on every device.*optaccum\.Sum"):
        run(loss_fn, args=({"n": jnp.int32(0)}, jax.random.key(0)), has_aux=True, carry_argnum=2, key_argnum=3)


def test_where_a_device_drops_the_largest_count_of_the_carry_stands():
    def loss_fn(params, batch, count):
        return mean_loss(params, batch), (count + 1, ())

    batch = make_batch()
    batch["x"] = batch["x"].at[0, 0].set(jnp.nan)  # the first device drops one of three
    options = {"has_aux": True, "carry_argnum": 2, "skip_nonfinite": True, "num_microbatches": 3}
    (_, (count, _)), _ = run(loss_fn, batch=batch, args=(jnp.int32(0),), **options)
    assert [int(shard.data) for shard in count.addressable_shards] == [3] * NUM_DEVICES


@KINDS
def test_keys(kind):
    def loss_fn(params, batch, keys):
        return mean_loss(params, batch), optaccum.Stack(jax.tree.map(jax.random.key_data, keys))

    keys = {"a": jax.random.key(5), "b": jax.random.key(6)}
    (_, stacked), _ = run(loss_fn, kind, args=(keys,), has_aux=True, key_argnum=2)
    for name, key in keys.items():
        expected = [
            jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, i), d))
            for d in range(NUM_DEVICES)
            for i in range(3)
        ]
        assert_trees_equal(stacked[name], jnp.stack(expected))
        assert len({tuple(np.asarray(data)) for data in expected}) == 12
