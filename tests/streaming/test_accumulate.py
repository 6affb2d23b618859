"""Streaming: a window's update against the mean in a float64 loop, and MultiSteps where it agrees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal
from streaming_problem import GRADS, PARAMS, WEIGHTS, K, run, weighted_mean

import optaccum


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


def test_agrees_with_multi_steps_where_weights_are_equal():
    inner = optax.adamw(1e-2)
    multi_steps = optax.MultiSteps(inner, K).gradient_transformation()
    ours, _ = run(optaccum.accumulate(inner, K), GRADS)
    theirs, _ = run(multi_steps, GRADS)
    assert_trees_close(ours, theirs, rtol=1e-5)
    weighted, _ = run(optaccum.accumulate(inner, K), GRADS, weight=WEIGHTS * 2)
    with pytest.raises(AssertionError):
        assert_trees_close(weighted, theirs, rtol=1e-5)


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


def test_it_is_found_in_what_it_is_composed_with_and_its_parameters_are_mapped():
    """What such a composition computes: test_composed_optimizers.py and test_every_optimizer.py."""
    label = {"w": "slow", "b": "fast"}
    slow, fast = (optaccum.accumulate(optax.sgd(lr), k) for lr, k in ((0.5, 2), (1.0, 1)))
    assert isinstance(slow, optax.GradientTransformationExtraArgs)
    inside = optax.partition({"slow": optax.adam(0.1), "fast": optax.set_to_zero()}, label)
    for tx in (
        optax.chain(optax.clip(4.0), slow),
        optax.masked(slow, {"w": True, "b": False}),
        optax.partition({"slow": slow, "fast": fast}, label),
        optaccum.accumulate(inside, 2),
    ):
        updates, states = run(tx, GRADS[:2], weight=(1, 3))
        assert [bool(optaccum.has_updated(s)) for s in states] == [False, True]
        assert (updates[0]["w"] == 0).all()
        assert (updates[1]["w"] != 0).any()
        mapped = optax.tree.map_params(tx, lambda leaf: "param", states[-1], transform_non_params=lambda _: "no")
        assert "param" in jax.tree.leaves(mapped)
        assert len(jax.tree.leaves(mapped)) == len(jax.tree.leaves(states[-1]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"averaged_extra_args": "value"}, "tuple of names"),
        ({"averaged_extra_args": None}, "tuple of names"),
        (
            {"averaged_extra_args": (name for name in ["value"])},
            "tuple of names",
        ),  # all() would leave it empty
        ({"averaged_extra_args": ("value", "value")}, "once"),
        ({"averaged_extra_args": ("weight",)}, "consumes"),
        ({"averaged_extra_args": ("emit",)}, "consumes"),
        ({"should_skip_update_fn": True}, "skip_not_finite"),
        ({"accumulator_dtype": "no such dtype"}, "accumulator_dtype to be a dtype"),
        ({"accumulator_dtype": jnp.int32}, "floating"),
        ({"use_grad_mean": "no"}, "use_grad_mean to be True or False; got 'no'"),
        ({"track_noise_scale": 1}, "track_noise_scale to be True or False; got 1"),
    ],
)
def test_a_wrong_option_raises_where_it_is_made(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        optaccum.accumulate(optax.sgd(0.1), 2, **kwargs)


def test_an_inner_that_is_not_a_transformation_raises():
    with pytest.raises(TypeError, match="GradientTransformation"):
        optaccum.accumulate(0.1, 2)


@pytest.mark.parametrize(
    ("grads", "kwargs", "message"),
    [
        (GRADS[0], {"weight": 1, "denominator": 1}, "got both"),
        (GRADS[0], {"weight": jnp.ones(3)}, r"weight to be a scalar; got shape \(3,\)"),
        (GRADS[0], {"denominator": 1j}, "real scalar"),
        (GRADS[0], {"weight": "three"}, "real scalar"),
        (GRADS[0], {"weight": [1.0]}, "weight to be a real scalar; got list"),
        ({"w": GRADS[0]["w"]}, {}, r"(?s)child keys\W+b\W+w\W.*a gradient for each"),
        (GRADS[0] | {"c": jnp.ones(2)}, {}, r"(?s)child keys\W+b\W+c\W+w\W.*those that have one"),
        (GRADS[0] | {"b": jnp.ones(3)}, {}, r"\['b'\] to have the state's shape \(2,\); got \(3,\)"),
        (GRADS[0] | {"b": None}, {}, r"(?s)None.*a gradient for each"),
        (GRADS[0] | {"b": [jnp.ones(2)]}, {}, r"(?s)list.*a gradient for each"),
        (GRADS[0] | {"b": jnp.ones(2, jnp.complex64)}, {}, r"\['b'\] to be real.*got complex64"),
        (GRADS[0], {"emit": 1}, "emit to be a bool scalar"),
        (GRADS[0], {"emit": jnp.ones(2, bool)}, "emit to be a bool scalar"),
        (GRADS[0], {"emit": "yes"}, "emit to be a bool scalar"),
    ],
)
def test_what_does_not_fit_the_state_raises_and_names_it(grads, kwargs, message):
    tx = optaccum.accumulate(optax.sgd(0.1), 2)
    for call in (tx.update, lambda *args, **kw: optaccum.apply_gradients(tx, *args, **kw)):
        with pytest.raises((TypeError, ValueError), match=message):
            call(grads, tx.init(PARAMS), PARAMS, **kwargs)


def test_an_averaged_extra_arg_that_is_not_given_raises():
    tx = optaccum.accumulate(optax.sgd(0.1), 2, averaged_extra_args=("value",))
    with pytest.raises(TypeError, match="a scalar value="):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)


def test_an_inner_whose_state_changes_shape_raises():
    inner = optax.GradientTransformation(lambda p: jnp.zeros(1), lambda g, s, p=None: (g, jnp.zeros(2)))
    tx = optaccum.accumulate(inner, 1)
    with pytest.raises(TypeError, match="the inner optimizer's state to keep its shapes"):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)


def test_a_none_gradient_may_stand_beside_an_array():
    """Of what is not trained: `init` saw None there."""
    tx = optaccum.accumulate(optax.adam(0.1), 1)
    grads = {"w": GRADS[0]["w"], "b": None}
    updates, _ = tx.update(grads, tx.init(grads), PARAMS)
    assert updates["b"] is None
    assert (updates["w"] != 0).any()
