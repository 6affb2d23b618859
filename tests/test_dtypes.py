"""Which dtype gradients are summed in, streaming and scanning, and which comes out."""

import jax
import jax.numpy as jnp
import optax
import pytest
import scanning_problem
from conftest import assert_trees_close, assert_trees_equal
from scanning_problem import BATCH, LOSSES
from streaming_problem import GRADS, PARAMS, assert_dtypes_equal, run

import optaccum


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.adam(0.1, mu_dtype=jnp.float32)])
def test_updates_and_parameters_keep_the_dtypes_that_inner_gives(optimizer):
    dtypes = (jnp.float32, jnp.float16, jnp.bfloat16)
    for grad_dtype in dtypes:
        for param_dtype in dtypes:
            params = optax.tree.cast(PARAMS, param_dtype)
            grads = optax.tree.cast(GRADS[0], grad_dtype)
            plain = jax.eval_shape(optimizer.update, grads, optimizer.init(params), params)
            tx = optaccum.accumulate(optimizer, 2)
            start = state = tx.init(params)
            for _ in range(2):
                updates, state = jax.eval_shape(tx.update, grads, state, params)
                assert_dtypes_equal(updates, plain[0])
                assert_dtypes_equal(jax.eval_shape(optax.apply_updates, params, updates), params)
            assert_dtypes_equal(state, start)
            assert {leaf.dtype for leaf in jax.tree.leaves(state.grad_sum)} == {jnp.dtype(jnp.float32)}


def test_the_mean_of_bf16_gradients_is_not_rounded_before_inner_sees_it():
    params = jnp.zeros(1, jnp.bfloat16)
    grads = [jnp.array([g], jnp.bfloat16) for g in (256.0, 1.0)]
    seen = optax.GradientTransformation(
        lambda params: jnp.zeros(1, jnp.float32), lambda updates, state, params=None: (updates, updates)
    )
    for dtype, expected in [(jnp.float32, 128.5), (jnp.bfloat16, 128.0)]:
        tx = optaccum.accumulate(seen, 2, accumulator_dtype=dtype)
        updates, states = run(tx, grads, params)
        assert float(states[-1].inner_state[0]) == expected
        assert updates[-1].dtype == jnp.bfloat16


def test_accumulator_dtype_by_dtype_none_and_function():
    params = {"a": jnp.zeros(2, jnp.bfloat16), "c": jnp.zeros(2, jnp.complex64), "i": jnp.zeros(2, jnp.int32)}
    for option, expected in [
        (jnp.float32, ("float32", "complex64", "float32")),
        ("bfloat16", ("bfloat16", "complex64", "bfloat16")),
        (None, ("bfloat16", "complex64", "int32")),
        (
            lambda path, leaf: jnp.float16 if path[-1].key == "a" else None,
            ("float16", "complex64", "int32"),
        ),
    ]:
        state = optaccum.accumulate(optax.identity(), 2, accumulator_dtype=option).init(params)
        assert tuple(str(state.grad_sum[name].dtype) for name in "aci") == expected


def test_a_function_of_the_leaf_may_not_truncate_gradients_and_a_key_has_none():
    params = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.int32(3), "key": jax.random.key(0)}
    for option in (None, lambda path, leaf: leaf.dtype, jnp.bfloat16):
        tx = optaccum.accumulate(optax.sgd(0.5), 2, accumulator_dtype=option)
        state = tx.init(params)
        assert state.grad_sum["w"].dtype == jnp.bfloat16
        for _ in range(2):
            grads = jax.grad(lambda p: jnp.sum(p["w"] * 2), allow_int=True)(params)
            params, state = optaccum.apply_gradients(tx, grads, state, params)
        assert_trees_equal(params["key"], jax.random.key(0))
        assert params["n"] == 3
    assert params["w"].tolist() == [-2, -2]
    with jax.enable_x64(True):
        tx = optaccum.accumulate(optax.sgd(0.5), 2, accumulator_dtype=jnp.float64)
        _, state = optaccum.apply_gradients(tx, grads, tx.init(params), params)
        assert state.grad_sum["w"].tolist() == [2, 2]
    narrow = optaccum.accumulate(optax.sgd(0.5), 2, accumulator_dtype=lambda path, leaf: jnp.int32)
    with pytest.raises(ValueError, match=r"accumulator_dtype at \['w'\] to be a floating dtype; got int32"):
        narrow.init(params)


def test_a_function_is_asked_about_parameters_and_a_dtype_is_held_against_restored_sums():
    params = {"h": jnp.ones(2, jnp.bfloat16), "w": jnp.ones(2)}
    other = {jnp.dtype(jnp.bfloat16): jnp.float32, jnp.dtype(jnp.float32): jnp.bfloat16}
    swap = optaccum.accumulate(optax.sgd(0.5), 2, accumulator_dtype=lambda path, leaf: other[leaf.dtype])
    state = swap.init(params)
    assert [str(x.dtype) for x in jax.tree.leaves(state.grad_sum)] == ["float32", "bfloat16"]
    _, state = swap.update(params, state, params)
    assert state.grad_sum["w"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"grad_sum at \['w'\] to be float32, by accumulator_dtype; got bfloat16"):
        optaccum.accumulate(optax.sgd(0.5), 2).update(params, state, params)


ADAMW = optax.adamw(0.1, weight_decay=0.5)


@pytest.mark.parametrize(
    "optimizer",
    [ADAMW, optax.chain(optax.clip_by_global_norm(1.0), ADAMW), optax.apply_if_finite(optax.sgd(0.1), 2)],
    ids=["bare", "clipped", "if finite"],
)
def test_leaves_without_a_gradient_stay_as_they_are(optimizer):
    params = {"w": jnp.ones(2), "n": jnp.int32(16_777_217), "none": None, "masked": optax.MaskedNode()}
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    assert grads["n"].dtype == jax.dtypes.float0
    tx = optaccum.accumulate(optimizer, 2, should_skip_update_fn=optax.skip_not_finite)
    updates, _ = run(tx, [grads] * 2, params, jit=False)
    new = optax.apply_updates({k: params[k] for k in "wn"}, {k: updates[-1][k] for k in "wn"})
    assert int(new["n"]) == 16_777_217  # odd beyond 2^24: through a float it would move
    assert (new["w"] < 1).all()
    assert updates[-1]["none"] is None
    assert updates[-1]["masked"] == optax.MaskedNode()
    applied, state = params, tx.init(params)
    for _ in range(2):
        applied, state = optaccum.apply_gradients(tx, grads, state, applied)
    assert_trees_equal({k: applied[k] for k in "wn"}, new)


# Scanning.


@pytest.mark.parametrize("n", [1, 1024])
def test_scanned_float32_sums_do_not_stick_where_bfloat16_sums_do(n):
    def loss_fn(w, x):
        return optaccum.WeightedMean((x * w).sum(), jnp.float32(1))

    def total(dtype):
        grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=n, accumulator_dtype=dtype)
        value, grads = grad_fn(jnp.bfloat16(1), jnp.ones((1024, 1), jnp.bfloat16))
        assert (value.dtype, grads.dtype) == (jnp.float32, dtype)
        return float(grads) * n

    assert total(jnp.float32) == 1024.0
    assert total(jnp.bfloat16) == (1024.0 if n == 1 else 256.0)


def test_scanned_sums_keep_the_dtype_that_is_asked_for():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3), "c": jnp.ones(3, jnp.complex64)}

    def loss_fn(p, x):
        return ((p["a"] + p["b"]).sum() * x).mean().astype(jnp.float32) + jnp.abs(p["c"]).sum()

    for option, expected in [
        (jnp.float32, ("float32", "float32", "complex64")),
        (None, ("bfloat16", "float32", "complex64")),
        (jnp.bfloat16, ("bfloat16", "bfloat16", "complex64")),
        (
            lambda path, leaf: jnp.float16 if path[-1].key == "b" else None,
            ("bfloat16", "float16", "complex64"),
        ),
    ]:
        grad_fn = optaccum.grad(loss_fn, num_microbatches=2, accumulator_dtype=option)
        grads = jax.eval_shape(grad_fn, params, jnp.ones(4))
        assert tuple(str(grads[name].dtype) for name in "abc") == expected


@pytest.mark.parametrize("name", LOSSES)
def test_scanned_float64_stays_float64_to_its_own_rounding(name):
    loss_fn, whole = LOSSES[name]
    with jax.enable_x64(True):
        params, batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (scanning_problem.PARAMS, BATCH))
        actual = optaccum.value_and_grad(loss_fn, num_microbatches=3)(params, batch)
        assert_trees_close(actual, jax.value_and_grad(whole)(params, batch), rtol=1e-13, atol=1e-16)
        rounded = jax.tree.map(lambda x: x.astype(jnp.float32).astype(x.dtype), actual)
        with pytest.raises(AssertionError):
            assert_trees_close(rounded, actual, rtol=1e-13)


def test_integer_weights_beside_other_terms_under_x64():
    def loss_fn(w, batch):
        errors = (batch["x"] * w) ** 2
        total = optaccum.WeightedMean((errors * batch["mask"]).sum(), batch["mask"].sum())
        return {"masked": total, "mean": optaccum.WeightedMean(errors.sum(), errors.size)}

    with jax.enable_x64(True):
        batch = {"x": jnp.arange(6.0), "mask": jnp.array([1, 0, 1, 1, 0, 1])}
        value, grad = optaccum.value_and_grad(loss_fn, num_microbatches=3)(jnp.float64(1.0), batch)
        assert (value.dtype, grad.dtype) == (jnp.float64, jnp.float64)
    assert float(value) == pytest.approx(38 / 4 + 55 / 6, rel=1e-12)
    assert float(grad) == pytest.approx(2 * (38 / 4 + 55 / 6), rel=1e-12)
