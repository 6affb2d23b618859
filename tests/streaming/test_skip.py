"""Micro-steps that a skip function drops, and what becomes of a NaN without one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_equal
from streaming_problem import GRADS, PARAMS, WEIGHTS, K, run, weighted_mean

import optaccum


def test_a_nan_reaches_inner_in_its_own_window_and_no_other():
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
    updates, _ = run(optaccum.accumulate(optax.identity(), 2), [GRADS[0], bad, GRADS[2], GRADS[3]])
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(updates[1]))
    assert_trees_equal(updates[3], weighted_mean(GRADS[2:4], [1, 1]))
    theirs, _ = run(optax.MultiSteps(optax.identity(), 2).gradient_transformation(), [bad, bad, *GRADS[2:4]])
    assert jnp.isnan(theirs[3]["w"]).any()  # masking by multiplication keeps it for ever


def test_a_skipped_micro_step_is_as_if_it_never_came():
    bad = jax.tree.map(lambda p: p.at[0].set(jnp.inf), PARAMS)
    tx = optaccum.accumulate(optax.identity(), K, should_skip_update_fn=optax.skip_not_finite)
    micro_steps = [GRADS[0], bad, *GRADS[1:3], bad, GRADS[3]]
    updates, states = run(tx, micro_steps, weight=(1.0, 99.0, 4.0, 2.0, 99.0, 1.0))
    assert_trees_equal(updates[-1], weighted_mean(GRADS[:4], WEIGHTS))
    assert [int(s.micro_step) for s in states] == [1, 1, 2, 3, 3, 0]
    assert [int(s.num_skipped) for s in states] == [0, 1, 1, 1, 2, 2]
    assert [bool(s.skip_state["should_skip"]) for s in states] == [False, True] + [False] * 2 + [True, False]
    assert int(states[1].skip_state["num_not_finite"]) == 3
    assert optaccum.weight_total(states[-1]) == 8.0


def test_the_fused_finite_check_answers_as_optax_does():
    tx = optaccum.accumulate(optax.identity(), 2, should_skip_update_fn=optax.skip_not_finite)
    plain = optaccum.accumulate(optax.identity(), 2, should_skip_update_fn=lambda *args: optax.skip_not_finite(*args))
    params = {"a": jnp.zeros((3, 5)), "b": jnp.zeros([], jnp.bfloat16), "c": jnp.zeros(2, jnp.complex64)}
    grads = {
        "a": params["a"].at[1, 2:].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf])),
        "b": jnp.array(jnp.inf, jnp.bfloat16),
        "c": jnp.array([1j * jnp.inf, 1.0]),
    }
    for g in (grads, params):
        _, [ours] = run(tx, [g], params)
        _, [theirs] = run(plain, [g], params)
        assert_trees_equal(ours, theirs)
    assert int(ours.skip_state["num_not_finite"]) == 0


def test_a_skip_function_sees_the_step_and_the_parameters():
    def skip_large(updates, gradient_step, params):
        limit = jnp.where(gradient_step < 1, 1e9, optax.tree.norm(params))
        return optax.skip_large_updates(updates, gradient_step, params, limit)

    tx = optaccum.accumulate(optax.identity(), 1, should_skip_update_fn=skip_large)
    _, states = run(tx, [GRADS[0], GRADS[1], jax.tree.map(jnp.zeros_like, PARAMS)])
    assert [bool(s.has_updated) for s in states] == [True, False, True]


def test_a_skip_function_that_does_not_decide_raises():
    tx = optaccum.accumulate(optax.sgd(0.1), 2, should_skip_update_fn=lambda g, step, p: (jnp.isnan(g["b"]), ()))
    with pytest.raises(TypeError, match=r"bool scalar.*got bool\[2\]"):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)


# A weight that is not finite.


@pytest.mark.parametrize("name", ["weight", "denominator"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_ends_with_its_window(name, bad):
    tx = optaccum.accumulate(optax.identity(), optaccum.by_weight(lambda total: 2 - (total >= 6).astype(jnp.int32)))
    updates, states = run(tx, GRADS[:6], **{name: (1.0, bad, 4.0, 4.0, 1.0, 1.0)})
    assert jnp.isnan(updates[1]["w"]).all()  # as a NaN in the gradient
    assert jnp.isfinite(updates[3]["w"]).all()
    assert [int(s.gradient_step) for s in states] == [0, 1, 1, 2, 3, 4]
    assert optaccum.weight_total(states[1]) == 0.0
    assert optaccum.weight_total(states[5]) == 10.0
    _, states = run(tx, GRADS[:2], **{name: (1.0, 2.0)})
    assert optaccum.weight_total(states[1]) == 3.0


@pytest.mark.parametrize("skip_fn", [optax.skip_not_finite, lambda *_: (jnp.bool_(False), ())])
def test_a_skip_function_drops_the_micro_step_with_such_a_weight(skip_fn):
    tx = optaccum.accumulate(optax.identity(), 2, should_skip_update_fn=skip_fn)
    updates, states = run(tx, GRADS[:4], weight=(1.0, np.nan, np.inf, 3.0))
    assert_trees_equal(updates[3], weighted_mean([GRADS[0], GRADS[3]], [1, 3]))
    assert [int(s.num_skipped) for s in states] == [0, 1, 2, 2]
    assert optaccum.weight_total(states[3]) == 4.0
    without = optaccum.accumulate(optax.identity(), 2)
    updates, _ = run(without, GRADS[:2], weight=(1.0, np.nan))
    assert jnp.isnan(updates[1]["w"]).all()
