"""Gradients to parameters in one call, in place; and windows ended early."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal

import optaccum

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}


def integers(seed, like=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.integers(-8, 9, p.shape), p.dtype), like)


GRADS = [integers(i) for i in range(6)]


@functools.cache
def both_ways(tx):
    @jax.jit
    def in_one(params, state, g, kwargs):
        return optaccum.apply_gradients(tx, g, state, params, **kwargs)

    @jax.jit
    def in_two(params, state, g, kwargs):
        updates, state = tx.update(g, state, params, **kwargs)
        return optax.apply_updates(params, updates), state

    return in_one, in_two


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("tx", "kwargs"),
    [
        (optaccum.accumulate(optax.adamw(0.1), 2), {}),
        (optaccum.accumulate(optax.adamw(0.1), 3), {"weight": 2.0}),
        (optaccum.accumulate(optax.sgd(0.1, 0.9), 2, use_grad_mean=False), {"denominator": 4.0}),
        (
            optaccum.accumulate(optax.polyak_sgd(), 2, averaged_extra_args=("value",)),
            {"weight": 2.0, "value": 3.0},
        ),
        (optax.chain(optax.clip(1.0), optaccum.accumulate(optax.adam(0.1), 2)), {"weight": 2.0}),
        (optax.sgd(0.1), {}),
        (optax.GradientTransformation(*optax.identity()), {}),
    ],
    ids=["adamw", "weight", "sum", "value", "chain", "plain", "no extra args"],
)
def test_the_parameters_are_those_of_update_and_apply_updates(tx, kwargs, dtype):
    in_one, in_two = both_ways(tx)
    params = optax.tree.cast(PARAMS, dtype)
    one = two = (params, tx.init(params))
    for g in GRADS[:5]:
        one, two = in_one(*one, g, kwargs), in_two(*two, g, kwargs)
        assert_trees_close(one[0], two[0], rtol=1e-6 if dtype == jnp.float32 else 1e-2)
        assert jax.tree.map(jnp.shape, one[1]) == jax.tree.map(jnp.shape, two[1])
    with pytest.raises(AssertionError):
        assert_trees_close(one[0], params, rtol=1e-2)


def test_parameters_between_updates_are_bit_identical():
    tx = optaccum.accumulate(optax.sgd(0.1), 2)
    params = {"w": jnp.array([-0.0, 1e-42, jnp.nan])}
    new, state = jax.jit(lambda p, s: optaccum.apply_gradients(tx, p, s, p))(params, tx.init(params))
    assert np.asarray(new["w"]).tobytes() == np.asarray(params["w"]).tobytes()
    assert not state.has_updated


def test_a_weight_is_not_forwarded_unless_it_is_given():
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(sorted(extra_args))
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    optaccum.apply_gradients(tx, GRADS[0], (), PARAMS, value=1.0)
    optaccum.apply_gradients(tx, GRADS[0], (), PARAMS, weight=1.0)
    assert seen == [["value"], ["weight"]]


# Memory: temporary buffers of the compiled step, in copies of the parameters.

BIG = {f"layer{i}": jnp.full((128, 256), 0.5) for i in range(4)}
EVERYTHING = {
    "should_skip_update_fn": optax.skip_not_finite,
    "averaged_extra_args": ("value",),
}


def temp_copies(tx, *, in_one, **kwargs):
    def step(params, state, g, kwargs):
        if in_one:
            return optaccum.apply_gradients(tx, g, state, params, **kwargs)
        updates, state = tx.update(g, state, params, **kwargs)
        return optax.apply_updates(params, updates), state

    arguments = (BIG, tx.init(BIG), BIG, kwargs)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(BIG))
    return compiled.memory_analysis().temp_size_in_bytes / num_bytes


def test_apply_gradients_needs_no_copy_of_the_parameters():
    for options, kwargs in [
        ({}, {}),
        ({}, {"weight": 2.0}),
        ({}, {"denominator": 2.0}),
        (EVERYTHING, {"weight": 2.0, "value": 1.0}),
    ]:
        tx = optaccum.accumulate(optax.adamw(1e-3), 8, **options)
        assert temp_copies(tx, in_one=True, **kwargs) < 0.05, (options, kwargs)


def test_update_needs_the_zero_updates_and_no_more():
    tx = optaccum.accumulate(optax.adamw(1e-3), 8)
    assert temp_copies(tx, in_one=False) < 1.05
    everything = optaccum.accumulate(optax.adamw(1e-3), 8, **EVERYTHING)
    assert temp_copies(everything, in_one=False, weight=2.0, value=1.0) < 1.05


def test_multi_steps_needs_three_copies_so_the_measure_sees_them():
    multi_steps = optax.MultiSteps(optax.adamw(1e-3), 8).gradient_transformation()
    assert temp_copies(multi_steps, in_one=False) > 2.5


def test_the_fused_finite_check_saves_what_optax_materialises():
    plain = optaccum.accumulate(
        optax.adamw(1e-3), 8, should_skip_update_fn=lambda *args: optax.skip_not_finite(*args)
    )
    assert temp_copies(plain, in_one=True) > 0.5


# Flush.


@pytest.mark.parametrize("jit", [True, False])
def test_flush_divides_by_what_is_in_the_window(jit):
    tx = optaccum.accumulate(optax.sgd(1.0, 0.5), 8, averaged_extra_args=("value",))
    flush = functools.partial(optaccum.flush, tx)
    flush = jax.jit(flush) if jit else flush
    state = tx.init(PARAMS)
    for g, weight in zip(GRADS[:2], (1.0, 3.0), strict=True):
        _, state = tx.update(g, state, PARAMS, weight=weight, value=0.0)
    updates, state = flush(state, PARAMS)
    expected = jax.tree.map(lambda a, b: -(a + 3 * b) / 4, *GRADS[:2])
    assert_trees_equal(updates, expected)
    assert state.has_updated
    assert (int(state.micro_step), int(state.gradient_step)) == (0, 1)
    assert optaccum.weight_total(state) == 4.0
    again, same = flush(state, PARAMS)
    assert_trees_equal(again, jax.tree.map(jnp.zeros_like, PARAMS))
    assert not same.has_updated
    assert_trees_equal(same.inner_state, state.inner_state)
    with pytest.raises(AssertionError):  # divided by k, as if the window were full
        assert_trees_equal(updates, jax.tree.map(lambda e: e / 2, expected))


def test_after_a_flush_the_next_window_starts_clean():
    tx = optaccum.accumulate(optax.identity(), 2)
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    _, state = optaccum.flush(tx, state, PARAMS)
    for g in GRADS[1:3]:
        updates, state = tx.update(g, state, PARAMS)
    assert_trees_equal(updates, jax.tree.map(lambda a, b: (a + b) / 2, *GRADS[1:3]))


def test_flush_of_a_window_without_weight_is_a_no_op_that_closes_it():
    inner = optax.adamw(0.1)
    tx = optaccum.accumulate(inner, 4)
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS, weight=0.0)
    updates, state = optaccum.flush(tx, state, PARAMS)
    assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_trees_equal(state.inner_state, inner.init(PARAMS))
    assert (int(state.micro_step), bool(state.has_updated)) == (0, False)


def test_flush_hands_over_the_windows_average_and_the_other_extra_args():
    def update(updates, state, params=None, *, value, other):
        return updates, jnp.stack([value, other]).astype(jnp.float32)

    inner = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(2), update)
    tx = optaccum.accumulate(inner, 8, averaged_extra_args=("value",))
    state = tx.init(PARAMS)
    for value in (1.0, 5.0):
        _, state = tx.update(GRADS[0], state, PARAMS, value=value, other=0.0)
    _, state = optaccum.flush(tx, state, PARAMS, other=jnp.float32(7.0))
    assert state.inner_state.tolist() == [3.0, 7.0]


def test_flushed_updates_have_the_dtypes_of_gradients_like_the_parameters():
    params = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.int32(3)}
    tx = optaccum.accumulate(optax.adamw(0.1, weight_decay=0.9), 4)
    grads = {"w": jnp.ones(2), "n": np.zeros([], jax.dtypes.float0)}
    _, state = tx.update(grads, tx.init(params), params)
    updates, _ = optaccum.flush(tx, state, params)
    assert updates["w"].dtype == jnp.bfloat16
    assert (updates["w"] != 0).all()
    assert int(updates["n"]) == 0


def test_flush_of_anything_else_raises():
    tx = optaccum.accumulate(optax.sgd(0.1), 2)
    chain = optax.chain(tx)
    for other, state in [(optax.sgd(0.1), tx.init(PARAMS)), (chain, chain.init(PARAMS))]:
        with pytest.raises(TypeError, match="flush expects a transformation"):
            optaccum.flush(other, state, PARAMS)
    with pytest.raises(TypeError, match="flush takes no weight"):
        optaccum.flush(tx, tx.init(PARAMS), PARAMS, weight=1.0)
