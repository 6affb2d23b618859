"""Wrapped auxiliary outputs come back as their wrapper says, over the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, assert_trees_equal
from scanning_problem import BATCH, X, aux_of, mean_loss, token_loss

import optaccum

MASK = np.asarray(BATCH["mask"])


def wrapped(batch):
    x, mask = batch["x"], batch["mask"]
    return {
        "sum": optaccum.Sum({"x": x.sum(0), "count": (mask > 0).sum(), "bool": mask[0] > 0}),
        "max": optaccum.Max((x.max(0), mask.astype(bool).any(), jnp.int32(len(x)))),
        "min": optaccum.Min([x.min(0), mask.astype(bool).all(), mask.astype(int).min()]),
        "last": optaccum.Last({"x": x[-1], "key": jax.random.key(3)}),
        "stack": optaccum.Stack({"x": x.sum(0), "key": jax.random.key(4)}),
        "weighted": optaccum.WeightedMean({"x": (x[:, 0] * mask).sum()}, mask.sum()),
        "none": None,
        "empty": (),
    }


@pytest.mark.parametrize("loss_fn", [mean_loss, token_loss])
@pytest.mark.parametrize("n", [1, 3, 7])
def test_wrappers(loss_fn, n):
    expected = {
        "sum": {"x": X.sum(0), "count": np.int32(4), "bool": np.int32((MASK[:n] > 0).sum())},
        "max": (X.max(0), np.True_, np.int32(-(-7 // n))),
        "min": [X.min(0), np.False_, np.int32(0)],
        "last": {"x": X[n - 1 :: n][-1], "key": jax.random.key(3)},
        "stack": {
            "x": np.stack([X[i::n].sum(0) for i in range(n)]),
            "key": jax.random.wrap_key_data(jnp.array([[0, 4]] * n, jnp.uint32)),
        },
        "weighted": {"x": np.float32((X[:, 0] * MASK).sum() / MASK.sum())},
        "none": None,
        "empty": (),
    }
    actual = aux_of(wrapped, n, loss_fn)
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)
    if n == 3:
        parts = [(X[i::3, 0], MASK[i::3]) for i in range(3)]
        mean_of_means = np.mean([(x * mask).sum() / max(mask.sum(), 1) for x, mask in parts])
        wrong = {"sum": X[:3].sum(0), "last": X[::3][-1], "weighted": np.float32(mean_of_means)}
        for name, value in wrong.items():
            with pytest.raises(AssertionError):
                assert_trees_close(actual[name]["x"], value, rtol=1e-2)


def test_sums_are_wide_and_extremes_keep_their_dtype():
    def aux_fn(batch):
        narrow = batch["x"][0].astype(jnp.bfloat16)
        return optaccum.Sum(narrow), optaccum.Max(narrow)

    ones = {"x": jnp.ones((512, 3)), "mask": jnp.ones(512)}
    total, largest = aux_of(aux_fn, 512, batch=ones)
    assert total.tolist() == [512] * 3  # a bfloat16 sum stops at 256
    assert (total.dtype, largest.dtype) == (jnp.float32, jnp.bfloat16)


def test_no_weight_gives_zero_and_no_example_gives_nan():
    def aux_fn(batch):
        return {"weighted": optaccum.WeightedMean(batch["x"].sum(), 0.0), "mean": batch["x"].mean()}

    assert float(aux_of(aux_fn, 3)["weighted"]) == 0.0
    aux = aux_of(aux_fn, 3, batch=BATCH | {"x": jnp.full((7, 3), jnp.nan)}, skip_nonfinite=True)
    assert float(aux["weighted"]) == 0.0
    assert bool(jnp.isnan(aux["mean"]))


def test_complex_extremes_are_refused():
    with pytest.raises(TypeError, match="expected a real array in Max"):
        aux_of(lambda batch: optaccum.Max(batch["x"].sum() * 1j), 3)


@pytest.mark.parametrize("wrapped", [optaccum.Sum(optaccum.Max(1.0)), optaccum.Stack({"a": optaccum.Sum(1)})])
def test_wrappers_in_wrappers_are_refused(wrapped):
    with pytest.raises(TypeError, match=r"expected arrays in (Sum|Stack); got (Max|Sum) in it"):
        aux_of(lambda batch: wrapped, 3)


def test_wrappers_are_pytrees():
    for cls in (optaccum.Sum, optaccum.Max, optaccum.Min, optaccum.Last, optaccum.Stack):
        assert jax.tree.map(lambda x: x + 1, cls({"a": 1})) == cls({"a": 2})
    assert jax.tree.leaves(optaccum.WeightedMean(3, 4)) == [3, 4]


@pytest.mark.parametrize("n", [1, 3, 7])
def test_bare_leaves(n):
    def bare(batch):
        x = batch["x"]
        return {
            "rows": x * 2,
            "last axis": x.T,
            "middle axis": jnp.einsum("bi,bj->ibj", x, x),
            "labels": x[:, 0] > 0,
            "zeros": jnp.zeros((2, len(x))),
            "mean": jnp.mean(x, 0),
            "narrow": jnp.mean(x).astype(jnp.bfloat16),
            "constant": 0.1,
        }

    actual = aux_of(bare, n)
    expected = bare(BATCH) | {"narrow": X.mean(), "constant": np.float32(0.1)}
    assert_trees_close(actual.pop("narrow"), expected.pop("narrow"), rtol=1e-2)
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-7)
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
    ],
)
def test_leaves_that_stand_for_nothing_in_particular(loss_fn, aux_fn, message, n):
    with pytest.raises(TypeError, match=message):
        aux_of(aux_fn, n, loss_fn)


def test_a_loss_that_knows_its_size_is_told_why_it_sees_another():
    def fixed(batch):
        return {"bare": batch["x"].reshape(2, 3).sum(0)}

    batch = jax.tree.map(lambda x: x[:4], BATCH)
    with pytest.raises(TypeError) as info:
        aux_of(fixed, 2, batch=batch)
    assert "4 examples instead of 2" in " ".join(info.value.__notes__)
    aux = aux_of(lambda batch: optaccum.Sum(fixed(batch)), 2, batch=batch)
    assert_trees_close(aux["bare"], X[:4].sum(0), rtol=1e-5)
    assert aux_of(lambda batch: fixed(batch)["bare"].sum(), 2, batch=batch).shape == ()  # a scalar has no axis
