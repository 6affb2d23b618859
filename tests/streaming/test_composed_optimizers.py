"""Around the window: chains, masks, partitions, lookahead, SAM; and what cannot be inside it, refused."""

import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal
from optax import contrib

import optaccum

PARAMS = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, -0.5])}
MASK = {"w": True, "b": False}
LABELS = {"w": "slow", "b": "fast"}


def gradients(seed):
    keys = dict(zip(PARAMS, jax.random.split(jax.random.key(seed)), strict=True))
    return {k: jax.random.randint(keys[k], p.shape, -8, 9).astype(p.dtype) for k, p in PARAMS.items()}


GRADS = [gradients(seed) for seed in range(8)]
SIZES = (3, 1) * 4  # examples; the windows' sums are powers of two, and their means exact


def mean(window):
    """Of window `window`, by examples."""
    return jax.tree.map(lambda a, b: (3 * a + b) / 4, *GRADS[2 * window : 2 * window + 2])


def streamed(tx, num_windows=2, params=PARAMS):
    """The parameters after each window."""
    state, results = tx.init(params), []
    for i in range(2 * num_windows):
        params, state = optaccum.apply_gradients(tx, GRADS[i], state, params, weight=SIZES[i])
        results.append(params)
    return results[1::2]


def at_once(tx, means=None, params=PARAMS):
    """The parameters after an update on each window's mean."""
    state, results = tx.init(params), []
    for grads in means or (mean(0), mean(1)):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        results.append(params)
    return results


def window_of(inner, k=2):
    return optaccum.accumulate(inner, k)


def momentum():
    return optax.sgd(0.1, momentum=0.9)


AROUND = {
    "linear before": lambda wrap: optax.chain(optax.scale(2.0), wrap(momentum())),
    "after": lambda wrap: optax.chain(wrap(momentum()), optax.scale(-0.5), optax.masked(optax.scale(2.0), MASK)),
    "named_chain": lambda wrap: optax.named_chain(("window", wrap(momentum())), ("scale", optax.scale(2.0))),
    "masked": lambda wrap: optax.chain(  # which passes the others' gradients on, at every micro-step
        optax.masked(wrap(momentum()), MASK), optax.masked(optax.set_to_zero(), {"w": False, "b": True})
    ),
    "partition": lambda wrap: optax.partition({"slow": wrap(momentum()), "fast": wrap(optax.adam(0.1))}, LABELS),
    "selective": lambda wrap: optax.selective_transform(wrap(momentum()), freeze_mask=MASK),
    "inject_hyperparams": lambda wrap: optax.inject_hyperparams(
        lambda learning_rate: wrap(optax.sgd(learning_rate, momentum=0.9))
    )(0.1),
    "flatten": lambda wrap: optax.flatten(wrap(momentum())),
    "apply_if_finite": lambda wrap: optax.apply_if_finite(wrap(momentum()), 2),
}
# A transformation of updates that is zero at zero may come after the window; add_decayed_weights may not.


@pytest.mark.parametrize("name", AROUND)
def test_around_a_window_it_is_as_around_the_optimizer(name):
    expected = at_once(AROUND[name](lambda inner: inner))
    assert_trees_close(streamed(AROUND[name](window_of)), expected)
    with pytest.raises(AssertionError):
        assert_trees_close(streamed(AROUND[name](lambda inner: window_of(inner, 1))), expected, rtol=1e-3)


def test_clipping_before_the_window_is_per_micro_batch_and_inside_it_per_window():
    clip, sgd = optax.clip_by_global_norm(1.0), optax.sgd(1.0)
    clipped = [clip.update(grads, optax.EmptyState())[0] for grads in GRADS[:2]]
    before = streamed(optax.chain(clip, window_of(sgd)), 1)
    inside = streamed(window_of(optax.chain(clip, sgd)), 1)
    mean_of_clipped = jax.tree.map(lambda a, b: (3 * a + b) / 4, *clipped)
    assert_trees_close(before, at_once(sgd, [mean_of_clipped]))
    assert_trees_close(inside, at_once(optax.chain(clip, sgd), [mean(0)]))
    with pytest.raises(AssertionError):
        assert_trees_close(before, inside, rtol=1e-2)


def test_lookahead_goes_around_the_window_and_counts_micro_steps():
    start = optax.LookaheadParams.init_synced(PARAMS)
    expected = at_once(optax.lookahead(momentum(), 2, 0.5), params=start)
    assert_trees_close(streamed_lookahead(optax.lookahead(window_of(momentum()), 4, 0.5)), expected)
    with pytest.raises(AssertionError):
        assert_trees_close(streamed_lookahead(optax.lookahead(window_of(momentum()), 2, 0.5)), expected)


def streamed_lookahead(tx):
    """Lookahead passes no weight on: these gradients' plain mean is the same."""
    params = optax.LookaheadParams.init_synced(PARAMS)
    state, results = tx.init(params), []
    for grads, size in zip(GRADS[:4], SIZES, strict=False):
        updates, state = tx.update(jax.tree.map(lambda g, size=size: g * size / 2, grads), state, params)
        params = optax.apply_updates(params, updates)
        results.append(params)
    return results[1::2]


def test_monitors_go_around_the_window():
    monitor = optax.monitor({"norm": optax.tree.norm})
    tx = optax.chain(window_of(optax.sgd(1.0)), monitor)
    state = tx.init(PARAMS)
    for grads, size in zip(GRADS[:2], SIZES, strict=False):
        _, state = tx.update(grads, state, PARAMS, weight=size)
    assert_trees_close(optax.tree.get(state, "norm"), optax.tree.norm(mean(0)))


def test_sharpness_aware_minimisation_takes_two_windows_of_one_batch():
    """Transparent mode: a window at the parameters, then one at the perturbed parameters."""
    learning_rate, radius, curvature = 0.1, 0.05, {"w": 2.0, "b": 0.5}

    def gradient(params, grads):
        return jax.tree.map(lambda g, p, c: g + c * p, grads, params, curvature)

    adversary = optax.chain(contrib.normalize(), optax.sgd(radius))
    tx = window_of(contrib.sam(optax.sgd(learning_rate), adversary, sync_period=2))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        at = params
        for grads, size in zip(GRADS[:2], SIZES, strict=False):
            params, state = optaccum.apply_gradients(tx, gradient(at, grads), state, params, weight=size)
    ascent = gradient(PARAMS, mean(0))
    norm = optax.tree.norm(ascent)
    perturbed = jax.tree.map(lambda p, g: p + radius * g / norm, PARAMS, ascent)
    descent = gradient(perturbed, mean(0))
    assert_trees_close(params, jax.tree.map(lambda p, g: p - learning_rate * g, PARAMS, descent), rtol=1e-5)
    plain = jax.tree.map(lambda p, g: p - learning_rate * g, PARAMS, ascent)
    with pytest.raises(AssertionError):  # without the perturbation
        assert_trees_close(params, plain, rtol=1e-5)


def test_schedule_free_evaluation_parameters_are_those_of_the_inner_state():
    inner = contrib.schedule_free_sgd(0.1)
    params, state = PARAMS, window_of(inner).init(PARAMS)
    for grads, size in zip(GRADS[:4], SIZES, strict=False):
        params, state = optaccum.apply_gradients(window_of(inner), grads, state, params, weight=size)
    evaluated = contrib.schedule_free_eval_params(state.inner_state, params)
    expected, inner_state = PARAMS, inner.init(PARAMS)
    for window in range(2):
        updates, inner_state = inner.update(mean(window), inner_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_trees_equal(evaluated, contrib.schedule_free_eval_params(inner_state, expected))
    with pytest.raises(AssertionError):
        assert_trees_close(evaluated, params, rtol=1e-3)


def test_what_cannot_be_inside_is_refused():
    per_example = jax.tree.map(lambda *g: jnp.stack(g), *GRADS[:2])
    tx = window_of(contrib.differentially_private_aggregate(1.0, 0.0, jax.random.key(0)))
    with pytest.raises(ValueError, match=r"\['b'\] to have the state's shape \(2,\); got \(2, 2\)"):
        tx.update(per_example, tx.init(PARAMS), PARAMS)
    tx = window_of(optax.monitor({"norm": optax.tree.norm}), 1)
    with pytest.raises(TypeError, match="the inner optimizer's state to keep its structure"):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    start = optax.LookaheadParams.init_synced(PARAMS)
    tx = window_of(optax.lookahead(momentum(), 2, 0.5))
    with pytest.raises(ValueError, match="do not match the state"):
        tx.update(GRADS[0], tx.init(start), start)


def test_private_gradients_are_clipped_and_averaged_before_the_window():
    aggregate = contrib.differentially_private_aggregate(1.0, 0.0, jax.random.key(0))
    batches = [jax.tree.map(lambda *g: jnp.stack(g), *GRADS[i : i + 2]) for i in (0, 2)]
    tx, state = window_of(optax.sgd(1.0)), window_of(optax.sgd(1.0)).init(PARAMS)
    private_state, params = aggregate.init(PARAMS), PARAMS
    for batch in batches:
        grads, private_state = aggregate.update(batch, private_state)
        params, state = optaccum.apply_gradients(tx, grads, state, params)
    everything = jax.tree.map(lambda *g: jnp.concatenate(g), *batches)
    whole, _ = aggregate.update(everything, aggregate.init(PARAMS))
    assert_trees_close(params, jax.tree.map(lambda p, g: p - g, PARAMS, whole))
    with pytest.raises(AssertionError):
        assert_trees_close(params, jax.tree.map(lambda p, g: p - g.mean(0), PARAMS, everything), rtol=1e-3)
