"""Taking over a run that optax.MultiSteps began, wherever it stands."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close

import optaccum

PARAMS = {"w": jnp.arange(4.0), "b": jnp.ones(2)}
RNG = np.random.default_rng(0)
GRADS = [jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), jnp.float32), PARAMS) for _ in range(10)]


def train(tx, grads, params, state):
    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for g in grads:
        params, state = step(params, state, g)
    return params, state


@pytest.mark.parametrize("use_grad_mean", [True, False])
@pytest.mark.parametrize("num_before", [0, 4, 5])
def test_it_goes_on_to_the_same_parameters(num_before, use_grad_mean):
    inner, k = optax.adamw(0.1), lambda step: jnp.where(step < 1, 2, 3)
    theirs = optax.MultiSteps(inner, k, use_grad_mean=use_grad_mean)
    tx = optaccum.accumulate(inner, k, use_grad_mean=use_grad_mean)
    undisturbed, _ = train(theirs, GRADS, PARAMS, theirs.init(PARAMS))
    params, state = train(theirs, GRADS[:num_before], PARAMS, theirs.init(PARAMS))
    ours, final = train(tx, GRADS[num_before:], params, optaccum.from_multi_steps(tx, state))
    assert_trees_close(ours, undisturbed, rtol=1e-5)
    assert int(final.gradient_step) == 3
    emitted_before = {0: 0, 4: 2, 5: 5}[num_before]  # of a k that is a function nothing is known
    assert optaccum.weight_total(final) == 8.0 - emitted_before  # 2 + 3 + 3
    if num_before == 4:  # two micro-steps into a window: forgetting them shows
        forgotten = optaccum.from_multi_steps(tx, state)._replace(micro_step=jnp.int32(0))
        wrong, _ = train(tx, GRADS[4:], params, forgotten)
        with pytest.raises(AssertionError):
            assert_trees_close(wrong, undisturbed, rtol=1e-5)


def test_its_types_are_those_of_a_fresh_state_and_it_says_whether_it_updated():
    inner = optax.adam(0.1)
    options = {"should_skip_update_fn": optax.skip_not_finite}
    theirs = optax.MultiSteps(inner, 2, **options)
    tx = optaccum.accumulate(inner, 2, track_noise_scale=True, **options)
    state = theirs.init(PARAMS)
    for i, expected in enumerate([False, True, False]):
        _, state = theirs.update(GRADS[i], state, PARAMS)
        ours = optaccum.from_multi_steps(tx, state)
        assert jax.tree.map(jax.typeof, ours) == jax.tree.map(jax.typeof, tx.init(PARAMS))
        assert bool(optaccum.has_updated(ours)) is expected
    _, ours = tx.update(GRADS[3], ours, PARAMS)
    assert jnp.isnan(optaccum.noise_scale(ours).noise_scale)  # half of that window's norms are not known
    for i in (4, 5):
        _, ours = tx.update(GRADS[i], ours, PARAMS)
    assert jnp.isfinite(optaccum.noise_scale(ours).noise_scale)


def test_the_weight_emitted_before_is_exact_past_2_to_the_24():
    num_updates, k = 5_000_001, 7
    theirs = optax.MultiSteps(optax.sgd(0.1), k).init(PARAMS)._replace(gradient_step=jnp.int32(num_updates))
    state = optaccum.from_multi_steps(optaccum.accumulate(optax.sgd(0.1), k), theirs)
    assert optaccum.weight_total(state) == num_updates * k
    assert float(state.weight_total[0]) != num_updates * k  # one float32 word


def test_a_skip_function_that_multi_steps_did_not_have_starts_afresh():
    tx = optaccum.accumulate(optax.sgd(0.1), 2, should_skip_update_fn=optax.skip_not_finite)
    state = optaccum.from_multi_steps(tx, optax.MultiSteps(optax.sgd(0.1), 2).init(PARAMS))
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, tx.init(PARAMS))


def test_what_cannot_be_taken_over_raises():
    tx = optaccum.accumulate(optax.sgd(0.1), 2)
    theirs = optax.MultiSteps(optax.sgd(0.1), 2)
    with pytest.raises(TypeError, match=r"optax\.MultiStepsState"):
        optaccum.from_multi_steps(tx, tx.init(PARAMS))
    with pytest.raises(TypeError, match=r"optaccum\.accumulate made"):
        optaccum.from_multi_steps(optax.sgd(0.1), theirs.init(PARAMS))
    averaging = optaccum.accumulate(optax.sgd(0.1), 2, averaged_extra_args=("value",))
    optaccum.from_multi_steps(averaging, theirs.init(PARAMS))
    _, state = theirs.update(GRADS[0], theirs.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="got one 1 micro-steps into a window"):
        optaccum.from_multi_steps(averaging, state)
