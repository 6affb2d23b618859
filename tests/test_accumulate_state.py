"""What can be asked of a streaming state: has it updated, how much weight went by."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_equal

import optaccum
from optaccum._accumulate_state import add_to_total

PARAMS = {"a": jnp.zeros(2), "b": jnp.zeros(2)}


def test_the_state_is_a_named_tuple_with_these_fields_and_dtypes():
    state = optaccum.accumulate(optax.adam(0.1), 2).init(PARAMS)
    assert isinstance(state, optaccum.AccumulateState)
    assert isinstance(state, tuple)
    fields = ("micro_step", "gradient_step", "has_updated", "num_skipped", "grad_sum", "weight_sum")
    assert state._fields[:7] == (*fields, "inner_state")
    dtypes = [str(state._asdict()[name].dtype) for name in fields if name != "grad_sum"]
    assert dtypes == ["int32", "int32", "bool", "int32", "float32"]
    assert optax.tree.get(state, "micro_step") == 0
    assert (state.extra_sums, state.skip_state, state.noise_state) == ((), (), ())


def test_has_updated_is_true_where_all_of_several_have():
    labels = {"a": "two", "b": "three"}
    groups = {"two": optaccum.accumulate(optax.sgd(1.0), 2), "three": optaccum.accumulate(optax.sgd(1.0), 3)}
    tx = optax.partition(groups, labels)
    state, seen = tx.init(PARAMS), []
    for _ in range(6):
        _, state = tx.update(PARAMS, state, PARAMS, weight=2)
        seen.append(bool(optaccum.has_updated(state)))
    assert seen == [False] * 5 + [True]
    assert optaccum.weight_total(state) == 12.0


def test_has_updated_works_inside_jit():
    tx = optax.chain(optaccum.accumulate(optax.sgd(1.0), 1))
    updated = jax.jit(lambda s: optaccum.has_updated(tx.update(PARAMS, s, PARAMS)[1]))(tx.init(PARAMS))
    assert updated.dtype == jnp.bool_
    assert updated


@pytest.mark.parametrize("ask", [optaccum.has_updated, optaccum.weight_total])
def test_a_state_without_accumulate_raises(ask):
    with pytest.raises(ValueError, match=r"holds an optaccum\.AccumulateState"):
        ask(optax.adam(0.1).init(PARAMS))


@pytest.mark.parametrize("jit", [True, False])
def test_the_total_weight_is_exact_past_two_to_the_24(jit):
    add = jax.jit(add_to_total) if jit else add_to_total
    weights = np.random.default_rng(0).integers(1, 2**20, 300).astype(np.float32)
    total, single = jnp.array([2.0**30, 0.0], jnp.float32), np.float32(2**30)
    for w in weights:
        total, single = add(total, w), single + w
    exact = 2**30 + int(weights.astype(np.int64).sum())
    assert int(np.asarray(total, np.float64).sum()) == exact
    assert int(single) != exact


def test_the_total_weight_stays_exact_over_many_windows_in_a_scan():
    tx = optaccum.accumulate(optax.identity(), 2)

    def body(state, _):
        return tx.update(jnp.ones(1), state, jnp.ones(1), weight=16_777_215.0)[1], None

    state, _ = jax.jit(lambda s: jax.lax.scan(body, s, length=20_000))(tx.init(jnp.ones(1)))
    assert optaccum.weight_total(state) == 16_777_215 * 20_000
    assert int(state.gradient_step) == 10_000


def test_the_open_window_is_not_counted():
    tx = optaccum.accumulate(optax.identity(), 2)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, weight=5)
    assert optaccum.weight_total(state) == 0.0
    _, state = tx.update(PARAMS, state, PARAMS, weight=5)
    assert optaccum.weight_total(state) == 10.0


def test_the_state_survives_a_flatten_and_a_pickle_in_the_middle_of_a_window():
    import pickle

    tx = optaccum.accumulate(optax.adam(0.1), 2)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = tx.update(ones, tx.init(PARAMS), PARAMS)
    restored = pickle.loads(pickle.dumps(jax.device_get(state)))
    assert_trees_equal(tx.update(ones, restored, PARAMS), tx.update(ones, state, PARAMS))
    with pytest.raises(AssertionError):
        assert_trees_equal(tx.update(ones, tx.init(PARAMS), PARAMS), tx.update(ones, state, PARAMS))
