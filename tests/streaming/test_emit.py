"""Windows that data ends: by a flag, by a weight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal
from streaming_problem import GRADS, PARAMS, run, weighted_mean

import optaccum

BAD = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)


def emitted(states):
    return [bool(s.has_updated) for s in states]


@pytest.mark.parametrize("jit", [True, False])
def test_emit_ends_the_window_whatever_k(jit):
    tx = optaccum.accumulate(optax.identity(), 3)
    emits = (False, True, False, False, False, True)
    updates, states = run(tx, GRADS[:6], jit=jit, weight=(1, 3, 1, 1, 2, 5), emit=emits)
    assert emitted(states) == [False, True, False, False, True, True]
    assert_trees_equal(updates[1], weighted_mean(GRADS[:2], [1, 3]))
    assert_trees_equal(updates[4], weighted_mean(GRADS[2:5], [1, 1, 2]))  # the schedule's own
    assert_trees_equal(updates[5], GRADS[5])
    assert [int(s.micro_step) for s in states] == [1, 0, 1, 2, 0, 0]
    assert optaccum.weight_total(states[-1]) == 13.0
    _, without = run(tx, GRADS[:6], jit=jit)
    assert emitted(without) != emitted(states)


def test_apply_gradients_takes_it_too():
    tx = optaccum.accumulate(optax.sgd(1.0), None)
    step = jax.jit(lambda p, s, g, emit: optaccum.apply_gradients(tx, g, s, p, emit=emit))
    params, state = step(PARAMS, tx.init(PARAMS), GRADS[0], False)
    assert_trees_equal(params, PARAMS)
    params, state = step(params, state, GRADS[1], True)
    mean = weighted_mean(GRADS[:2], [1, 1])
    assert_trees_equal(params, jax.tree.map(lambda p, m: p - m, PARAMS, mean))


def test_a_window_that_only_emit_ends_asks_for_it():
    tx = optaccum.accumulate(optax.sgd(1.0), None)
    with pytest.raises(TypeError, match="expected emit= at every call"):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="expected emit= at every call"):
        jax.jit(optax.chain(tx).update)(GRADS[0], optax.chain(tx).init(PARAMS), PARAMS)


def test_it_ends_a_window_also_with_a_micro_step_that_is_skipped_or_weighs_nothing():
    tx = optaccum.accumulate(optax.identity(), None, should_skip_update_fn=optax.skip_not_finite)
    last = [(BAD, 7.0), (BAD, 0.0), (GRADS[2], np.nan)]
    for grads, weight in last:
        updates, states = run(tx, [GRADS[0], GRADS[1], grads], weight=(1.0, 3.0, weight), emit=(False, False, True))
        assert_trees_equal(updates[2], weighted_mean(GRADS[:2], [1, 3]))
        assert (int(states[2].micro_step), int(states[2].num_skipped)) == (0, int(weight != 0))
        assert optaccum.weight_total(states[2]) == 4.0
    # Skipped where none is open: what the last window held stays out.
    updates, states = run(tx, [GRADS[0], BAD, GRADS[1]], emit=(True, True, True))
    assert emitted(states) == [True, False, True]
    assert_trees_equal(updates[1], jax.tree.map(jnp.zeros_like, PARAMS))
    assert_trees_equal(updates[2], GRADS[1])


def test_a_window_without_weight_that_emit_ends_is_a_no_op():
    inner = optax.adamw(0.1)
    _, states = run(optaccum.accumulate(inner, None), GRADS[:2], weight=(0, 0), emit=(False, True))
    assert emitted(states) == [False, False]
    assert int(states[1].micro_step) == 0
    assert_trees_equal(states[1].inner_state, inner.init(PARAMS))


def test_under_scan_and_vmap_each_has_its_own():
    tx = optaccum.accumulate(optax.identity(), None)
    emits = jnp.array([[False, True, True], [True, False, True]])
    grads = jnp.arange(6.0).reshape(2, 3, 1)

    def body(state, step):
        updates, state = tx.update(step[0], state, emit=step[1])
        return state, updates

    run_all = jax.vmap(lambda g, e: jax.lax.scan(body, tx.init(jnp.zeros(1)), (g, e))[1])
    assert run_all(grads, emits)[..., 0].tolist() == [[0, 0.5, 2], [3, 0, 4.5]]


# A weight.


@pytest.mark.parametrize("name", ["weight", "denominator"])
@pytest.mark.parametrize("jit", [True, False])
def test_a_window_ends_with_the_micro_step_that_brings_its_weight(name, jit):
    tx = optaccum.accumulate(optax.identity(), optaccum.until_weight(8))
    weights = (3, 4, 1, 9, 0, 7, 2, 8)
    updates, states = run(tx, GRADS, jit=jit, **{name: weights})
    assert emitted(states) == [False, False, True, True, False, False, True, True]
    expected = weighted_mean(GRADS[:3], weights[:3])
    if name == "denominator":
        expected = jax.tree.map(lambda a, b, c: (a + b + c) / 8, *GRADS[:3])
    assert_trees_close(updates[2], expected)
    assert optaccum.weight_total(states[-1]) == 34.0  # what a window holds beyond 8 counts in it
    # Not carried over: the window after the 9 starts from nothing.
    assert float(states[4].weight_sum) == 0.0


def test_the_weight_may_follow_the_updates():
    tx = optaccum.accumulate(optax.identity(), optaccum.until_weight(lambda step: jnp.where(step < 1, 2, 4)))
    _, states = run(tx, GRADS[:6])
    assert emitted(states) == [False, True, False, False, False, True]


def test_the_weight_may_be_past_int32():
    for weight in (4_000_000_000, lambda gradient_step: 4_000_000_000):
        tx = optaccum.accumulate(optax.identity(), optaccum.until_weight(weight))
        _, states = run(tx, GRADS[:4], weight=(2_000_000_000,) * 4)
        assert emitted(states) == [False, True, False, True]
    _, states = run(tx, GRADS[:2], weight=(2_000_000_000, 1_999_000_000))
    assert emitted(states) == [False, False]


def test_what_is_skipped_brings_no_weight():
    tx = optaccum.accumulate(optax.identity(), optaccum.until_weight(4), should_skip_update_fn=optax.skip_not_finite)
    _, states = run(tx, [GRADS[0], BAD, GRADS[1]], weight=(2, 9, 2))
    assert emitted(states) == [False, False, True]


def test_it_ends_where_weight_or_what_it_waits_for_is_nan():
    tx = optaccum.accumulate(optax.identity(), optaccum.until_weight(8))
    _, states = run(tx, GRADS[:3], weight=(1, np.nan, 1))
    assert emitted(states) == [False, True, False]
    tx = optaccum.accumulate(optax.identity(), optaccum.until_weight(lambda step: jnp.float32(jnp.nan)))
    _, states = run(tx, GRADS[:2], weight=(1, 1))
    assert emitted(states) == [True, True]


@pytest.mark.parametrize(
    ("weight", "error"),
    [(0, ValueError), (-1.0, ValueError), (np.nan, ValueError), (True, TypeError), ("8", TypeError)],
)
def test_a_weight_that_is_no_positive_number_raises(weight, error):
    with pytest.raises(error, match="expected weight to be"):
        optaccum.until_weight(weight)
