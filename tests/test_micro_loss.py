"""The loss as it is traced: how often, with which arguments, in both forms of the loop."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from conftest import assert_trees_close, assert_trees_equal
from scanning_problem import (
    BATCH,
    LOSSES,
    PARAMS,
    SIZES,
    mean_loss,
    mean_of_means,
    micro_batches,
)

import optaccum


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_the_whole_batch_whatever_the_weights(name, in_place):
    loss_fn, whole = LOSSES[name]
    actual = optaccum.value_and_grad(loss_fn, num_microbatches=3, in_place=in_place)(PARAMS, BATCH)
    assert_trees_close(actual, jax.value_and_grad(whole)(PARAMS, BATCH), rtol=1e-5, atol=1e-7)
    with pytest.raises(AssertionError):
        assert_trees_close(actual, mean_of_means(whole, 3), rtol=1e-3)


def test_small_integers_sum_exactly():
    x = jnp.array([[1.0, 2.0], [3.0, -4.0], [5.0, 6.0], [7.0, 16.0]])
    value, grads = optaccum.value_and_grad(lambda w, x: jnp.mean(x @ w), num_microbatches=2)(
        jnp.array([1.0, 2.0]), x
    )
    assert (float(value), grads.tolist()) == (14.0, [4.0, 5.0])


def test_argnums_as_in_jax():
    def loss_fn(x, p, scale, y):
        return jnp.mean((x @ p["w"] * scale - y) ** 2)

    args = (BATCH["x"], PARAMS | {"none": None, "empty": {}}, jnp.float32(2), BATCH["mask"])
    for argnums in (1, (2, 1), (-3, 2), [1]):
        actual = optaccum.value_and_grad(loss_fn, num_microbatches=3, argnums=argnums, batch_argnums=(0, -1))(
            *args
        )
        expected = jax.value_and_grad(loss_fn, argnums=argnums)(*args)
        assert_trees_close(actual, expected, rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_trees_close(actual[1], jax.grad(loss_fn, argnums=[2])(*args))


def carried(params, batch, carry):
    mean = 0.5 * carry["mean"] + 0.5 * jnp.mean(batch["x"], 0)
    carry = {"mean": mean, "count": carry["count"] + 1, "key": jax.random.split(carry["key"])[0]}
    return jnp.mean((batch["x"] - mean) @ params["w"]) ** 2, (carry, optaccum.Last(carry["count"]))


def test_the_carry_threads_through_and_no_gradient_flows_along_it():
    carry = {"mean": jnp.zeros(3), "count": 0, "key": jax.random.key(0)}
    state, total = carry, 0.0
    for size, micro_batch in zip(SIZES, micro_batches(3), strict=True):
        grad, (state, _) = jax.grad(carried, has_aux=True)(PARAMS, micro_batch, state)
        total = total + size / 7 * grad["w"]
    grad_fn = optaccum.value_and_grad(carried, num_microbatches=3, has_aux=True, carry_argnum=2)
    (_, (new_carry, last)), grads = grad_fn(PARAMS, BATCH, carry)
    assert_trees_close(grads["w"], total, rtol=1e-4, atol=1e-7)
    assert_trees_close(new_carry, state | {"count": jnp.int32(3)}, rtol=1e-5)
    assert int(last) == 3
    with pytest.raises(AssertionError):  # the carry matters
        assert_trees_close(
            grads["w"], grad_fn(PARAMS, BATCH, carry | {"mean": jnp.ones(3)})[1]["w"], rtol=1e-2
        )

    def first_loss(mean):
        return grad_fn(PARAMS, BATCH, carry | {"mean": mean})[0][0]

    assert_trees_equal(jax.grad(first_loss)(jnp.zeros(3)), jnp.zeros(3))


def test_grad_returns_what_jax_grad_returns():
    def with_aux(p, b):
        return (mean_loss(p, b), optaccum.Sum(b["mask"].sum()))

    assert_trees_close(
        optaccum.grad(mean_loss, num_microbatches=3)(PARAMS, BATCH),
        jax.grad(mean_loss)(PARAMS, BATCH),
        rtol=1e-5,
    )
    grads, aux, info = optaccum.grad(with_aux, num_microbatches=3, has_aux=True, return_info=True)(
        PARAMS, BATCH
    )
    assert jax.tree.structure(grads) == jax.tree.structure(PARAMS)
    assert (float(aux), float(info.weight)) == (4.0, 7.0)


def test_it_keeps_the_name_and_documentation_of_the_loss():
    assert optaccum.value_and_grad(mean_loss, num_microbatches=3).__name__ == "mean_loss"
    optaccum.value_and_grad(functools.partial(mean_loss), num_microbatches=3)(PARAMS, BATCH)


@pytest.mark.parametrize(
    ("n", "bare", "traces"), [(1, False, 1), (7, False, 1), (3, False, 2), (7, True, 2), (3, True, 4)]
)
def test_traces_do_not_grow_with_n(n, bare, traces):
    count = []

    def loss_fn(params, batch):
        count.append(1)
        return mean_loss(params, batch), (batch["mask"] if bare else optaccum.Sum(batch["mask"].sum()))

    grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=n, has_aux=True)
    for _ in range(2):
        grad_fn(PARAMS, BATCH)
    assert (
        len(count) == traces
    )  # one for each size of micro-batch, and one more each to find bare leaves' axes


def test_a_step_is_traced_once():
    grad_fn = optaccum.value_and_grad(mean_loss, num_microbatches=3)
    step = jax.jit(chex.assert_max_traces(lambda p, b: grad_fn(p, b)[1], n=1))
    params = step(step(PARAMS, BATCH), BATCH)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, PARAMS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "exactly one of num_microbatches and microbatch_size"),
        ({"num_microbatches": 2, "microbatch_size": 2}, ValueError, "exactly one"),
        ({"num_microbatches": 0}, ValueError, "int >= 1"),
        ({"num_microbatches": 2, "argnums": (0, 1)}, ValueError, "two, argnums and batch_argnums"),
        ({"num_microbatches": 2, "key_argnum": 1}, ValueError, "two, batch_argnums and key_argnum"),
        ({"num_microbatches": 2, "argnums": ()}, TypeError, "non-empty"),
        ({"num_microbatches": 2, "argnums": True}, TypeError, "expected argnums to be an int"),
        ({"num_microbatches": 2, "carry_argnum": 2}, ValueError, "has_aux=True"),
        ({"num_microbatches": 2, "track_noise_scale": True}, ValueError, "return_info=True"),
        ({"num_microbatches": 2, "in_place": True, "skip_nonfinite": True}, ValueError, "skip_nonfinite"),
    ],
)
def test_options_that_contradict_raise_where_they_are_made(options, error, message):
    with pytest.raises(error, match=message):
        optaccum.value_and_grad(mean_loss, **options)
