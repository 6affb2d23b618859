"""`track_noise_scale` of `value_and_grad`: the window's two raw estimates. Over devices: test_data_axes_options.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optaccum

DIM, B, NUM_WINDOWS = 8, 22, 3000
TRUE = np.full(DIM, 0.5)  # |G|^2 = 2; a variance of 4 in each coordinate: tr Sigma = 32, noise scale 16

OPTIONS = {"return_info": True, "track_noise_scale": True}


def linear(params, x):
    """Its gradient is the mean of x: that of one example has mean TRUE and variance 4."""
    return (x @ params).mean()


def masked(params, batch):
    """Tokens: each weighs 1."""
    total = ((batch["x"] @ params) * batch["mask"]).sum()
    return optaccum.WeightedMean(total, batch["mask"].sum())


def noise_of(loss_fn, params, batch, n, **options):
    _, _, info = optaccum.value_and_grad(loss_fn, num_microbatches=n, **OPTIONS, **options)(params, batch)
    return info.noise


def averages(loss_fn, batches, n):
    """Each estimate's mean over many windows, for its two are unbiased one by one."""
    one = functools.partial(noise_of, loss_fn, jnp.zeros(DIM), n=n)
    noise = jax.jit(jax.vmap(lambda batch: one(batch)))(batches)
    return float(noise.gradient_sq_norm.mean()), float(noise.gradient_variance.mean())


@pytest.fixture(scope="module")
def examples():
    noise = np.random.default_rng(0).normal(size=(NUM_WINDOWS, B, DIM))
    return jnp.asarray(TRUE + 2 * noise, jnp.float32)


@pytest.mark.parametrize("n", [2, 4])  # 4: micro-batches of 6, 6, 5, 5
def test_it_finds_the_known_noise_scale(n, examples):
    sq_norm, variance = averages(linear, examples, n)
    assert sq_norm == pytest.approx(2, rel=0.05)
    assert variance == pytest.approx(32, rel=0.05)


def test_ragged_token_weights_need_the_weighted_formula(examples):
    kept = np.random.default_rng(1).integers(1, 4, (NUM_WINDOWS, 1))
    mask = np.ones((NUM_WINDOWS, B))
    mask[:, 1::2] = np.arange(B // 2) < kept  # the second micro-batch is mostly padding
    sq_norm, variance = averages(masked, {"x": examples, "mask": jnp.asarray(mask, jnp.float32)}, 2)
    assert sq_norm == pytest.approx(2, rel=0.05)
    assert variance == pytest.approx(32, rel=0.05)

    weighed = np.asarray(examples) * mask[..., None]
    each = np.stack([weighed[:, i::2].sum(1) / mask[:, i::2].sum(1, keepdims=True) for i in (0, 1)])
    half = mask.sum(1).mean() / 2
    assert half * each.var(0, ddof=1).sum(-1).mean() > 1.5 * 32  # as if the two weighed the same


def model_loss(params, batch):
    h = jnp.tanh(batch["x"] @ params["w"] + params["b"])
    return jnp.square(h @ params["out"] - batch["y"])


def model():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 6)), "b": rng.normal(size=6), "out": rng.normal(size=6)}
    batch = {"x": rng.normal(size=(11, 3)), "y": rng.normal(size=11)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch))


def per_example(params, batch):
    """Each example's gradient, flat, in float64; shape=(B, parameters)."""
    grads = jax.vmap(jax.grad(lambda p, row: model_loss(p, row)), in_axes=(None, 0))(params, batch)
    return np.concatenate([np.asarray(g, np.float64).reshape(len(g), -1) for g in jax.tree.leaves(grads)], axis=1)


def formula(each, weights, n):
    """Both estimates of micro-batches i::n, by hand."""
    sums = np.stack([(each[i::n] * weights[i::n, None]).sum(0) for i in range(n)])
    sizes = np.array([weights[i::n].sum() for i in range(n)])
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    mean, total = sums.sum(0) / sizes.sum(), sizes.sum()
    spread = (np.square(sums).sum(1) / sizes).sum() - total * np.square(mean).sum()
    variance = spread / (len(sizes) - 1)
    return np.square(mean).sum() - variance / total, variance


def assert_noise(noise, expected):
    assert float(noise.gradient_sq_norm) == pytest.approx(expected[0], rel=1e-3, abs=1e-4)
    assert float(noise.gradient_variance) == pytest.approx(expected[1], rel=1e-3)
    assert {x.dtype for x in noise} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("n", [4, 11])
def test_it_is_the_formula_on_the_gradients_of_a_models_examples(n):
    params, batch = model()
    each = per_example(params, batch)
    noise = noise_of(lambda p, b: model_loss(p, b).mean(), params, batch, n)
    assert_noise(noise, formula(each, np.ones(11), n))
    if n == 11:  # one example each: the sample variance
        assert float(noise.gradient_variance) == pytest.approx(each.var(0, ddof=1).sum(), rel=1e-3)
    else:  # as if the micro-batches of 3, 3, 3 and 2 weighed the same
        means = np.stack([each[i::n].mean(0) for i in range(n)])
        assert float(noise.gradient_variance) != pytest.approx(means.var(0, ddof=1).sum() * 11 / n, rel=2e-2)


def test_tokens_weigh_what_the_weighted_mean_says_and_empty_micro_batches_nothing():
    params, batch = model()
    mask = np.array([2.0, 0, 1, 0.5, 3, 0, 1, 1, 0, 0, 0])  # every micro-batch 1::4 row is empty: 1, 5, 9
    batch["mask"] = jnp.asarray(mask, jnp.float32)

    def loss_fn(params, batch):
        return optaccum.WeightedMean((model_loss(params, batch) * batch["mask"]).sum(), batch["mask"].sum())

    noise = noise_of(loss_fn, params, batch, 4)
    assert_noise(noise, formula(per_example(params, batch), mask, 4))


def test_terms_with_their_own_denominators_weigh_by_examples():
    params, batch = model()
    mask = jnp.asarray(np.arange(11) % 3 > 0, jnp.float32)
    batch["mask"] = mask

    def loss_fn(params, batch):
        each = model_loss(params, batch)
        return {
            "masked": optaccum.WeightedMean((each * batch["mask"]).sum(), batch["mask"].sum()),
            "all": optaccum.WeightedMean(each.sum(), len(each)),
        }

    weights = np.asarray(mask) * 11 / float(mask.sum()) + 1  # what an example's gradient counts, times N
    each = per_example(params, {"x": batch["x"], "y": batch["y"]}) * weights[:, None]
    assert_noise(noise_of(loss_fn, params, batch, 4), formula(each, np.ones(11), 4))


def test_one_micro_batch_shows_no_spread():
    params, batch = model()
    noise = noise_of(lambda p, b: model_loss(p, b).mean(), params, batch, 1)
    assert jnp.isnan(noise.gradient_sq_norm)
    assert jnp.isnan(noise.gradient_variance)


def test_a_dropped_micro_batch_stays_out():
    params, batch = model()
    spoilt = {**batch, "y": batch["y"].at[1].set(jnp.nan)}
    noise = noise_of(lambda p, b: model_loss(p, b).mean(), params, spoilt, 4, skip_nonfinite=True)
    weights = np.ones(11)
    weights[1::4] = 0
    assert_noise(noise, formula(per_example(params, batch), weights, 4))


def test_streaming_the_same_micro_batches_says_the_same():
    params, batch = model()
    tx = optaccum.accumulate(optax.identity(), 4, track_noise_scale=True)
    state = tx.init(params)
    for i in range(4):
        rows = jax.tree.map(lambda x, i=i: x[i::4], batch)
        grads = jax.grad(lambda p, rows=rows: model_loss(p, rows).mean())(params)
        _, state = tx.update(grads, state, params, weight=len(rows["y"]))
    streamed = optaccum.noise_scale(state)
    noise = noise_of(lambda p, b: model_loss(p, b).mean(), params, batch, 4)
    assert_trees_close(tuple(streamed[1:]), tuple(noise), rtol=1e-3)
    assert float(streamed.noise_scale) == pytest.approx(
        float(noise.gradient_variance / noise.gradient_sq_norm), rel=1e-3
    )


def test_it_keeps_nothing_of_the_size_of_the_parameters():
    params, batch = jnp.zeros((64, 512)), {"x": jnp.ones((8, 64)), "y": jnp.ones((8, 512))}

    def loss_fn(params, batch):
        return jnp.square(batch["x"] @ params - batch["y"]).mean()

    def temp(**options):
        grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=4, **options)
        return jax.jit(grad_fn).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert temp(**OPTIONS) < temp(in_place=False) + params.nbytes / 8


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_parameters_may_be_sharded(kind):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, DIM)), jnp.float32)
    expected = noise_of(linear, jnp.zeros(DIM), x, 4)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.zeros(DIM), NamedSharding(mesh, P("model")))
        rows = jax.device_put(x, NamedSharding(mesh, P("data", "model")))

        def loss_fn(params, x):
            products = jnp.dot(x, params, out_sharding=P("data") if kind == AxisType.Explicit else None)
            return products.mean()

        noise = noise_of(loss_fn, params, rows, 4)
    assert_trees_close(jax.device_get(noise), jax.device_get(expected), rtol=1e-5)
