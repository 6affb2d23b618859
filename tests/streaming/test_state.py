"""A streaming state: what can be asked of it, and what it keeps through scan, donation, sharding and pickle."""

import pickle
import tempfile
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import assert_trees_close, assert_trees_equal
from streaming_problem import GRADS, PARAMS, run, weighted_mean

import optaccum
from optaccum._streaming.state import add_to_total


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
    labels = {"w": "two", "b": "three"}
    groups = {"two": optaccum.accumulate(optax.sgd(1.0), 2), "three": optaccum.accumulate(optax.sgd(1.0), 3)}
    tx = optax.partition(groups, labels)
    state, seen = tx.init(PARAMS), []
    for _ in range(6):
        _, state = tx.update(PARAMS, state, PARAMS, weight=2)
        seen.append(bool(optaccum.has_updated(state)))
    assert seen == [False] * 5 + [True]
    assert optaccum.weight_total(state) == 12.0


def test_what_only_bears_the_name_is_not_asked():
    tx = optaccum.accumulate(optax.sgd(1.0), 1)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert optaccum.has_updated({"state": state, "has_updated": False})
    assert not optaccum.has_updated({"state": tx.init(PARAMS), "has_updated": True})


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


def test_the_state_survives_a_flatten_and_a_pickle_in_the_middle_of_a_window():
    tx = optaccum.accumulate(optax.adam(0.1), 2)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = tx.update(ones, tx.init(PARAMS), PARAMS)
    restored = pickle.loads(pickle.dumps(jax.device_get(state)))
    assert_trees_equal(tx.update(ones, restored, PARAMS), tx.update(ones, state, PARAMS))
    with pytest.raises(AssertionError):
        assert_trees_equal(tx.update(ones, tx.init(PARAMS), PARAMS), tx.update(ones, state, PARAMS))


def test_the_state_keeps_its_types_through_scan_with_one_trace():
    inner = optax.chain(optax.adam(0.1), optax.ema(0.9))
    tx = optaccum.accumulate(
        inner, 2, averaged_extra_args=("value",), track_noise_scale=True,
        should_skip_update_fn=optax.skip_not_finite,
    )  # fmt: skip
    params = optax.tree.cast(PARAMS, jnp.bfloat16)

    def body(state, g):
        _, state = tx.update(g, state, params, weight=2, value=1.0)
        return state, state.has_updated

    stacked = jax.tree.map(lambda *g: jnp.stack(g).astype(jnp.bfloat16), *GRADS)
    final, emitted = jax.jit(lambda s, g: jax.lax.scan(body, s, g))(tx.init(params), stacked)
    assert emitted.tolist() == [False, True] * 4
    assert jax.tree.map(jax.typeof, final) == jax.tree.map(jax.typeof, tx.init(params))
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), final)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(tx.init, params)) == expected


def test_weakly_typed_parameters_and_states_do_not_cause_a_second_trace():
    params = {"w": jnp.full((3,), 2.0)}
    assert jax.typeof(params["w"]).weak_type
    inner = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    tx = optaccum.accumulate(inner, 2)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state):
        return optaccum.apply_gradients(tx, {"w": jnp.ones(3)}, state, params)

    state = tx.init(params)
    before = jax.tree.map(jax.typeof, (params, state))
    for _ in range(4):
        params, state = step(params, state)
    assert jax.tree.map(jax.typeof, (params, state)) == before
    assert float(params["w"][0]) < 2.0


def test_typed_keys_in_the_inner_state_move_only_when_a_window_ends():
    inner = optax.add_noise(1.0, 0.5, jax.random.key(7))
    updates, states = run(optaccum.accumulate(inner, 2), GRADS[:3])
    key = [jax.random.key_data(s.inner_state.rng_key) for s in states]
    assert_trees_equal(key[0], jax.random.key_data(jax.random.key(7)))
    assert (key[1] != key[0]).any()
    assert_trees_equal(key[2], key[1])
    expected, _ = inner.update(weighted_mean(GRADS[:2], [1, 1]), inner.init(PARAMS))
    assert_trees_close(updates[1], expected)


def test_every_field_is_a_buffer_of_its_own_and_can_be_donated():
    tx = optaccum.accumulate(
        optax.adam(0.1), 2, should_skip_update_fn=optax.skip_not_finite,
        averaged_extra_args=("value",), track_noise_scale=True,
    )  # fmt: skip
    step = jax.jit(lambda s, p: tx.update(GRADS[0], s, p, value=1.0)[1], donate_argnums=0)
    state = tx.init(PARAMS)
    for _ in range(3):
        state = step(state, PARAMS)
    assert int(state.gradient_step) == 1


def test_windows_of_windows_of_windows():
    tx = optax.sgd(1.0)
    for _ in range(3):
        tx = optaccum.accumulate(tx, 2)
    params = jnp.zeros(2)
    state, update, emitted, moved = tx.init(params), jax.jit(tx.update), [], []
    for i in range(16):
        updates, state = update(jnp.full(2, float(i)), state, params)
        emitted.append(bool(optaccum.has_updated(state)))
        moved.append(float(updates[0]))
    assert emitted == ([False] * 7 + [True]) * 2
    assert moved == [0] * 7 + [-3.5] + [0] * 7 + [-11.5]  # the mean over all eight


def test_the_total_weight_of_a_vmapped_state_is_its_least_members():
    tx = optaccum.accumulate(optax.sgd(1.0), 1)
    params = jnp.zeros((3, 2))
    state = jax.vmap(tx.init)(params)
    update = jax.vmap(lambda g, s, p, w: tx.update(g, s, p, weight=w))
    _, state = update(params, state, params, jnp.array([5.0, 2.0, 7.0]))
    assert optaccum.weight_total(state) == 2.0


# A state that is not this transformation's is refused by name, with the way out.

ADAM = optax.adam(0.1)
TX = optaccum.accumulate(ADAM, 2)
CHAIN = optax.chain(optax.clip(1.0), TX)


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (optax.MultiSteps(ADAM, 2).init(PARAMS), "optaccum.from_multi_steps"),
        (CHAIN.init(PARAMS), "holds one"),
        (ADAM.init(PARAMS), r"got tuple.*\(grads, state, params\)"),
        (PARAMS, "got dict"),
    ],
)
def test_another_kind_of_state(state, match):
    calls = (
        lambda: TX.update(GRADS[0], state, PARAMS),
        lambda: optaccum.apply_gradients(TX, GRADS[0], state, PARAMS),
        lambda: optaccum.flush(TX, state, PARAMS),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"to be an optaccum.AccumulateState.*" + match):
            call()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"averaged_extra_args": ("value",)}, "a state with averaged_extra_args="),
        (
            {"should_skip_update_fn": optax.skip_not_finite},
            r"should_skip_update_fn returns to keep its structure.*Restore it",
        ),
        ({"track_noise_scale": True}, "a state with track_noise_scale"),
    ],
)
def test_a_state_of_other_options(options, match):
    other = optaccum.accumulate(ADAM, 2, **options)
    with pytest.raises((TypeError, ValueError), match=match):
        other.update(GRADS[0], TX.init(PARAMS), PARAMS, value=1.0)
    if "averaged_extra_args" in options:  # and switched off
        with pytest.raises(ValueError, match=match):
            TX.update(GRADS[0], other.init(PARAMS), PARAMS)


def test_parameters_that_are_missing_are_what_is_missed():
    tx = optaccum.accumulate(optax.adamw(0.1), 2)
    with pytest.raises(ValueError, match="not passing `params`"):  # Optax's own words
        tx.update(GRADS[0], tx.init(PARAMS))
    with pytest.raises(ValueError, match="params to be the parameters"):
        optaccum.apply_gradients(tx, GRADS[0], tx.init(PARAMS), None)


def test_a_skip_function_returns_a_pair():
    with pytest.raises(TypeError, match="got True"):
        optaccum.accumulate(ADAM, 2, should_skip_update_fn=lambda *_: True).init(PARAMS)


def test_a_state_restored_without_its_types_is_answered_with_the_template():
    for tx in (TX, CHAIN):
        with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(f"{folder}/state", tx.init(PARAMS))
            checkpointer.wait_until_finished()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Orbax': that it restores on this topology
                bare = checkpointer.restore(f"{folder}/state")
        with pytest.raises(ValueError, match=r"tx.init\(params\) as the template"):
            optaccum.has_updated(bare)
    with pytest.raises(TypeError, match=r"tx.init\(params\) as the template"):
        TX.update(GRADS[0], TX.init(PARAMS)._asdict(), PARAMS)
    with pytest.raises(ValueError, match="returned"):  # of a state that never had one
        optaccum.has_updated({"micro_step": 0})


def test_a_leaf_without_a_name_has_a_number():
    """Of a pytree whose class does not name its children."""

    @jax.tree_util.register_pytree_node_class
    class Box:
        def __init__(self, *leaves):
            self.leaves = leaves

        def tree_flatten(self):
            return self.leaves, None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(*leaves)

    params, grads = {"box": Box(jnp.ones(1), jnp.ones(2))}, {"box": Box(jnp.ones(1), jnp.ones(3))}
    with pytest.raises(ValueError, match=r"the gradient at \['box'\], leaf 1 to have"):
        TX.update(grads, TX.init(params), params)
    with pytest.raises(ValueError, match="the gradient at leaf 1 to have"):
        TX.update(grads["box"], TX.init(params["box"]), params["box"])


def test_asking_moves_nothing_to_the_device():
    states = TX.init(PARAMS), optax.partition({"x": TX}, {"w": "x", "b": "x"}).init(PARAMS)
    with jax.transfer_guard("disallow"):
        assert not any(map(optaccum.has_updated, states))
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            jnp.logical_and(states[0].has_updated, True)


@pytest.mark.parametrize("options", [{}, {"should_skip_update_fn": optax.skip_not_finite}])
def test_init_makes_the_sums_and_no_other_copy(options):
    """Zeros made to learn a structure would be a second: seen in what is alive while the skip function runs."""
    params = {"w": jnp.ones((101, 103))}
    alive = []

    def skip(updates, gradient_step, params):
        alive.append(sum(x.shape == (101, 103) for x in jax.live_arrays()))
        return optax.skip_not_finite(updates, gradient_step, params)

    options = dict.fromkeys(options, skip)
    state = optaccum.accumulate(optax.sgd(0.1), 2, **options).init(params)
    assert alive == [2] * len(options)
    assert state.grad_sum["w"].shape == (101, 103)
    spare = jnp.zeros_like(params["w"])
    optaccum.accumulate(optax.sgd(0.1), 2, should_skip_update_fn=skip).init(params)
    assert alive[-1] == 4  # with the state above, and one to spare
    del spare


@pytest.mark.parametrize("accumulator_dtype", [jnp.float32, None])
def test_numpy_parameters_are_taken_without_a_warning(accumulator_dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = optaccum.accumulate(ADAM, 2, accumulator_dtype=accumulator_dtype).init({"w": np.ones(3)})
    assert state.grad_sum["w"].dtype == jnp.float32
