"""`value_and_grad` over micro-batches is `jax.value_and_grad` on the whole batch: arguments, results, mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, assert_trees_equal
from optax import microbatching
from scanning_problem import (
    BATCH,
    LOSSES,
    PARAMS,
    SIZES,
    mean_loss,
    mean_of_means,
    micro_batches,
    per_example,
    token_loss,
)

import optaccum


@pytest.mark.parametrize(("n", "in_place"), [(1, True), (3, True), (3, False), (7, True)])
@pytest.mark.parametrize("name", LOSSES)
def test_the_whole_batch_whatever_the_weights(name, n, in_place):
    loss_fn, whole = LOSSES[name]
    actual = optaccum.value_and_grad(loss_fn, num_microbatches=n, in_place=in_place)(PARAMS, BATCH)
    assert_trees_close(actual, jax.value_and_grad(whole)(PARAMS, BATCH), rtol=1e-5, atol=1e-7)
    if n == 3:
        with pytest.raises(AssertionError):
            assert_trees_close(actual, mean_of_means(whole, 3), rtol=1e-3)


def test_small_integers_sum_exactly():
    x = jnp.array([[1.0, 2.0], [3.0, -4.0], [5.0, 6.0], [7.0, 16.0]])
    grad_fn = optaccum.value_and_grad(lambda w, x: jnp.mean(x @ w), num_microbatches=2)
    value, grads = grad_fn(jnp.array([1.0, 2.0]), x)
    assert (float(value), grads.tolist()) == (14.0, [4.0, 5.0])


def test_agrees_with_optax_microbatching_where_the_meanings_do():
    batch = jax.tree.map(lambda x: x[:6], BATCH)
    options = {"argnums": 1, "microbatch_size": 2}
    mean = microbatching.AccumulationType.MEAN
    peer = microbatching.microbatch(jax.value_and_grad(mean_loss), accumulator=mean, **options)
    actual = optaccum.value_and_grad(mean_loss, microbatch_size=2)(PARAMS, batch)
    assert_trees_close(actual, peer(PARAMS, batch), rtol=1e-6, atol=1e-7)
    by_default = microbatching.microbatch(jax.value_and_grad(mean_loss), **options)
    assert by_default(PARAMS, batch)[0] > 2.9 * actual[0]  # a sum: the difference in meaning


@pytest.mark.parametrize("argnums", [1, [1], (2, 1), (-3, 2)], ids=str)
@pytest.mark.parametrize("has_aux", [False, True])
def test_structures_are_those_of_jax(argnums, has_aux):
    def loss_fn(x, p, scale, y):
        loss = jnp.mean((x @ p["w"] * scale - y) ** 2)
        return (loss, {"doubled": 2 * loss}) if has_aux else loss

    args = (BATCH["x"], PARAMS | {"none": None, "empty": {}}, jnp.float32(2), BATCH["mask"])
    options = {"argnums": argnums, "has_aux": has_aux}
    split = {"num_microbatches": 3, "batch_argnums": (0, -1)}
    actual = optaccum.value_and_grad(loss_fn, **options, **split)(*args)
    assert_trees_close(actual, jax.value_and_grad(loss_fn, **options)(*args), rtol=1e-5)
    value, grads = actual
    only_grads = optaccum.grad(loss_fn, **options, **split)(*args)
    assert_trees_equal(only_grads, (grads, value[1]) if has_aux else grads)
    *_, info = optaccum.grad(loss_fn, **options, **split, return_info=True)(*args)
    assert float(info.weight) == 7.0


def test_it_keeps_the_name_of_the_loss():
    assert optaccum.value_and_grad(mean_loss, num_microbatches=3).__name__ == "mean_loss"


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_each_micro_batch_gets_its_own_key(make_key):
    def loss_fn(params, batch, keys):
        noise = jax.random.normal(keys["noise"], (2,))
        return mean_loss(params, batch) * noise[0], optaccum.Stack(noise)

    keys = {"noise": make_key(7)}
    grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=4, has_aux=True, key_argnum=2)
    (_, noise), _ = grad_fn(PARAMS, BATCH, keys)
    expected = jnp.stack([jax.random.normal(jax.random.fold_in(keys["noise"], i), (2,)) for i in range(4)])
    assert_trees_equal(noise, expected)
    assert len(np.unique(np.asarray(noise))) == 8


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
    grad_fn = optaccum.value_and_grad(carried, num_microbatches=3, has_aux=True, carry_argnum=-1)
    (_, (new_carry, last)), grads = grad_fn(PARAMS, BATCH, carry)
    assert_trees_close(grads["w"], total, rtol=1e-4, atol=1e-7)
    assert_trees_close(new_carry, state | {"count": jnp.int32(3)}, rtol=1e-5)
    assert int(last) == 3
    other = grad_fn(PARAMS, BATCH, carry | {"mean": jnp.ones(3)})[1]
    with pytest.raises(AssertionError):  # the carry matters
        assert_trees_close(grads["w"], other["w"], rtol=1e-2)

    def first_loss(mean):
        return grad_fn(PARAMS, BATCH, carry | {"mean": mean})[0][0]

    assert_trees_equal(jax.grad(first_loss)(jnp.zeros(3)), jnp.zeros(3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "exactly one of num_microbatches, microbatch_size and presplit"),
        ({"num_microbatches": 2, "microbatch_size": 2}, ValueError, "exactly one"),
        ({"num_microbatches": 0}, ValueError, "int >= 1"),
        ({"num_microbatches": 2, "argnums": (0, 1)}, ValueError, "two, argnums and batch_argnums"),
        ({"num_microbatches": 2, "key_argnum": 1}, ValueError, "two, batch_argnums and key_argnum"),
        ({"num_microbatches": 2, "argnums": ()}, TypeError, "non-empty"),
        ({"num_microbatches": 2, "argnums": True}, TypeError, "expected argnums to be an int"),
        ({"num_microbatches": 2, "argnums": int}, TypeError, "expected argnums to be an int"),
        ({"num_microbatches": 2, "argnums": np.array(0)}, TypeError, "expected argnums to be an int"),
        ({"num_microbatches": 2, "carry_argnum": 2}, ValueError, "has_aux=True"),
        ({"num_microbatches": 2, "presplit": True}, ValueError, "exactly one"),
        ({"num_microbatches": 2, "count_argnum": 2}, ValueError, "expected presplit=True"),
        ({"num_microbatches": 2, "in_place": "yes"}, TypeError, "in_place to be True, False or None; got 'yes'"),
        ({"num_microbatches": 2, "skip_nonfinite": "no"}, TypeError, "skip_nonfinite to be True or False"),
        ({"num_microbatches": 2, "unroll": 0}, ValueError, "unroll to be an int >= 1; got 0"),
        ({"num_microbatches": 2, "data_axes": ("data", "data")}, ValueError, "each mesh axis once"),
        ({"num_microbatches": 2, "track_noise_scale": True}, ValueError, "return_info=True"),
        (
            {"num_microbatches": 2, "in_place": True, "skip_nonfinite": True},
            ValueError,
            "no skip_nonfinite with in_place=True",
        ),
    ],
)
def test_options_that_contradict_raise_where_they_are_made(options, error, message):
    with pytest.raises(error, match=message):
        optaccum.value_and_grad(mean_loss, **options)


@pytest.mark.parametrize(
    ("loss_fn", "options", "error", "match"),
    [
        (per_example, {}, TypeError, r"shape \(4,\).*mean over the examples"),
        (lambda p, b: jnp.int32(1), {}, TypeError, "dtype int32"),
        (lambda p, b: mean_loss(p, b) + 0j, {}, TypeError, "dtype complex64"),
        (lambda p, b: {}, {}, ValueError, "at least one term"),
        (
            lambda p, b: {"a": optaccum.WeightedMean(per_example(p, b), 1.0)},
            {},
            TypeError,
            r"loss\['a'\].total",
        ),
        (lambda p, b: (mean_loss(p, b), 1.0), {}, TypeError, "has_aux=True"),
        (mean_loss, {"has_aux": True}, TypeError, r"return \(loss, aux\)"),
        (lambda p, b: {"a": mean_loss(p, b)}, {}, TypeError, r"WeightedMean; got .* at loss\['a'\]"),
        (lambda p, b: None, {}, TypeError, "got NoneType"),
        (mean_loss, {"argnums": 5}, ValueError, r"2 positional arguments.*got 5"),
        *(
            (lambda p, b, k=kind: (mean_loss(p, b), {"a": k(b["mask"])}), {"has_aux": True}, TypeError, match)
            for kind, match in [
                (optaccum.Max, r"Max holds in aux\['a'\]"),
                (optaccum.Stack, "bare, to be concat"),
            ]
        ),
        (mean_loss, {"num_microbatches": 8}, ValueError, "8 micro-batches for 7 examples"),
        (LOSSES["terms"][0], {"skip_nonfinite": True}, ValueError, "loss of one weight"),
        (mean_loss, {"grad_reduction_fn": lambda path, leaf: "sum"}, ValueError, '"mean" or "max"'),
    ],
)
def test_mistakes_are_named_at_the_first_call(loss_fn, options, error, match):
    grad_fn = optaccum.value_and_grad(loss_fn, **({"num_microbatches": 2} | options))
    with pytest.raises(error, match=match):
        jax.eval_shape(grad_fn, PARAMS, BATCH)


@pytest.mark.parametrize("key", [3, jax.random.split(jax.random.key(0))], ids=["a seed", "several"])
@pytest.mark.parametrize("make", [optaccum.value_and_grad, optaccum.chunked])
def test_what_is_no_key_is_named(make, key):
    with pytest.raises(TypeError, match="single PRNG keys at key_argnum"):
        make(lambda p, b, key: mean_loss(p, b), num_microbatches=2, key_argnum=2)(PARAMS, BATCH, key)


def test_what_is_no_batch_of_rows_is_told_where_to_go():
    with pytest.raises(ValueError, match=r"batch_argnums within.*closes over has to become an argument"):
        optaccum.grad(lambda p: mean_loss(p, BATCH), num_microbatches=2)(PARAMS)
    transposed = BATCH | {"x": BATCH["x"].T}
    with pytest.raises(ValueError, match=r"same leading size.*presplit=True"):
        optaccum.grad(mean_loss, num_microbatches=2)(PARAMS, transposed)
    with pytest.raises(TypeError, match=r"argument 0\['fn'\] to be an array; got function.*eqx\.partition"):
        optaccum.grad(mean_loss, num_microbatches=2)(PARAMS | {"fn": lambda x: x}, BATCH)


def test_array_sizes_are_taken():
    expected = optaccum.value_and_grad(mean_loss, num_microbatches=2)(PARAMS, BATCH)
    assert_trees_equal(optaccum.value_and_grad(mean_loss, num_microbatches=jnp.int32(2))(PARAMS, BATCH), expected)


def test_integer_parameters_and_changing_carries_are_refused_by_name():
    with pytest.raises(TypeError, match=r"int32 at argument\['n'\]"):
        optaccum.grad(lambda p, x: x.mean(), num_microbatches=2)({"n": jnp.int32(1)}, jnp.ones(4))

    def loss_fn(params, batch, carry):
        return token_loss(params, batch), ({"s": carry["s"].astype(jnp.float16)}, None)

    grad_fn = optaccum.grad(loss_fn, num_microbatches=2, has_aux=True, carry_argnum=2)
    with pytest.raises(TypeError, match=r"carry\['s'\].*float32.*float16"):
        grad_fn(PARAMS, BATCH, {"s": jnp.float32(0)})
