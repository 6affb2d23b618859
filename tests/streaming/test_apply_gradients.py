"""Gradients to parameters in one call, in place; and windows ended early."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close

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
    chain = optax.chain(tx, optaccum.accumulate(optax.sgd(0.1), 2))
    optaccum.apply_gradients(chain, GRADS[0], chain.init(PARAMS), PARAMS, value=1.0)
    optaccum.apply_gradients(chain, GRADS[0], chain.init(PARAMS), PARAMS, weight=1.0, emit=True)
    assert seen == [["value"], ["emit", "weight"]]


@pytest.mark.parametrize("name", ["weight", "denominator", "emit"])
def test_what_only_accumulate_takes_is_refused_where_there_is_none(name):
    for tx in (optax.sgd(0.1), optax.chain(optax.clip(1.0), optax.adam(0.1))):
        with pytest.raises(TypeError, match=rf"an optaccum\.accumulate inside, to take {name}="):
            optaccum.apply_gradients(tx, GRADS[0], tx.init(PARAMS), PARAMS, **{name: True})
        optaccum.apply_gradients(tx, GRADS[0], tx.init(PARAMS), PARAMS)


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
    plain = optaccum.accumulate(optax.adamw(1e-3), 8, should_skip_update_fn=lambda *args: optax.skip_not_finite(*args))
    assert temp_copies(plain, in_one=True) > 0.5


# Parameters that are not arrays, and a jitted update.


@pytest.mark.parametrize("inner", [optax.sgd(0.5, momentum=0.9), optax.adamw(0.5)])
@pytest.mark.parametrize("around", [lambda tx: tx, optax.chain])
def test_parameters_may_hold_functions_and_strings(inner, around):
    """As an Equinox model does, whose gradient has None there."""
    arrays = {"w": jnp.ones(3), "activation": None, "name": None, "rate": None}
    model = {"w": jnp.ones(3), "activation": jax.nn.relu, "name": "layer", "rate": 0.5}
    grads = arrays | {"w": jnp.array([1.0, -2.0, 3.0])}
    tx = around(optaccum.accumulate(inner, 2))
    expected = optax.apply_updates(arrays, inner.update(grads, inner.init(arrays), model)[0])

    state = tx.init(arrays)
    for _ in range(2):
        updates, state = tx.update(grads, state, model)
    assert_trees_close(optax.apply_updates(arrays, updates), expected)

    one, state = model, tx.init(arrays)
    for _ in range(2):
        one, state = optaccum.apply_gradients(tx, grads, state, one, weight=2.0)
    assert {name: one[name] for name in ("activation", "name", "rate")} == {
        name: model[name] for name in ("activation", "name", "rate")
    }
    assert_trees_close(one["w"], expected["w"])

    _, state = optaccum.apply_gradients(tx, grads, tx.init(arrays), model)
    flushed, _ = optaccum.flush(tx, state, arrays | {"activation": jax.nn.relu, "name": "layer"})
    assert_trees_close(optax.apply_updates(arrays, flushed), expected)


def test_init_takes_them_wherever_the_inner_optimizer_does():
    model = {"w": jnp.ones(3), "activation": jax.nn.relu}
    optaccum.accumulate(optax.sgd(0.5), 2).init(model)
    for inner in (optax.adam(0.5), optaccum.accumulate(optax.adam(0.5), 2)):
        with pytest.raises(TypeError):  # zeros like a function: adam's own words
            inner.init(model)


def test_a_jitted_update_keeps_the_way_in_place():
    tx = optaccum.accumulate(optax.adamw(1e-3), 8)
    assert temp_copies(tx._replace(update=jax.jit(tx.update)), in_one=True) < 0.05

    def update(*args, **kwargs):  # of the user's own: it is what is called
        return tx.update(*args, **kwargs)

    assert temp_copies(tx._replace(update=jax.jit(update)), in_one=True) > 0.9
