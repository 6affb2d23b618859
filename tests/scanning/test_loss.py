"""Losses with weights: exact however the weight is spread over micro-batches."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from conftest import assert_trees_close, assert_trees_equal
from scanning_problem import BATCH, PARAMS, mean_loss, per_example, ratio_loss, token_loss

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


def test_what_skipping_refuses_does_not_depend_on_the_identity_of_a_weight():
    def loss_fn(params, batch, same):
        tokens = token_loss(params, batch)
        weight = tokens.weight if same else tokens.weight + 0.0
        return {"a": tokens, "b": optaccum.WeightedMean(2 * tokens.total, weight)}

    for same in (True, False):
        grad_fn = optaccum.grad(functools.partial(loss_fn, same=same), num_microbatches=3, skip_nonfinite=True)
        with pytest.raises(ValueError, match="loss of one weight"):
            grad_fn(PARAMS, BATCH)


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


@pytest.mark.parametrize(("bare", "in_place"), [(False, True), (False, False), (True, True)])
def test_traces_do_not_grow_with_n(bare, in_place):
    """One for each size of micro-batch, one more to find the axes of bare arrays, one more for the carry form."""
    assert [num_traces(n, bare, in_place) for n in (1, 7, 3)] == [t := 1 + bare + (not in_place), t, 2 * t]


def num_traces(n, bare, in_place):
    count = []

    def loss_fn(params, batch):
        count.append(1)
        return mean_loss(params, batch), (batch["mask"] if bare else optaccum.Sum(batch["mask"].sum()))

    grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=n, has_aux=True, in_place=in_place)
    for _ in range(2):
        grad_fn(PARAMS, BATCH)
    return len(count)


def test_the_program_does_not_grow_with_n():
    def program(n):
        grad_fn = optaccum.value_and_grad(lambda w, x: jnp.mean(jnp.tanh(x * w)), num_microbatches=n)
        return jax.jit(grad_fn).lower(1.0, jnp.ones(1024)).as_text()

    assert program(2).count("\n") == program(512).count("\n") < program(3).count("\n")  # of two sizes


def test_what_the_loss_closes_over_does_not_leak():
    def scaled(scale):
        def loss_fn(w, x):
            h, _ = jax.lax.scan(lambda h, w: (h * w * scale, None), x, w)
            return h.mean()

        return optaccum.grad(loss_fn, num_microbatches=2)(jnp.ones(2), jnp.ones(4))

    with jax.checking_leaks():
        assert jax.jit(scaled)(2.0).tolist() == [4.0, 4.0]


def test_a_step_is_traced_once():
    grad_fn = optaccum.grad(mean_loss, num_microbatches=3)
    step = jax.jit(chex.assert_max_traces(grad_fn, n=1))
    params = step(step(PARAMS, BATCH), BATCH)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, PARAMS)
