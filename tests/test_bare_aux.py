"""Auxiliary outputs come back as the whole batch would give them, or are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, assert_trees_equal
from scanning_problem import BATCH, PARAMS, mean_loss, token_loss

import optaccum

X, MASK = np.asarray(BATCH["x"]), np.asarray(BATCH["mask"])


def aux_of(aux_fn, n, loss_fn=mean_loss, batch=BATCH):
    def with_aux(params, batch):
        return loss_fn(params, batch), aux_fn(batch)

    (_, aux), _ = optaccum.value_and_grad(with_aux, num_microbatches=n, has_aux=True)(PARAMS, batch)
    return aux


def wrapped(batch):
    return {
        "sum": optaccum.Sum(
            {"x": batch["x"].sum(0), "count": (batch["mask"] > 0).sum(), "bool": batch["mask"][0] > 0}
        ),
        "max": optaccum.Max((batch["x"].max(0), batch["mask"].astype(bool).any())),
        "min": optaccum.Min(
            [batch["x"].min(0), batch["mask"].astype(bool).all(), batch["mask"].astype(int).min()]
        ),
        "last": optaccum.Last({"x": batch["x"][-1], "key": jax.random.key(3)}),
        "stack": optaccum.Stack({"x": batch["x"].sum(0), "key": jax.random.key(4)}),
        "weighted": optaccum.WeightedMean(
            {"x": (batch["x"][:, 0] * batch["mask"]).sum()}, batch["mask"].sum()
        ),
        "none": None,
        "empty": (),
    }


@pytest.mark.parametrize("loss_fn", [mean_loss, token_loss])
def test_wrappers(loss_fn):
    last_of_each = [X[i::3][-1] for i in range(3)]
    sums = np.stack([X[i::3].sum(0) for i in range(3)])
    expected = {
        "sum": {
            "x": X.sum(0),
            "count": np.int32(4),
            "bool": np.int32(1),
        },  # the first rows' masks are 0, 0, 1
        "max": (X.max(0), np.True_),
        "min": [X.min(0), np.False_, np.int32(0)],
        "last": {"x": last_of_each[-1], "key": jax.random.key(3)},
        "stack": {"x": sums, "key": jax.random.wrap_key_data(jnp.array([[0, 4]] * 3, jnp.uint32))},
        "weighted": {"x": np.float32((X[:, 0] * MASK).sum() / MASK.sum())},
        "none": None,
        "empty": (),
    }
    actual = aux_of(wrapped, 3, loss_fn)
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)
    for name, wrong in {"sum": X[:3].sum(0), "last": last_of_each[0]}.items():
        with pytest.raises(AssertionError):
            assert_trees_close(actual[name]["x"], wrong, rtol=1e-2)
    means = np.mean([(X[i::3, 0] * MASK[i::3]).sum() / max(MASK[i::3].sum(), 1) for i in range(3)])
    with pytest.raises(AssertionError):  # the mean of means
        assert_trees_close(actual["weighted"]["x"], np.float32(means), rtol=1e-2)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_bare_leaves(n):
    def bare(batch):
        x = batch["x"]
        return {
            "rows": x * 2,
            "last axis": x.T,
            "labels": x[:, 0] > 0,
            "mean": jnp.mean(x, 0),
            "narrow": jnp.mean(x).astype(jnp.bfloat16),
            "constant": 0.1,
        }

    actual = aux_of(bare, n)
    assert_trees_close(
        actual, bare(BATCH) | {"narrow": X.mean(), "constant": np.float32(0.1)}, rtol=1e-2, atol=1e-2
    )
    assert_trees_equal(actual["labels"], X[:, 0] > 0)
    assert_trees_close(actual["mean"], X.mean(0), rtol=1e-5)
    if n == 3:
        in_order_of_use = np.concatenate([X[i::3] for i in range(3)]) * 2
        with pytest.raises(AssertionError):
            assert_trees_equal(actual["rows"], in_order_of_use)
        with pytest.raises(AssertionError):  # micro-batches of 3, 2 and 2 examples do not count alike
            assert_trees_close(actual["mean"], np.mean([X[i::3].mean(0) for i in range(3)], 0), rtol=1e-2)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("loss_fn", "aux_fn", "message"),
    [
        (
            mean_loss,
            lambda b: {"n": (b["mask"] > 0).sum()},
            r"aux\['n'\], of dtype int32.*WeightedMean, Sum, Max",
        ),
        (mean_loss, lambda b: {"any": b["mask"].any()}, r"aux\['any'\], of dtype bool"),
        (mean_loss, lambda b: 3, "expected aux, of dtype int32"),
        (token_loss, lambda b: {"m": [b["mask"].mean()]}, r"aux\['m'\]\[0\].*plain scalar"),
        (mean_loss, lambda b: b["x"] @ b["x"].T, r"one axis that is the batch's"),
        (mean_loss, lambda b: jnp.concatenate([b["x"], b["x"]]), r"one axis that is the batch's"),
        (mean_loss, lambda b: b["x"][1:], r"one axis that is the batch's"),
        (mean_loss, lambda b: optaccum.Max(b["x"].sum() * 1j), "expected a real array in Max"),
    ],
)
def test_leaves_that_stand_for_nothing_in_particular(loss_fn, aux_fn, message, n):
    with pytest.raises(TypeError, match=message):
        aux_of(aux_fn, n, loss_fn)


def test_a_loss_that_knows_its_size_is_told_why_it_sees_another():
    def fixed(batch):
        return {"bare": batch["x"].reshape(2, 3).sum()}

    batch = jax.tree.map(lambda x: x[:4], BATCH)
    with pytest.raises(TypeError) as info:
        aux_of(fixed, 2, batch=batch)
    assert "4 examples instead of 2" in " ".join(info.value.__notes__)
    aux = aux_of(lambda batch: {"wrapped": optaccum.Sum(fixed(batch)["bare"])}, 2, batch=batch)
    assert_trees_close(aux["wrapped"], X[:4].sum(), rtol=1e-5)


def test_no_weight_gives_zero_and_no_example_gives_nan():
    def aux_fn(batch):
        return {"weighted": optaccum.WeightedMean(batch["x"].sum(), 0.0), "mean": batch["x"].mean()}

    assert float(aux_of(aux_fn, 3)["weighted"]) == 0.0
    grad_fn = optaccum.value_and_grad(
        lambda p, b: (mean_loss(p, b), aux_fn(b)), num_microbatches=3, has_aux=True, skip_nonfinite=True
    )
    (_, aux), _ = grad_fn(PARAMS, BATCH | {"x": jnp.full((7, 3), jnp.nan)})
    assert float(aux["weighted"]) == 0.0
    assert bool(jnp.isnan(aux["mean"]))
