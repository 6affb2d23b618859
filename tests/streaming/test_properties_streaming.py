"""Streaming against the model, for any calls that hypothesis thinks of: splits, orders, skips, restarts."""

import pickle
import tempfile

import flax.serialization
import hypothesis
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import strategies as st
from streaming_model import (
    SETTINGS,
    TREES,
    Call,
    Setting,
    check,
    check_values,
    compiled,
    gradient_of,
    leaves_of,
    make_tx,
    num_traces,
    run_library,
    run_model,
)

import optaccum

HYPOTHESIS = {"derandomize": True, "deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
calls_strategy = st.lists(
    st.builds(
        Call,
        seed=st.integers(0, 30),
        weight=st.sampled_from([1, 2, 0, 3, 4]),
        bad=st.sampled_from([0.0, 0.0, 0.0, np.nan, np.inf, -np.inf]),
    ),
    min_size=1,
    max_size=12,
)
ks_strategy = st.tuples(*[st.integers(1, 4)] * 3)


@pytest.mark.parametrize("setting", SETTINGS)
def test_any_calls_are_what_the_model_says(setting):
    @hypothesis.settings(max_examples=40, **HYPOTHESIS)
    @hypothesis.given(ks=ks_strategy, calls=calls_strategy)
    def holds(ks, calls):
        check(setting, calls, run_library(setting, ks, calls), run_model(setting, ks, calls))

    holds()
    assert num_traces[setting] == 1


SOME_CALLS = [Call(seed=i, weight=(2, 1, 0, 3)[i % 4], bad=np.nan if i in (5, 14, 18, 25) else 0.0) for i in range(30)]


@pytest.mark.parametrize(
    "wrong",
    [
        "drop the weight",
        "mask by multiplication",
        "count what is skipped",
        "a micro-step early",
        "step without weight",
        "divide by k",
        "never reset",
    ],
)
def test_the_model_tells_a_wrong_formula(wrong):
    ks = (3, 1, 2)
    found = []
    for setting in SETTINGS:
        results = run_library(setting, ks, SOME_CALLS)
        check(setting, SOME_CALLS, results, run_model(setting, ks, SOME_CALLS))
        try:
            check(setting, SOME_CALLS, results, run_model(setting, ks, SOME_CALLS, wrong))
        except AssertionError:
            found.append(setting)
    assert found


# Restarts.


def through_flax(state, like):
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))


def through_orbax(state, like):
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{folder}/state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(f"{folder}/state", jax.eval_shape(lambda: like))


def through_pickle(state, like):
    return pickle.loads(pickle.dumps(jax.device_get(state)))


def forgetting_the_window(state, like):
    return state._replace(micro_step=like.micro_step)


def same(results, others):
    """To the bit, NaN at the same elements."""
    leaves, structure = jax.tree.flatten(results)
    other_leaves, other_structure = jax.tree.flatten(others)
    return structure == other_structure and all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(leaves, other_leaves, strict=True)
    )


@pytest.mark.parametrize(("through", "num_examples"), [(through_flax, 20), (through_pickle, 20), (through_orbax, 4)])
@pytest.mark.parametrize("setting", [SETTINGS[i] for i in (1, 2, 4)])
def test_a_restart_anywhere_changes_nothing(setting, through, num_examples):
    @hypothesis.settings(max_examples=num_examples, **HYPOTHESIS)
    @hypothesis.given(ks=ks_strategy, calls=calls_strategy, at=st.sets(st.integers(0, 11), max_size=3))
    def holds(ks, calls, at):
        undisturbed = run_library(setting, ks, calls)
        assert same(run_library(setting, ks, calls, dict.fromkeys(at, through)), undisturbed)

    holds()
    assert num_traces[setting] == 1
    undisturbed = run_library(setting, (3, 3, 3), SOME_CALLS)
    assert not same(run_library(setting, (3, 3, 3), SOME_CALLS, {7: forgetting_the_window}), undisturbed)


# A batch in any micro-batches, in any order.


@pytest.mark.parametrize("setting", [Setting("nested"), Setting("nested", "denominator"), Setting("complex")])
def test_any_split_in_any_order_gives_the_mean_over_the_batch(setting):
    examples = [leaves_of(setting.tree, 100 + seed) for seed in range(9)]
    structure = jax.tree.structure(TREES[setting.tree])
    mean = [np.mean([example[i] for example in examples], axis=0) for i in range(len(examples[0]))]

    def run(groups, num_groups, *, weights=True):
        """The updates of the last call; an empty micro-batch's mean is NaN."""
        state = make_tx(setting, (1, 1, 1)).init(TREES[setting.tree])
        for group in range(num_groups):
            members = [example for example, g in zip(examples, groups, strict=True) if g == group]
            reduce = np.sum if setting.weighted_by == "denominator" else np.mean
            grads = [
                np.asarray(reduce([m[i] for m in members], axis=0) if members else leaf * np.nan, leaf.dtype)
                for i, leaf in enumerate(examples[0])
            ]
            weight = np.float32(len(members) if weights else 1)
            ks = np.int32([num_groups] * 3)
            updates, state = compiled(setting)(ks, state, structure.unflatten(grads), weight)
        assert state.has_updated
        assert optaccum.weight_total(state) == (len(examples) if weights else num_groups)
        return jax.tree.leaves(updates)

    @hypothesis.settings(max_examples=40, **HYPOTHESIS)
    @hypothesis.given(st.lists(st.integers(0, 5), min_size=9, max_size=9), st.integers(6, 7))
    def holds(groups, num_groups):
        for update, want in zip(run(groups, num_groups), mean, strict=True):
            np.testing.assert_allclose(update, want, rtol=1e-5, atol=1e-6)

    holds()
    uneven = run([0, 1, 1, 1, 1, 1, 1, 2, 2], 3, weights=False)
    assert any(abs(update - want).max() > 0.1 for update, want in zip(uneven, mean, strict=True))


# In place.


@pytest.mark.parametrize("setting", [SETTINGS[i] for i in (0, 2)])
def test_apply_gradients_gives_the_parameters_that_updates_give(setting):
    structure = jax.tree.structure(TREES[setting.tree])

    @jax.jit
    def in_place(ks, grads, state, params, weight):
        given = {setting.weighted_by: weight}
        return optaccum.apply_gradients(make_tx(setting, ks), grads, state, params, **given)

    @hypothesis.settings(max_examples=20, **HYPOTHESIS)
    @hypothesis.given(ks=ks_strategy, calls=calls_strategy)
    def holds(ks, calls):
        params = others = TREES[setting.tree]
        state = make_tx(setting, ks).init(params)
        results = run_library(setting, ks, calls)
        for call, (updates, expected_state) in zip(calls, results, strict=True):
            grads = structure.unflatten(gradient_of(setting.tree, call))
            params, state = in_place(np.int32(ks), grads, state, params, np.float32(call.weight))
            others = optax.apply_updates(others, structure.unflatten(updates))
            assert same(state, expected_state)
            for param, other in zip(*map(jax.tree.leaves, (params, others)), strict=True):
                check_values(np.asarray(param), np.asarray(other))

    holds()
