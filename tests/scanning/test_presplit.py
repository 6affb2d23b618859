"""Micro-batches of the caller: `presplit` and `count_argnum`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, assert_trees_equal
from jax.sharding import NamedSharding, PartitionSpec as P
from scanning_problem import PARAMS, mean_loss, mean_term, penalty, token_loss
from sharded_problem import KINDS, make_mesh

import optaccum

N, SIZE = 4, 3
X = np.random.default_rng(1).normal(size=(N, SIZE, 3)).astype(np.float32)
BATCH = {"x": jnp.asarray(X), "mask": jnp.asarray(np.arange(12).reshape(N, SIZE) % 5 > 1, jnp.float32)}
LOSSES = {
    "mean": mean_loss,
    "weighted": token_loss,
    "terms": lambda p, b: {"tokens": token_loss(p, b), "penalty": mean_term(penalty(p, b), b)},
}


def ratio_of(loss_fn):
    def whole(params, batch):
        loss = loss_fn(params, batch)
        loss = loss if isinstance(loss, dict) else {"": loss}
        return sum(t.total / t.weight if isinstance(t, optaccum.WeightedMean) else t for t in loss.values())

    return whole


def rows(count, batch=BATCH):
    return jax.tree.map(lambda x: x[:count].reshape(-1, *x.shape[2:]), batch)


@pytest.mark.parametrize("count", [-3, 0, 2, 9, np.int8(3), np.uint8(200), np.uint32(2**32 - 1)])
def test_the_loss_sees_the_count_as_it_was_clipped(count):
    runs = min(max(int(count), 0), N)

    def loss_fn(params, batch, count):
        return mean_loss(params, batch) * (count - 5)

    def whole(params):
        return mean_loss(params, rows(runs)) * (runs - 5) if runs else 0.0 * params["b"]

    expected, options = jax.value_and_grad(whole)(PARAMS), {"presplit": True, "count_argnum": 2}
    loss = optaccum.microbatched(loss_fn, **options)
    for value_and_grad in (optaccum.value_and_grad(loss_fn, **options), jax.value_and_grad(loss)):
        assert_trees_close(value_and_grad(PARAMS, BATCH, count), expected, rtol=1e-5, atol=1e-6)
    assert optaccum.verify(loss_fn, PARAMS, BATCH, count, **options).ok
    if runs:
        with pytest.raises(AssertionError):
            assert_trees_close(jax.grad(loss)(PARAMS, BATCH, runs - 1), expected[1], rtol=1e-3)


@pytest.mark.parametrize("in_place", [None, False])
@pytest.mark.parametrize("name", LOSSES)
def test_one_program_for_every_count(name, in_place):
    options = {"presplit": True, "count_argnum": 2, "in_place": in_place, "return_info": True}
    loss_fn = functools.wraps(LOSSES[name])(lambda params, batch, count: LOSSES[name](params, batch))
    grad_fn, whole = jax.jit(optaccum.value_and_grad(loss_fn, **options)), ratio_of(LOSSES[name])
    for count in (1, 3, 4, 9):
        value, grads, info = grad_fn(PARAMS, BATCH, count)
        expected = jax.value_and_grad(whole)(PARAMS, rows(count))
        assert_trees_close((value, grads), expected, rtol=1e-5, atol=1e-6)
        if count == 3:
            with pytest.raises(AssertionError):
                assert_trees_close((value, grads), jax.value_and_grad(whole)(PARAMS, rows(4)), rtol=1e-3)
    for count in (0, -2):
        value, grads, info = grad_fn(PARAMS, BATCH, count)
        assert_trees_equal((value, grads), (jnp.float32(0), jax.tree.map(jnp.zeros_like, PARAMS)))
        assert float(info.weight) == 0
    assert grad_fn._cache_size() == 1
    eager = optaccum.value_and_grad(lambda p, b, count: LOSSES[name](p, b), **options)
    assert_trees_close(eager(PARAMS, BATCH, 3), grad_fn(PARAMS, BATCH, 3), rtol=1e-6)


def with_aux(params, batch, count, key, carry):
    aux = {
        "rows": batch["x"] * 2,
        "pair": batch["x"][0::3] - batch["x"][1::3],  # rows that belong together
        "mean": batch["x"].mean(),
        "sum": optaccum.Sum(batch["mask"].sum()),
        "max": optaccum.Max(batch["x"].max()),
        "last": optaccum.Last(batch["x"].sum()),
        "stack": optaccum.Stack(jax.random.uniform(key)),
    }
    carry = {"m": carry["m"] / 2 + batch["x"].mean(), "n": carry["n"] + 1}
    return mean_loss(params, batch), (carry, aux)


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("in_place", [None, False])
def test_aux_keys_and_carry_are_those_of_a_python_loop(count, in_place):
    key, carry = jax.random.key(0), {"m": jnp.float32(1), "n": jnp.int32(0)}
    options = {"presplit": True, "has_aux": True, "key_argnum": 3, "carry_argnum": 4, "in_place": in_place}
    grad_fn = optaccum.value_and_grad(with_aux, count_argnum=2, **options)
    (_, (new_carry, aux)), grads = grad_fn(PARAMS, BATCH, count, key, carry)
    parts, totals, state = [], None, carry
    for i in range(count):
        micro_batch = jax.tree.map(lambda x, i=i: x[i], BATCH)
        own = jax.random.fold_in(key, i)
        grad, (state, part) = jax.grad(with_aux, has_aux=True)(PARAMS, micro_batch, count, own, state)
        totals = grad if totals is None else jax.tree.map(jnp.add, totals, grad)
        parts.append(part)
    assert_trees_close(grads, jax.tree.map(lambda g: g / count, totals), rtol=1e-5, atol=1e-6)
    assert_trees_close(new_carry, state, rtol=1e-6)

    def stacked(get):
        xs = jnp.stack([get(part) for part in parts])
        return jnp.concatenate([xs, jnp.zeros((N - count, *xs.shape[1:]))])  # zeros where nothing ran

    expected = {
        "rows": stacked(lambda p: p["rows"]),
        "pair": stacked(lambda p: p["pair"]),
        "mean": jnp.mean(jnp.stack([p["mean"] for p in parts])),
        "sum": sum(p["sum"].value for p in parts),
        "max": max(p["max"].value for p in parts),
        "last": parts[-1]["last"].value,
        "stack": stacked(lambda p: p["stack"].value),
    }
    assert_trees_close(aux, expected, rtol=1e-5)
    if count == 3:
        without = optaccum.value_and_grad(with_aux, **options)(PARAMS, BATCH, count, key, carry)[0][1][1]
        for name in ("max", "stack", "sum"):
            with pytest.raises(AssertionError):
                assert_trees_close(aux[name], without[name], rtol=1e-2)


def test_dropped_micro_batches_and_those_that_did_not_run():
    batch = BATCH | {"x": BATCH["x"].at[1, 0, 0].set(jnp.nan).at[3].set(jnp.nan)}
    grad_fn = optaccum.value_and_grad(
        lambda p, b, count: mean_loss(p, b),
        presplit=True,
        count_argnum=2,
        skip_nonfinite=True,
        return_info=True,
    )
    value, grads, info = grad_fn(PARAMS, batch, 3)
    kept = jax.tree.map(lambda x: x[jnp.array([0, 2])].reshape(-1, *x.shape[2:]), BATCH)
    assert_trees_close((value, grads), jax.value_and_grad(mean_loss)(PARAMS, kept), rtol=1e-5)
    assert (int(info.num_skipped), float(info.weight)) == (1, 6.0)


@KINDS
def test_devices_divide_the_second_axis(kind):
    mesh, _ = make_mesh(kind)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 8, 3)), jnp.float32)
    batch = {"x": x, "mask": (x[..., 0] > -0.5).astype(jnp.float32)}
    on_mesh = jax.device_put(batch, NamedSharding(mesh, P(None, "data")))

    def loss_fn(params, batch, count):
        return token_loss(params, batch), {"rows": batch["x"], "each": optaccum.Stack(batch["x"].sum())}

    options = {"presplit": True, "count_argnum": 2, "has_aux": True, "data_axes": "data"}
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    grad_fn = jax.jit(optaccum.value_and_grad(loss_fn, **options))
    (value, aux), grads = grad_fn(params, on_mesh, 2)
    expected = jax.value_and_grad(ratio_of(token_loss))(PARAMS, rows(2, batch))
    assert_trees_close(jax.device_get((value, grads)), jax.device_get(expected), rtol=1e-5, atol=1e-6)
    assert_trees_equal(jax.device_get(aux["rows"]), np.concatenate([x[:2], np.zeros((1, 8, 3), np.float32)]))
    assert aux["each"].shape == (4 * 3,)
    assert not optaccum.count_collectives(grad_fn.lower(params, on_mesh, 2).compile()).in_loops
    with pytest.raises(ValueError, match=r"divide over the 4 devices.*got 7 rows"):
        optaccum.value_and_grad(loss_fn, **options)(params, jax.tree.map(lambda x: x[:, :7], batch), 2)


def test_derivatives_through_it_and_batches_of_counts():
    grad_fn = optaccum.value_and_grad(lambda p, b, count, scale: mean_loss(p, b) * scale, presplit=True, count_argnum=2)

    def norm(scale, count, fn):
        return jnp.sum(fn(scale, count)["w"] ** 2)

    def accumulated(scale, count):
        return grad_fn(PARAMS, BATCH, count, scale)[1]

    def whole(scale, count):
        return jax.grad(lambda p: mean_loss(p, rows(count)) * scale)(PARAMS)

    for mode in (jax.grad, jax.jacfwd):
        actual, expected = (mode(norm)(1.5, 3, fn) for fn in (accumulated, whole))
        assert_trees_close(actual, expected, rtol=1e-5)
    counts = jnp.array([1, 3])
    batched = jax.vmap(lambda count: norm(1.5, count, accumulated))(counts)
    assert_trees_close(batched, jnp.stack([norm(1.5, int(c), whole) for c in counts]), rtol=1e-5)
    assert float(batched[0]) != float(batched[1])


def test_rows_that_belong_together():
    """A loss of pairs: wrong where micro-batches are batch[i::n], right where they are the caller's."""

    def loss_fn(w, x):
        return jnp.mean((w * (x[0::2] - x[1::2])) ** 2)

    x = jnp.arange(12.0).reshape(6, 2) ** 2
    expected = jax.value_and_grad(loss_fn)(3.0, x)
    presplit = optaccum.value_and_grad(loss_fn, presplit=True)(3.0, x.reshape(3, 2, 2))
    assert_trees_close(presplit, expected)
    with pytest.raises(AssertionError):
        assert_trees_close(optaccum.value_and_grad(loss_fn, num_microbatches=3)(3.0, x), expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("batch", "count", "error", "match"),
    [
        (jnp.ones(4), 1, ValueError, r"lead with the batch axis; got shape \(4,\).*presplit=True"),
        ({"a": jnp.ones((4, 2)), "b": jnp.ones((4, 3))}, 1, ValueError, r"same leading size.*\(4, 2\)"),
        (jnp.ones((4, 2)), 1.5, TypeError, "integer scalar at count_argnum"),
        (jnp.ones((4, 2)), jnp.ones(2, int), TypeError, r"integer scalar at count_argnum; got shape \(2,\)"),
    ],
)
def test_mistakes_are_named(batch, count, error, match):
    grad_fn = optaccum.grad(lambda w, b, c: jnp.mean(w * jax.tree.leaves(b)[0]), presplit=True, count_argnum=2)
    with pytest.raises(error, match=match):
        grad_fn(1.0, batch, count)
