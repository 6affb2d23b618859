"""`skip_nonfinite`: what a dropped micro-batch leaves behind; and what a call tells about itself."""

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_trees_close, assert_trees_equal
from scanning_problem import BATCH, LOSSES, PARAMS, mean_loss

import optaccum


def poisoned(*rows):
    return BATCH | {"x": BATCH["x"].at[jnp.array(rows, int), 0].set(jnp.nan)}


SKIP = {"num_microbatches": 3, "skip_nonfinite": True, "return_info": True}


@pytest.mark.parametrize("name", ["mean", "weighted"])
def test_a_dropped_micro_batch_never_came(name):
    loss_fn, whole = LOSSES[name]
    value, grads, info = optaccum.value_and_grad(loss_fn, **SKIP)(PARAMS, poisoned(0))
    kept = jax.tree.map(lambda x: jnp.concatenate([x[1::3], x[2::3]]), BATCH)
    assert_trees_close((value, grads), jax.value_and_grad(whole)(PARAMS, kept), rtol=1e-5)
    assert (int(info.num_skipped), float(info.weight)) == (1, 4.0 if name == "mean" else 2.0)
    value, _ = optaccum.value_and_grad(loss_fn, num_microbatches=3)(PARAMS, poisoned(0))
    assert bool(jnp.isnan(value))


def test_a_dropped_micro_batch_leaves_the_carry_and_the_reductions_but_not_its_rows():
    def loss_fn(params, batch, count):
        aux = {
            "sum": optaccum.Sum(batch["mask"].sum()),
            "max": optaccum.Max(batch["mask"].max()),
            "mean": jnp.mean(batch["mask"]),
            "rows": batch["mask"],
            "stack": optaccum.Stack(batch["mask"].sum()),
        }
        return mean_loss(params, batch), (count + 1, aux)

    (_, (count, aux)), _, info = optaccum.value_and_grad(loss_fn, has_aux=True, carry_argnum=2, **SKIP)(
        PARAMS, poisoned(0), 0
    )
    assert (int(count), int(info.num_skipped), float(info.weight)) == (2, 1, 4.0)
    assert_trees_equal(aux["rows"], BATCH["mask"])
    assert aux["stack"].tolist() == [2.0, 0.0, 2.0]
    assert (float(aux["sum"]), float(aux["max"]), float(aux["mean"])) == (2.0, 1.0, 0.5)


def test_all_dropped():
    value, grads, info = optaccum.value_and_grad(mean_loss, **SKIP)(PARAMS, poisoned(0, 1, 2))
    assert bool(jnp.isnan(value))
    assert_trees_equal(grads, jax.tree.map(jnp.zeros_like, PARAMS))
    assert (int(info.num_skipped), float(info.weight)) == (3, 0.0)


def test_an_infinite_gradient_of_a_finite_loss_is_dropped():
    def loss_fn(w, x):
        return jnp.mean(jnp.sqrt(w * x))

    _, grads, info = optaccum.value_and_grad(loss_fn, **SKIP)(jnp.float32(1), jnp.array([1.0, 0.0, 4.0]))
    assert (int(info.num_skipped), float(grads)) == (1, 0.75)


@pytest.mark.parametrize(("name", "weight"), [("mean", 7.0), ("weighted", 4.0), ("terms", 7.0)])
def test_info_weight_is_what_the_gradient_is_a_mean_over(name, weight):
    *_, info = optaccum.value_and_grad(LOSSES[name][0], num_microbatches=3, return_info=True)(PARAMS, BATCH)
    assert_trees_equal(info, optaccum.Info(jnp.float32(weight), jnp.int32(0), None))
