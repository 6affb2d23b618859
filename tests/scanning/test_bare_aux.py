"""Auxiliary outputs without a wrapper: rows in order, means over examples, or refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, assert_trees_equal
from scanning_problem import BATCH, X, aux_of, mean_loss, token_loss

import optaccum


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
        return {"bare": batch["x"].reshape(2, 3).sum()}

    batch = jax.tree.map(lambda x: x[:4], BATCH)
    with pytest.raises(TypeError) as info:
        aux_of(fixed, 2, batch=batch)
    assert "4 examples instead of 2" in " ".join(info.value.__notes__)
    aux = aux_of(lambda batch: optaccum.Sum(fixed(batch)), 2, batch=batch)
    assert_trees_close(aux["bare"], X[:4].sum(), rtol=1e-5)
