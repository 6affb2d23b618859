"""The noise scale against a synthetic problem where it is known, and the formula against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close

import optaccum
from optaccum._noise_scale import estimate_noise, squared_norm

DIM, VARIANCE = 16, 4.0  # of each coordinate of one example's gradient
TRUE = np.full(DIM, 0.5)  # |G|^2 = 4, tr Sigma = 64, noise scale 16
EQUAL, RAGGED = (8, 8, 8, 8), (1, 2, 13, 16)


def micro_gradients(sizes, num_windows, seed=0):
    """Mean gradients of micro-batches of these sizes; shape=(num_windows, micro-steps, DIM)."""
    noise = np.random.default_rng(seed).normal(size=(num_windows, len(sizes), DIM))
    return TRUE + noise * np.sqrt(VARIANCE / np.asarray(sizes))[:, None]


def streamed(sizes, grads, weights, **options):
    tx = optaccum.accumulate(optax.identity(), len(sizes), track_noise_scale=True, **options)
    params = jnp.zeros(DIM)

    def body(state, micro_step):
        g, w = micro_step
        return tx.update(g, state, params, weight=w)[1], None

    grads = jnp.asarray(grads.reshape(-1, DIM), jnp.float32)
    weights = jnp.tile(jnp.asarray(weights, jnp.float32), len(grads) // len(sizes))
    state, _ = jax.jit(lambda s: jax.lax.scan(body, s, (grads, weights)))(tx.init(params))
    return optaccum.noise_scale(state), state


@pytest.mark.parametrize("sizes", [EQUAL, RAGGED])
@pytest.mark.parametrize("use_grad_mean", [True, False])
def test_it_finds_the_known_noise_scale_with_equal_and_ragged_weights(sizes, use_grad_mean):
    noise, _ = streamed(sizes, micro_gradients(sizes, 600), sizes, use_grad_mean=use_grad_mean)
    assert float(noise.gradient_sq_norm) == pytest.approx(4.0, rel=0.1)
    assert float(noise.gradient_variance) == pytest.approx(64.0, rel=0.1)
    assert float(noise.noise_scale) == pytest.approx(16.0, rel=0.15)


def test_the_equal_weight_formula_is_wrong_on_ragged_weights():
    noise, _ = streamed(RAGGED, micro_gradients(RAGGED, 600), (8,) * 4)
    assert float(noise.noise_scale) > 32


def test_one_estimate_is_unbiased_and_is_the_formula_of_the_paper_at_k_2():
    grads = micro_gradients(RAGGED, 20_000)
    n, total = np.asarray(RAGGED), sum(RAGGED)
    mean_sq_norm = ((grads * n[:, None]).sum(1) / total) @ np.eye(DIM)
    sq_norm_sum = (n * (grads**2).sum(-1)).sum(-1)
    estimates = estimate_noise(4, sq_norm_sum, (mean_sq_norm**2).sum(-1), total)
    assert float(estimates.gradient_sq_norm.mean()) == pytest.approx(4.0, rel=0.02)
    assert float(estimates.gradient_variance.mean()) == pytest.approx(64.0, rel=0.02)

    small, big = 3.0, 2.0  # |g|^2 of a half batch (mean of two) and of the whole, of 8 and 16 examples
    ours = estimate_noise(2, 2 * 8 * small, big, 16)
    assert float(ours.gradient_sq_norm) == pytest.approx((16 * big - 8 * small) / (16 - 8))
    assert float(ours.gradient_variance) == pytest.approx((small - big) / (1 / 8 - 1 / 16))


def test_the_averages_are_bias_corrected_from_the_first_window_on():
    grads = micro_gradients(EQUAL, 1)
    noise, _ = streamed(EQUAL, grads, EQUAL)
    mean_sq_norm = float((grads[0].mean(0) ** 2).sum())
    expected = estimate_noise(4, 8 * (grads**2).sum(), mean_sq_norm, 32)
    assert float(noise.gradient_variance) == pytest.approx(float(expected.gradient_variance), rel=1e-4)
    assert float(noise.gradient_sq_norm) == pytest.approx(float(expected.gradient_sq_norm), rel=1e-4)


def test_a_denominator_says_the_same_of_summed_gradients():
    tx = optaccum.accumulate(optax.identity(), 4, track_noise_scale=True)
    by_weight = by_denominator = tx.init(jnp.zeros(DIM))
    for g, n in zip(micro_gradients(RAGGED, 1)[0], RAGGED, strict=True):
        g = jnp.asarray(g, jnp.float32)
        _, by_weight = tx.update(g, by_weight, weight=n)
        _, by_denominator = tx.update(g * n, by_denominator, denominator=n)
    assert_trees_close(optaccum.noise_scale(by_weight), optaccum.noise_scale(by_denominator), rtol=1e-4)


def test_windows_that_show_no_spread_or_are_not_finite_are_left_out():
    tx = optaccum.accumulate(optax.identity(), 2, track_noise_scale=True)
    ones, nan = jnp.ones(DIM), jnp.full(DIM, jnp.nan)
    state = tx.init(ones)
    for g, weight in [(ones, 1.0), (nan, 0.0), (nan, 1.0), (ones, 1.0)]:  # one term; then not finite
        _, state = tx.update(g, state, weight=weight)
    assert int(state.gradient_step) == 2
    assert jnp.isnan(optaccum.noise_scale(state).noise_scale)
    for g in (ones, 3 * ones):
        _, state = tx.update(g, state)
    assert float(optaccum.noise_scale(state).gradient_variance) == pytest.approx(2 * DIM)


def test_k_of_one_never_counts():
    tx = optaccum.accumulate(optax.identity(), 1, track_noise_scale=True)
    _, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    for asked in (state, jax.device_get(state)):  # of NumPy arrays without a warning
        assert jnp.isnan(optaccum.noise_scale(asked).gradient_variance)


def test_it_is_found_inside_a_chain_and_adds_up_over_a_partition():
    tracking = optaccum.accumulate(optax.identity(), 2, track_noise_scale=True)
    whole = optax.chain(optax.scale(1.0), tracking)
    parts = optax.partition({"x": tracking, "y": tracking}, {"a": "x", "b": "y"})
    params = {"a": jnp.zeros(3), "b": jnp.zeros(5)}
    states = [whole.init(params), parts.init(params)]
    for seed in range(4):
        g = {name: jax.random.normal(jax.random.key(seed), p.shape) for name, p in params.items()}
        states = [tx.update(g, s, params)[1] for tx, s in zip((whole, parts), states, strict=True)]
    assert_trees_close(*map(optaccum.noise_scale, states), rtol=1e-4)


def test_a_state_that_does_not_track_it_raises():
    state = optaccum.accumulate(optax.identity(), 2).init(jnp.ones(3))
    with pytest.raises(ValueError, match="track_noise_scale=True"):
        optaccum.noise_scale(state)


def test_squared_norms_are_float32_sums_over_real_and_imaginary_parts():
    tree = {"c": jnp.array([3 + 4j]), "h": jnp.full(1000, 0.1, jnp.bfloat16), "n": None}
    exact = 25 + 1000 * float(jnp.bfloat16(0.1)) ** 2
    assert float(squared_norm(tree)) == pytest.approx(exact, rel=1e-6)
    assert squared_norm(tree).dtype == jnp.float32
