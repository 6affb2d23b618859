"""How many micro-steps a window takes: a number, or what a schedule says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close
from streaming_problem import GRADS, PARAMS, run, weighted_mean

import optaccum


def test_k_follows_the_updates_so_far():
    tx = optaccum.accumulate(optax.identity(), lambda step: jnp.where(step < 2, 1, 3))
    _, states = run(tx, GRADS)
    assert [bool(s.has_updated) for s in states] == [True, True, False, False, True, False, False, True]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_k_may_be_a_float_whatever_may_be_promoted(dtype):
    def emitted(k):
        tx = optaccum.accumulate(optax.identity(), lambda step: jnp.asarray(k, dtype))
        return [bool(s.has_updated) for s in run(tx, GRADS[:4])[1]]

    with jax.numpy_dtype_promotion("strict"):
        assert emitted(1.5) == emitted(2) == [False, True, False, True]
        assert emitted(2.5) == [False, False, True, False]


def test_k_follows_the_weight_emitted_so_far():
    tx = optaccum.accumulate(optax.identity(), optaccum.by_weight(lambda w: 1 + (w >= 20).astype(jnp.int32)))
    _, states = run(tx, GRADS[:6], weight=[10] * 6)
    assert [bool(s.has_updated) for s in states] == [True, True, False, True, False, True]


def test_restored_with_a_smaller_k_it_emits_at_once_and_with_all_it_holds():
    _, states = run(optaccum.accumulate(optax.identity(), 5), GRADS[:4])
    smaller = optaccum.accumulate(optax.identity(), 2)
    updates, state = smaller.update(GRADS[4], states[-1], PARAMS)
    assert_trees_close(updates, weighted_mean(GRADS[:5], [1] * 5))
    assert (bool(state.has_updated), int(state.micro_step)) == (True, 0)


def test_a_numpy_int_is_a_k():
    updates, _ = run(optaccum.accumulate(optax.identity(), np.int64(2)), GRADS[:2])
    assert (updates[1]["w"] != 0).any()


@pytest.mark.parametrize("k", [0, -1, True, np.bool_(True), 2.0, "2", 2j, np.int32(0)])
def test_a_k_that_is_not_a_positive_int_raises(k):
    with pytest.raises((TypeError, ValueError), match="every_k_schedule to be an int >= 1"):
        optaccum.accumulate(optax.sgd(0.1), k)


def test_a_schedule_by_weight_that_is_not_a_function_raises():
    with pytest.raises(TypeError, match="fn to be a function"):
        optaccum.by_weight(3)


def test_a_schedule_that_returns_no_real_number_raises_where_it_can_be_seen():
    for k in (float("nan"), None, 2j, jnp.complex64(2), jnp.ones(2), "2"):
        for schedule in (lambda step, k=k: k, optaccum.by_weight(lambda total, k=k: k)):
            tx = optaccum.accumulate(optax.identity(), schedule)
            with pytest.raises(TypeError, match="return k, a real scalar"):
                tx.update(GRADS[0], tx.init(PARAMS), PARAMS)


def test_a_traced_k_that_is_nan_counts_as_one():
    tx = optaccum.accumulate(optax.identity(), lambda step: jnp.where(step < 1, jnp.nan, 2.0))
    _, states = run(tx, GRADS[:3])
    assert [bool(s.has_updated) for s in states] == [True, False, True]
