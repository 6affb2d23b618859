"""Losses with weights: exact however the weight is spread over micro-batches."""

import functools

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_trees_close, assert_trees_equal
from scanning_problem import BATCH, PARAMS, per_example, ratio_loss, token_loss

import optaccum


def test_zero_weight_gives_zeros_and_fully_masked_micro_batches_none():
    zero = BATCH | {"mask": jnp.zeros(7)}
    for loss_fn in (token_loss, lambda p, b: {"a": token_loss(p, b), "b": token_loss(p, b)}):
        value, grads = optaccum.value_and_grad(loss_fn, num_microbatches=3)(PARAMS, zero)
        assert_trees_equal((value, grads), (jnp.float32(0), jax.tree.map(jnp.zeros_like, PARAMS)))
    assert jnp.isnan(ratio_loss(PARAMS, zero))
    one = BATCH | {"mask": jnp.zeros(7).at[3].set(0.25)}
    actual = optaccum.value_and_grad(token_loss, num_microbatches=7)(PARAMS, one)
    assert_trees_close(actual, jax.value_and_grad(ratio_loss)(PARAMS, one), rtol=1e-5)
    assert float(actual[0]) != 0


def test_a_weight_is_a_constant_to_differentiation():
    def loss_fn(params, batch):
        weights = jax.nn.sigmoid(batch["x"] @ params["w"])
        return optaccum.WeightedMean((weights * per_example(params, batch)).sum(), weights.sum())

    def whole(params, batch, stop):
        terms = loss_fn(params, batch)
        return terms.total / (jax.lax.stop_gradient(terms.weight) if stop else terms.weight)

    actual = optaccum.value_and_grad(loss_fn, num_microbatches=3)(PARAMS, BATCH)
    assert_trees_close(actual, jax.value_and_grad(whole)(PARAMS, BATCH, True), rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_trees_close(actual, jax.value_and_grad(whole)(PARAMS, BATCH, False), rtol=1e-2)


def test_weights_equal_by_chance_in_one_size_do_not_merge():
    x = jnp.arange(1.0, 6.0)

    def loss_fn(w, x):  # the last micro-batch has one example
        rows = optaccum.WeightedMean((w * x).sum(), x.shape[0])
        return {"rows": rows, "calls": optaccum.WeightedMean((w**2 * x).sum(), 1)}

    actual = optaccum.value_and_grad(loss_fn, microbatch_size=2)(2.0, x)
    expected = jax.value_and_grad(lambda w: (w * x).sum() / 5 + (w**2 * x).sum() / 3)(2.0)
    assert_trees_close(actual, expected)


def test_terms_that_share_a_weight_share_a_pass():
    def loss_fn(params, batch, weight_of_second):
        tokens = token_loss(params, batch)
        return {"a": tokens, "b": optaccum.WeightedMean(2 * tokens.total, weight_of_second(tokens.weight))}

    def loops(weight_of_second):
        grad_fn = optaccum.value_and_grad(
            functools.partial(loss_fn, weight_of_second=weight_of_second), num_microbatches=7
        )
        return str(jax.make_jaxpr(grad_fn)(PARAMS, BATCH)).count("length=7")  # the loss scans over one layer

    assert (loops(lambda weight: weight), loops(lambda weight: weight + 0.0)) == (1, 2)


def test_weights_in_a_first_pass_cost_no_forward_where_they_depend_on_the_batch_only():
    def products(weight_of):
        def loss_fn(w, x):
            h = jnp.tanh(x @ w)
            second = optaccum.WeightedMean((h**2).sum(), weight_of(h, x))
            return {"a": optaccum.WeightedMean(h.sum(), x.shape[0]), "b": second}

        grad_fn = jax.jit(optaccum.value_and_grad(loss_fn, num_microbatches=4))
        return grad_fn.lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile().as_text().count(" dot(")

    of_the_batch = products(lambda h, x: (x[:, 0] > 0).sum())
    assert products(lambda h, x: (h[:, 0] > 0).sum()) == of_the_batch + 1
