"""Streaming: a window's update against one on the mean, a float64 loop, and MultiSteps where it agrees."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal

import optaccum

K = 4
PARAMS = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, -0.5])}
WEIGHTS = (1.0, 4.0, 2.0, 1.0)  # their sum a power of two: means are exact, however XLA divides


def integers(seed, like=PARAMS):
    """Gradients of small integers, whose float32 sums are exact."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.integers(-8, 9, p.shape), p.dtype), like)


def run(tx, grads, params=PARAMS, *, jit=True, **per_call):
    """The updates and the states of successive calls; `per_call` lists one extra arg for each."""
    update = jax.jit(tx.update) if jit else tx.update
    state, updates, states = tx.init(params), [], []
    for i, g in enumerate(grads):
        u, state = update(g, state, params, **{name: values[i] for name, values in per_call.items()})
        updates.append(u)
        states.append(state)
    return updates, states


def weighted_mean(grads, weights):
    """A float64 NumPy loop."""
    total = jax.tree.map(lambda g: np.zeros(g.shape), grads[0])
    for g, w in zip(grads, weights, strict=True):
        total = jax.tree.map(lambda t, g, w=w: t + w * np.asarray(g, np.float64), total, g)
    return jax.tree.map(lambda t: (t / sum(weights)).astype(np.float32), total)


GRADS = [integers(i) for i in range(8)]


# What a window hands to its inner optimizer.


@pytest.mark.parametrize("jit", [True, False])
def test_a_window_hands_over_the_mean_and_only_then(jit):
    updates, states = run(optaccum.accumulate(optax.identity(), K), GRADS, jit=jit)
    for i in (3, 7):
        assert_trees_equal(updates[i], weighted_mean(GRADS[i - 3 : i + 1], [1] * K))
    for i in (0, 1, 2, 4, 5, 6):
        assert_trees_equal(updates[i], jax.tree.map(jnp.zeros_like, PARAMS))
    assert [bool(s.has_updated) for s in states] == [False, False, False, True] * 2
    assert [int(s.micro_step) for s in states] == [1, 2, 3, 0] * 2
    assert [int(s.gradient_step) for s in states] == [0, 0, 0, 1, 1, 1, 1, 2]
    with pytest.raises(AssertionError):  # a second window that still held the first
        assert_trees_equal(updates[7], weighted_mean(GRADS, [1] * 8))


def test_weights_give_the_mean_over_examples_and_not_of_means():
    updates, states = run(optaccum.accumulate(optax.identity(), K), GRADS[:4], weight=WEIGHTS)
    assert_trees_equal(updates[-1], weighted_mean(GRADS[:4], WEIGHTS))
    assert float(states[-1].weight_sum) == 8.0
    with pytest.raises(AssertionError):
        assert_trees_close(updates[-1], weighted_mean(GRADS[:4], [1] * K), rtol=0.05)


def test_a_denominator_divides_summed_gradients():
    sums = [jax.tree.map(lambda g, w=w: g * w, g) for g, w in zip(GRADS, WEIGHTS, strict=False)]
    by_denominator, _ = run(optaccum.accumulate(optax.identity(), K), sums[:4], denominator=WEIGHTS)
    by_weight, _ = run(optaccum.accumulate(optax.identity(), K), sums[:4], weight=WEIGHTS)
    assert_trees_equal(by_denominator[-1], weighted_mean(GRADS[:4], WEIGHTS))
    with pytest.raises(AssertionError):
        assert_trees_equal(by_weight[-1], by_denominator[-1])


def test_use_grad_mean_false_hands_over_the_weighted_sum():
    updates, _ = run(optaccum.accumulate(optax.identity(), K, use_grad_mean=False), GRADS[:4], weight=WEIGHTS)
    mean = weighted_mean(GRADS[:4], WEIGHTS)
    assert_trees_equal(updates[-1], jax.tree.map(lambda m: m * np.float32(8), mean))


def test_agrees_with_one_update_on_the_mean_for_a_stateful_optimizer():
    inner = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-2), optax.scale(-1e-3))
    updates, states = run(optaccum.accumulate(inner, K), GRADS, weight=WEIGHTS * 2)
    inner_state = inner.init(PARAMS)
    for i in (3, 7):
        mean = weighted_mean(GRADS[i - 3 : i + 1], WEIGHTS)
        expected, inner_state = jax.jit(inner.update)(mean, inner_state, PARAMS)
        assert_trees_close(updates[i], expected)
        assert_trees_close(states[i].inner_state, inner_state)


def test_agrees_with_multi_steps_where_weights_are_equal():
    inner = optax.adamw(1e-2)
    multi_steps = optax.MultiSteps(inner, K).gradient_transformation()
    ours, _ = run(optaccum.accumulate(inner, K), GRADS)
    theirs, _ = run(multi_steps, GRADS)
    assert_trees_close(ours, theirs, rtol=1e-5)
    weighted, _ = run(optaccum.accumulate(inner, K), GRADS, weight=WEIGHTS * 2)
    with pytest.raises(AssertionError):
        assert_trees_close(weighted, theirs, rtol=1e-5)


# Between updates.


def test_between_updates_the_inner_state_is_bit_identical_and_inner_does_not_run():
    calls = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda: calls.append(1))
        return updates, state + 1

    inner = optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)
    _, states = run(optaccum.accumulate(inner, K), GRADS)
    jax.effects_barrier()
    assert len(calls) == 2
    assert [int(s.inner_state) for s in states] == [0, 0, 0, 1, 1, 1, 1, 2]


def test_zero_updates_are_positive_zero_even_where_inner_would_give_infinity():
    inner = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u / 0.0, updates))
    updates, _ = run(optaccum.accumulate(inner, 2), GRADS[:2])
    for leaf in jax.tree.leaves(updates[0]):
        assert (leaf == 0).all()
        assert not jnp.signbit(leaf).any()
    assert not jnp.isfinite(updates[1]["w"]).all()


def test_a_nan_reaches_inner_in_its_own_window_and_no_other():
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
    updates, _ = run(optaccum.accumulate(optax.identity(), 2), [GRADS[0], bad, GRADS[2], GRADS[3]])
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(updates[1]))
    assert_trees_equal(updates[3], weighted_mean(GRADS[2:4], [1, 1]))
    theirs, _ = run(optax.MultiSteps(optax.identity(), 2).gradient_transformation(), [bad, bad, *GRADS[2:4]])
    assert jnp.isnan(theirs[3]["w"]).any()  # masking by multiplication keeps it for ever


# Zero weights.


def test_a_zero_weight_adds_nothing_not_even_a_nan_but_counts_as_a_micro_step():
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
    for name in ("weight", "denominator"):
        updates, states = run(
            optaccum.accumulate(optax.identity(), 3, should_skip_update_fn=optax.skip_not_finite),
            [GRADS[0], bad, GRADS[2]],
            **{name: (2.0, 0.0, 2.0)},
        )
        scale = 1 if name == "weight" else 2
        expected = jax.tree.map(lambda m, s=scale: m / s, weighted_mean([GRADS[0], GRADS[2]], [1, 1]))
        assert_trees_equal(updates[-1], expected)
        assert int(states[-1].num_skipped) == 0  # the skip function saw zeros
    updates, _ = run(optaccum.accumulate(optax.identity(), 3), [GRADS[0], bad, GRADS[2]], weight=(2, 1e-9, 2))
    assert jnp.isnan(updates[-1]["w"]).all()  # any other weight lets it in


def test_a_window_of_zero_weight_is_a_no_op():
    inner = optax.adamw(1e-1, weight_decay=1.0)
    tx = optaccum.accumulate(inner, 2)
    updates, states = run(tx, GRADS[:4], weight=(0, 0, 1, 1))
    assert_trees_equal(updates[1], jax.tree.map(jnp.zeros_like, PARAMS))
    assert_trees_equal(states[1].inner_state, inner.init(PARAMS))
    assert (int(states[1].micro_step), int(states[1].gradient_step)) == (0, 0)
    assert not states[1].has_updated
    assert states[3].has_updated
    with pytest.raises(AssertionError):
        assert_trees_equal(states[3].inner_state, inner.init(PARAMS))


# Skipping.


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


def test_has_updated_is_false_for_a_skip_right_after_an_update():
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), PARAMS)
    tx = optaccum.accumulate(optax.identity(), 1, should_skip_update_fn=optax.skip_not_finite)
    _, states = run(tx, [GRADS[0], bad])
    assert [bool(optaccum.has_updated(s)) for s in states] == [True, False]


def test_the_fused_finite_check_answers_as_optax_does():
    tx = optaccum.accumulate(optax.identity(), 2, should_skip_update_fn=optax.skip_not_finite)
    plain = optaccum.accumulate(
        optax.identity(), 2, should_skip_update_fn=lambda *args: optax.skip_not_finite(*args)
    )
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


# Schedules of k.


def test_k_follows_the_updates_so_far():
    tx = optaccum.accumulate(optax.identity(), lambda step: jnp.where(step < 2, 1, 3))
    _, states = run(tx, GRADS)
    assert [bool(s.has_updated) for s in states] == [True, True, False, False, True, False, False, True]


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


# Extra args.


def record(name):
    """An inner optimizer that keeps what it was given."""

    def update(updates, state, params=None, **extra_args):
        return updates, jnp.asarray(extra_args[name], jnp.float32)

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([], jnp.float32), update)


def test_extra_args_are_those_of_the_emitting_call_or_averaged_as_the_gradient_is():
    values = (1.0, 2.0, 3.0, 6.0)
    for averaged, kwargs, expected in [
        ((), {"weight": WEIGHTS}, 6.0),
        (("value",), {}, 3.0),
        (("value",), {"weight": WEIGHTS}, (1 + 8 + 6 + 6) / 8),
        (("value",), {"denominator": WEIGHTS}, 12 / 8),
        (("value",), {"weight": (1.0, 0.0, 0.0, 1.0)}, 3.5),
    ]:
        tx = optaccum.accumulate(record("value"), K, averaged_extra_args=averaged)
        _, states = run(tx, GRADS[:4], value=values, **kwargs)
        assert float(states[-1].inner_state) == expected, (averaged, kwargs)


def test_an_averaged_value_drives_polyak_through_a_chain():
    inner = optax.polyak_sgd(max_learning_rate=1.0)
    tx = optax.chain(optaccum.accumulate(inner, 2, averaged_extra_args=("value",)), optax.scale(2.0))
    updates, _ = run(tx, GRADS[:2], value=(1.0, 3.0))
    mean = weighted_mean(GRADS[:2], [1, 1])
    expected, _ = inner.update(mean, inner.init(PARAMS), PARAMS, value=2.0)
    last, _ = inner.update(mean, inner.init(PARAMS), PARAMS, value=3.0)
    assert_trees_close(updates[1], jax.tree.map(lambda u: 2 * u, expected))
    with pytest.raises(AssertionError):
        assert_trees_close(updates[1], jax.tree.map(lambda u: 2 * u, last))


def test_python_callables_and_pytrees_among_the_extra_args_pass_through():
    target = jax.tree.map(jnp.ones_like, PARAMS)

    def value_fn(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    tx = optaccum.accumulate(optax.lbfgs(), 2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    values = []
    for _ in range(4):
        params, state = step(params, state)
        values.append(float(value_fn(params)))
    assert values[0] == float(value_fn(PARAMS))
    assert values[1] == values[2] < values[0]
    assert values[3] < 1e-6


# Dtypes.


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.adam(0.1, mu_dtype=jnp.float32)])
def test_updates_and_parameters_keep_the_dtypes_that_inner_gives(optimizer):
    dtypes = (jnp.float32, jnp.float16, jnp.bfloat16)
    for grad_dtype in dtypes:
        for param_dtype in dtypes:
            params = optax.tree.cast(PARAMS, param_dtype)
            grads = optax.tree.cast(GRADS[0], grad_dtype)
            plain = jax.eval_shape(optimizer.update, grads, optimizer.init(params), params)
            tx = optaccum.accumulate(optimizer, 2)
            updates, states = run(tx, [grads] * 2, params)
            for u in updates:
                assert_dtypes_equal(u, plain[0])
                assert_dtypes_equal(optax.apply_updates(params, u), params)
            assert_dtypes_equal(states[-1], tx.init(params))
            assert {leaf.dtype for leaf in jax.tree.leaves(states[-1].grad_sum)} == {jnp.dtype(jnp.float32)}


def assert_dtypes_equal(actual, expected):
    assert jax.tree.leaves(actual)
    assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, expected)


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


def test_float64_stays_float64():
    with jax.enable_x64(True):
        params = jnp.zeros(3, jnp.float64)
        grads = [jnp.array([1.0, 2.0, 3.0]) * (1 + 1e-12 * i) for i in range(3)]
        updates, states = run(optaccum.accumulate(optax.identity(), 3), grads, params)
        assert updates[-1].dtype == states[-1].grad_sum.dtype == jnp.float64
        assert_trees_close(updates[-1], np.mean(grads, axis=0), rtol=1e-15)
        with pytest.raises(AssertionError):
            assert_trees_close(updates[-1], np.array([1.0, 2.0, 3.0]), rtol=1e-13)


def test_complex_gradients_are_averaged_in_both_parts():
    params = jnp.zeros(2, jnp.complex64)
    grads = [jnp.array([1 + 2j, 3 - 1j], jnp.complex64), jnp.array([4 - 1j, 1j], jnp.complex64)]
    updates, _ = run(optaccum.accumulate(optax.identity(), 2), grads, params, weight=(1, 2))
    assert_trees_close(updates[-1], jnp.array([3 + 0j, 1 + 1j / 3], jnp.complex64))


def test_leaves_without_a_gradient_stay_as_they_are():
    params = {"w": jnp.ones(2), "n": jnp.int32(16_777_217), "none": None, "masked": optax.MaskedNode()}
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    assert grads["n"].dtype == jax.dtypes.float0
    tx = optaccum.accumulate(
        optax.adamw(0.1, weight_decay=0.5), 2, should_skip_update_fn=optax.skip_not_finite
    )
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


# State.


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


def test_counters_saturate():
    top = jnp.int32(2**31 - 1)
    tx = optaccum.accumulate(optax.identity(), lambda step: 2**31 - 1)
    state = tx.init(PARAMS)._replace(micro_step=top - 1, gradient_step=top, num_skipped=top)
    _, state = tx.update(GRADS[0], state, PARAMS)
    assert (int(state.micro_step), int(state.gradient_step)) == (0, 2**31 - 1)
    assert state.has_updated


def test_accumulators_take_the_sharding_of_the_parameters():
    for axis_type in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
        with jax.set_mesh(mesh):
            sharding = jax.NamedSharding(mesh, jax.P("data", "model"))
            params = jax.device_put(jnp.ones((8, 4), jnp.bfloat16), sharding)
            tx = optaccum.accumulate(optax.adam(0.1), 2, should_skip_update_fn=optax.skip_not_finite)
            state = tx.init(params)
            assert state.grad_sum.sharding.is_equivalent_to(sharding, 2)
            step = jax.jit(lambda p, s, tx=tx: optaccum.apply_gradients(tx, p, s, p))
            for _ in range(2):
                params, state = step(params, state)
            assert state.grad_sum.sharding.is_equivalent_to(sharding, 2)
            assert params.sharding.is_equivalent_to(sharding, 2)
            assert (np.asarray(params, np.float32) < 1).all()


# Composition.


def test_it_is_a_transformation_with_extra_args_that_composes():
    label = {"w": "slow", "b": "fast"}
    params = PARAMS
    slow, fast = (optaccum.accumulate(optax.sgd(lr), k) for lr, k in ((0.5, 2), (1.0, 1)))
    assert isinstance(slow, optax.GradientTransformationExtraArgs)
    composed = {
        "chain": optax.chain(optax.clip(4.0), slow),
        "masked": optax.masked(slow, {"w": True, "b": False}),
        "partition": optax.partition({"slow": slow, "fast": fast}, label),
        "inner partition": optaccum.accumulate(
            optax.partition({"slow": optax.adam(0.1), "fast": optax.set_to_zero()}, label), 2
        ),
        "inject": optaccum.accumulate(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5), 2),
        "apply_if_finite": optaccum.accumulate(optax.apply_if_finite(optax.sgd(0.5), 3), 2),
    }
    for name, tx in composed.items():
        updates, states = run(tx, GRADS[:2], params, weight=(1, 3))
        assert [bool(optaccum.has_updated(s)) for s in states] == [False, True], name
        assert (updates[0]["w"] == 0).all()
        assert (updates[1]["w"] != 0).any()
        specs = optax.tree.map_params(
            tx, lambda leaf: "param", states[-1], transform_non_params=lambda _: "no"
        )
        assert "param" in jax.tree.leaves(specs)
        assert len(jax.tree.leaves(specs)) == len(jax.tree.leaves(states[-1]))
    mean = weighted_mean(GRADS[:2], (1, 3))
    updates, _ = run(composed["inject"], GRADS[:2], weight=(1, 3))
    assert_trees_close(updates[1], jax.tree.map(lambda m: -0.5 * m, mean))


def test_a_window_of_windows_is_the_mean_over_all():
    tx = optaccum.accumulate(optaccum.accumulate(optax.identity(), 2), 2)
    updates, states = run(tx, GRADS[:4])
    assert_trees_close(updates[3], weighted_mean(GRADS[:4], [1] * 4))
    assert [bool(optaccum.has_updated(s)) for s in states] == [False, False, False, True]


def test_zero_nans_inside():
    tx = optaccum.accumulate(optax.chain(optax.zero_nans(), optax.sgd(1.0)), 2)
    bad = jax.tree.map(lambda p: p.at[0].set(jnp.nan), PARAMS)
    updates, _ = run(tx, [GRADS[0], bad])
    assert_trees_close(updates[1]["b"], jnp.array([0.0, -(GRADS[0]["b"][1] + -0.5) / 2]))


# Transformations.


@pytest.mark.parametrize("jit", [True, False])
def test_derivatives_through_emitting_and_open_windows_are_those_of_the_mean(jit):
    target = integers(9)

    def by_window(learning_rate, scale, num_calls):
        tx = optaccum.accumulate(optax.adam(learning_rate, eps_root=1e-3), 2)
        params, state = PARAMS, tx.init(PARAMS)
        for g in GRADS[:num_calls]:
            g = jax.tree.map(lambda g, p: scale * g + p, g, params)
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    def by_hand(learning_rate, scale, num_calls):
        inner = optax.adam(learning_rate, eps_root=1e-3)
        params, state = PARAMS, inner.init(PARAMS)
        for a, b in list(zip(GRADS[::2], GRADS[1::2], strict=True))[: num_calls // 2]:
            g = jax.tree.map(lambda a, b, p: scale * (a + b) / 2 + p, a, b, params)
            updates, state = inner.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    for num_calls in (4,) if jit else (3, 4):
        for derivative in (jax.grad, jax.jacfwd):
            actual, expected = (
                derivative(lambda lr, s, f=f, n=num_calls: f(lr, s, n), (0, 1)) for f in (by_window, by_hand)
            )
            actual = jax.jit(actual) if jit else actual
            assert_trees_close(actual(0.1, 0.3), expected(0.1, 0.3), rtol=1e-4)
            with pytest.raises(AssertionError):
                assert_trees_close(actual(0.1, 0.3), expected(0.1, 0.35), rtol=1e-4)


def test_vmap_over_members_that_skip_and_schedule_differently():
    def member(k, grads):
        tx = optaccum.accumulate(optax.adam(0.1), lambda _: k, should_skip_update_fn=optax.skip_not_finite)
        return train(tx, grads)

    def train(tx, grads):
        params, state = jnp.ones(2), tx.init(jnp.ones(2))
        for g in grads:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params, state.num_skipped, state.gradient_step

    grads = jnp.arange(16.0).reshape(2, 4, 2).at[1, 1, 0].set(jnp.nan)
    k = jnp.array([1, 3])
    together = jax.jit(jax.vmap(member))(k, grads)
    alone = [jax.jit(member)(k[i], grads[i]) for i in range(2)]
    assert_trees_close(together, jax.tree.map(lambda *m: jnp.stack(m), *alone))
    assert together[1].tolist() == [0, 1]
    assert together[2].tolist() == [4, 1]


def test_strict_promotion_finds_no_implicit_cast():
    params = {"h": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2, jnp.complex64), "n": jnp.int32(1)}
    grads = params | {"n": np.zeros([], jax.dtypes.float0)}
    with jax.numpy_dtype_promotion("strict"):
        with pytest.raises(jax.dtypes.TypePromotionError):
            params["h"] + jnp.float32(1)
        for dtype in (jnp.float32, None):
            tx = optaccum.accumulate(
                optax.identity(), 2, accumulator_dtype=dtype, averaged_extra_args=("value",),
                track_noise_scale=True, should_skip_update_fn=optax.skip_not_finite,
            )  # fmt: skip
            state = tx.init(params)
            for _ in range(2):
                updates, state = jax.jit(lambda s, tx=tx: tx.update(grads, s, params, weight=3, value=1))(
                    state
                )
    assert_trees_equal(updates["c"], params["c"])


def test_eval_shape_sees_what_runs():
    tx = optaccum.accumulate(optax.adam(0.1), 2)
    state = jax.eval_shape(tx.init, PARAMS)
    updates, state = jax.eval_shape(tx.update, GRADS[0], state, PARAMS)
    real_updates, [real_state] = run(tx, GRADS[:1])
    assert_dtypes_equal(updates, real_updates[0])
    assert_dtypes_equal(state, real_state)


# Mistakes.


@pytest.mark.parametrize("k", [0, -1, True, np.bool_(True), 2.0, "2", None, np.int32(0)])
def test_a_k_that_is_not_a_positive_int_raises(k):
    with pytest.raises((TypeError, ValueError), match="every_k_schedule expects an int >= 1"):
        optaccum.accumulate(optax.sgd(0.1), k)


def test_a_numpy_int_is_a_k():
    updates, _ = run(optaccum.accumulate(optax.identity(), np.int64(2)), GRADS[:2])
    assert (updates[1]["w"] != 0).any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"averaged_extra_args": "value"}, "tuple of names"),
        ({"averaged_extra_args": ("weight",)}, "consumes"),
        ({"should_skip_update_fn": True}, "skip_not_finite"),
        ({"accumulator_dtype": "no such dtype"}, "accumulator_dtype expects a dtype"),
        ({"accumulator_dtype": jnp.int32}, "floating"),
    ],
)
def test_a_wrong_option_raises_where_it_is_made(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        optaccum.accumulate(optax.sgd(0.1), 2, **kwargs)


def test_an_inner_that_is_not_a_transformation_raises():
    with pytest.raises(TypeError, match="GradientTransformation"):
        optaccum.accumulate(0.1, 2)
    with pytest.raises(TypeError, match="by_weight expects a function"):
        optaccum.by_weight(3)


@pytest.mark.parametrize(
    ("grads", "kwargs", "message"),
    [
        (GRADS[0], {"weight": 1, "denominator": 1}, "got both"),
        (GRADS[0], {"weight": jnp.ones(3)}, r"weight expects a scalar, got shape \(3,\)"),
        (GRADS[0], {"denominator": 1j}, "real scalar"),
        (GRADS[0], {"weight": "three"}, "real scalar"),
        ({"w": GRADS[0]["w"]}, {}, r"\['b'\] is missing"),
        (GRADS[0] | {"c": jnp.ones(2)}, {}, r"\['c'\] was not among the parameters"),
        (GRADS[0] | {"b": jnp.ones(3)}, {}, r"\['b'\] has shape \(3,\), the state \(2,\)"),
        (GRADS[0] | {"b": None}, {}, r"\['b'\] is missing"),
        (GRADS[0] | {"b": jnp.ones(2, jnp.complex64)}, {}, r"\['b'\] is complex64"),
    ],
)
def test_what_does_not_fit_the_state_raises_and_names_it(grads, kwargs, message):
    tx = optaccum.accumulate(optax.sgd(0.1), 2)
    for call in (tx.update, lambda *args, **kw: optaccum.apply_gradients(tx, *args, **kw)):
        with pytest.raises((TypeError, ValueError), match=message):
            call(grads, tx.init(PARAMS), PARAMS, **kwargs)


def test_an_averaged_extra_arg_that_is_not_given_raises():
    tx = optaccum.accumulate(optax.sgd(0.1), 2, averaged_extra_args=("value",))
    with pytest.raises(TypeError, match="expects a scalar value="):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)


def test_a_skip_function_that_does_not_decide_raises():
    tx = optaccum.accumulate(
        optax.sgd(0.1), 2, should_skip_update_fn=lambda g, step, p: (jnp.isnan(g["b"]), ())
    )
    with pytest.raises(TypeError, match=r"bool scalar.*shape \(2,\)"):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)


def test_an_inner_whose_state_changes_shape_raises():
    inner = optax.GradientTransformation(lambda p: jnp.zeros(1), lambda g, s, p=None: (g, jnp.zeros(2)))
    tx = optaccum.accumulate(inner, 1)
    with pytest.raises(TypeError, match="inner optimizer's state may not change its shapes"):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
