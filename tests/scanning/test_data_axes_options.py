"""`data_axes` together with the other options, and with losses that use collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, assert_trees_equal
from jax import lax
from sharded_problem import (
    AUTO,
    KINDS,
    NUM_DEVICES,
    PER_DEVICE,
    ROWS,
    errors,
    make_batch,
    make_mesh,
    make_params,
    mean_loss,
    micro_batches,
    put,
    run,
)

import optaccum

N = 3
SIZE = PER_DEVICE // N


def _whole():
    return jax.value_and_grad(mean_loss)(make_params(), make_batch())


def _with_nan(*bad_rows):
    batch = make_batch()
    return batch | {"y": batch["y"].at[jnp.array(bad_rows)].set(jnp.nan)}


def _first_feature(params, batch):
    return mean_loss(params, batch), optaccum.Last(batch["x"][0, 0])


@KINDS
def test_one_device_drops_a_micro_batch(kind):
    bad = PER_DEVICE + 1  # device 1, micro-batch 1
    options = {"skip_nonfinite": True, "return_info": True, "has_aux": True}
    (value, last), grads, info = run(_first_feature, kind, batch=_with_nan(bad), **options)
    kept = [micro_batches(N)[index] for index in micro_batches(N) if index != (1, 1)]
    kept = jax.tree.map(lambda *xs: jnp.concatenate(xs), *kept)
    assert_trees_close((value, grads), jax.value_and_grad(mean_loss)(make_params(), kept), rtol=1e-5, atol=1e-6)
    assert (int(info.num_skipped), float(info.weight)) == (1, ROWS - SIZE)
    assert float(last) == make_batch()["x"][-2 * 2, 0]  # of rows 18 .. 23 the last micro-batch has 20 and 23
    (value, _), grads, _ = run(_first_feature, kind, batch=_with_nan(bad), **options | {"skip_nonfinite": False})
    assert np.isnan(value)
    assert np.isnan(grads["w"]).any()


def test_the_last_device_drops_all():
    batch = _with_nan(*range(ROWS - PER_DEVICE, ROWS))
    options = {"skip_nonfinite": True, "return_info": True, "has_aux": True}
    (value, last), _, info = run(_first_feature, batch=batch, **options)
    assert int(info.num_skipped) == N
    assert float(last) == micro_batches(N)[NUM_DEVICES - 2, N - 1]["x"][0, 0]
    np.testing.assert_allclose(value, errors(make_params(), batch)[: ROWS - PER_DEVICE].mean(), rtol=1e-5)


def test_all_devices_drop_all():
    value, grads, info = run(mean_loss, batch=_with_nan(*range(ROWS)), skip_nonfinite=True, return_info=True)
    assert np.isnan(value)
    assert_trees_equal(grads, jax.tree.map(jnp.zeros_like, make_params()))
    assert (int(info.num_skipped), float(info.weight)) == (N * NUM_DEVICES, 0)


def _masked_loss(params, batch):
    return optaccum.WeightedMean((errors(params, batch) * batch["mask"]).sum(), batch["mask"].sum())


def _noise(gradients, weights):
    """McCandlish et al., appendix A.1, in float64."""
    gradients, weights = np.stack(gradients).astype(np.float64), np.asarray(weights, np.float64)
    gradients, weights = gradients[weights > 0], weights[weights > 0]
    mean = (weights @ gradients) / weights.sum()
    variance = weights @ (gradients**2).sum(1) - weights.sum() * mean @ mean
    variance /= len(weights) - 1
    return mean @ mean - variance / weights.sum(), variance


@pytest.mark.parametrize("weighted", [False, True])
@KINDS
def test_noise_scale(kind, weighted):
    loss_fn = _masked_loss if weighted else mean_loss
    *out, info = run(loss_fn, kind, track_noise_scale=True, return_info=True)
    assert_trees_close(tuple(out), run(loss_fn, kind), rtol=1e-5, atol=1e-6)

    def gradient(batch):
        def loss(params):
            out = loss_fn(params, batch)
            return out.total / jnp.maximum(out.weight, 1) if weighted else out

        return np.concatenate([np.ravel(g) for g in jax.tree.leaves(jax.grad(loss)(make_params()))])

    weight = (lambda batch: float(batch["mask"].sum())) if weighted else lambda batch: batch["x"].shape[0]
    parts = list(micro_batches(N).values())
    expected = _noise([gradient(part) for part in parts], [weight(part) for part in parts])
    np.testing.assert_allclose(info.noise, expected, rtol=1e-4)
    merged = [
        jax.tree.map(lambda *xs: jnp.concatenate(xs), *(micro_batches(N)[d, i] for d in range(NUM_DEVICES)))
        for i in range(N)
    ]
    wrong = _noise([gradient(part) for part in merged], [weight(part) for part in merged])  # k = n
    assert abs(wrong[1] / expected[1] - 1) > 0.1


@pytest.mark.parametrize(("microbatch_size", "n"), [(24, 1), (12, 2), (7, 4), (4, 6)])
def test_microbatch_size_is_global(microbatch_size, n):
    def loss_fn(params, batch):
        return mean_loss(params, batch), optaccum.Sum(1)

    options = {"num_microbatches": None, "microbatch_size": microbatch_size, "has_aux": True}
    (value, count), grads = run(loss_fn, **options)
    assert int(count) == n * NUM_DEVICES
    assert_trees_close((value, grads), _whole(), rtol=1e-5, atol=1e-6)


def _normalized(params, batch, axes=()):
    """A loss with batch statistics, over all devices where the axes are given."""
    error = errors(params, batch)
    center, spread = error.mean(), (error**2).mean()
    center, spread = lax.pmean((center, spread), axes) if axes else (center, spread)
    return ((error - center) ** 2).mean() / spread


@KINDS
@pytest.mark.parametrize("loss_too", [False, True])
def test_batch_statistics_over_devices(kind, loss_too):
    def loss_fn(params, batch):
        loss = _normalized(params, batch, ("data",))
        return lax.pmean(loss, "data") if loss_too else loss

    def expected_loss(params, batch):
        rows = np.arange(ROWS).reshape(NUM_DEVICES, SIZE, N)
        parts = [rows[:, :, i].ravel() for i in range(N)]
        return sum(_normalized(params, {name: x[part] for name, x in batch.items()}) for part in parts) / N

    expected = jax.value_and_grad(expected_loss)(make_params(), make_batch())
    assert_trees_close(run(loss_fn, kind), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError, match="differ beyond"):
        assert_trees_close(run(_normalized, kind), expected, rtol=1e-3)


def test_carry_that_is_the_same_on_all_devices():
    def loss_fn(params, batch, mean):
        return mean_loss(params, batch), (0.5 * mean + lax.pmean(batch["x"].mean(), "data"), ())

    (_, (mean, _)), _ = run(loss_fn, args=(jnp.float32(1),), has_aux=True, carry_argnum=2)
    expected = 1.0
    for i in range(N):
        expected = 0.5 * expected + np.mean([micro_batches(N)[d, i]["x"] for d in range(NUM_DEVICES)])
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_axis_index_and_loops_from_zeros():
    def loss_fn(params, batch):
        def step(total, _):
            return total + errors(params, batch), None

        total, _ = lax.scan(step, jnp.zeros(len(batch["x"])), length=2)
        return total.mean() / 2, optaccum.Stack(lax.axis_index("data"))

    (value, indices), grads = run(loss_fn, has_aux=True)
    assert indices.tolist() == [d for d in range(NUM_DEVICES) for _ in range(N)]
    assert_trees_close((value, grads), _whole(), rtol=1e-5, atol=1e-6)


@jax.custom_vjp
def _record(amax, x):
    """x, and for the gradient of amax the largest |x|."""
    return x


_record.defvjp(lambda amax, x: (x, jnp.abs(x).max()), lambda largest, cotangent: (largest, cotangent))


@KINDS
@pytest.mark.parametrize("in_place", [True, False])
def test_maximum_of_gradient_carried_state(kind, in_place):
    def loss_fn(params, batch):
        x = _record(params["amax"], batch["x"])
        return mean_loss(params["model"], batch | {"x": x})

    mesh, axes = make_mesh(kind)
    model, batch = put(mesh, axes, make_params(), make_batch())
    grad_fn = optaccum.grad(
        loss_fn,
        num_microbatches=N,
        data_axes=axes,
        in_place=in_place,
        grad_reduction_fn=lambda path, leaf: "max" if "amax" in jax.tree_util.keystr(path) else "mean",
    )
    grads = grad_fn({"amax": jnp.float32(0), "model": model}, batch)
    largest = jnp.abs(make_batch()["x"]).max()
    assert_trees_close(grads, {"amax": largest, "model": _whole()[1]}, rtol=1e-5, atol=1e-6)
    assert largest > 1.2 * jnp.abs(make_batch()["x"][:PER_DEVICE]).max()


def _meta_loss(grad_fn, params, batch):
    """The loss after two steps of gradient descent, in an outer scan, and the gradients' own norm."""

    def step(params, _):
        (loss, largest), grads = grad_fn(params, batch)
        norm = sum((g**2).sum() for g in jax.tree.leaves(grads))
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), (loss + largest**2, norm)

    params, outs = lax.scan(step, params, length=2)
    return sum(out.sum() for out in outs) + mean_loss(params, batch)


def _loss_and_max(params, batch, wrap=lambda x: x):
    return mean_loss(params, batch), wrap(errors(params, batch).max())


@KINDS
@pytest.mark.parametrize("in_place", [True, False])
def test_meta_gradient(kind, in_place):
    mesh, axes = make_mesh(kind)
    loss_fn = functools.partial(_loss_and_max, wrap=optaccum.Max)
    options = {"num_microbatches": N, "has_aux": True, "data_axes": axes, "in_place": in_place}
    grad_fn = optaccum.value_and_grad(loss_fn, **options)
    meta = jax.jit(jax.grad(functools.partial(_meta_loss, grad_fn), argnums=(0, 1)))
    whole = jax.value_and_grad(_loss_and_max, has_aux=True)
    expected = jax.grad(functools.partial(_meta_loss, whole), argnums=(0, 1))(make_params(), make_batch())
    out = meta(*put(mesh, axes, make_params(), make_batch()))
    assert_trees_close(out, expected, rtol=1e-3, atol=1e-4)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected[1])) > 1e-2


@pytest.mark.parametrize("layout", ["data", "data and model"])  # 16-bit all-reduces over some axes abort XLA on CPU
@pytest.mark.parametrize("accumulator_dtype", [jnp.float32, None])
def test_bf16_parameters(accumulator_dtype, layout):
    def loss_fn(params, batch):
        h = (batch["x"] @ params["w"]).astype(jnp.bfloat16)
        return mean_loss(params, batch), (optaccum.Max(h.max()), optaccum.Last(h[-1, 0]))

    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
    options = {"accumulator_dtype": accumulator_dtype, "layout": layout, "has_aux": True}
    reduction = {"grad_reduction_fn": lambda path, _: "max" if "scale" in str(path) else "mean"}
    (value, (most, last)), grads = run(loss_fn, AUTO, params=params, **options)
    _, maxima = run(loss_fn, AUTO, params=params, **options, **reduction)
    assert value.dtype == jnp.float32
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected = jax.grad(mean_loss)(wide, make_batch())
    dtype = accumulator_dtype or jnp.bfloat16
    expected = jax.tree.map(lambda x: x.astype(dtype), expected)
    assert_trees_close(grads, expected, rtol=2e-2, atol=3e-2)
    h = (make_batch()["x"] @ params["w"]).astype(jnp.bfloat16)
    assert (most, last) == (h.max(), h[-1, 0])
    assert maxima["scale"].dtype == jnp.bfloat16
    assert (maxima["scale"] >= grads["scale"].astype(jnp.bfloat16)).all()


def test_strict_promotion_finds_no_implicit_cast_in_a_bf16_carry():
    def loss_fn(params, batch, mean):
        return mean_loss(params, batch), (mean + batch["x"].mean().astype(mean.dtype), ())

    with jax.numpy_dtype_promotion("strict"):
        (_, (mean, _)), _ = run(loss_fn, AUTO, args=(jnp.zeros([], jnp.bfloat16),), has_aux=True, carry_argnum=2)
    assert mean.dtype == jnp.bfloat16
    assert float(mean) == pytest.approx(N * float(make_batch()["x"].mean()), abs=0.02)
