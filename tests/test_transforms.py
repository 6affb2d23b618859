"""Streaming and scanning under JAX's transformations, against the mean by hand."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import assert_trees_close
from jax import lax
from jax.sharding import PartitionSpec as P
from small_problem import BATCH, CALLS, PARAMS, ROWS, K, N, loss_fn, optimizer

import optaccum


def test_loss(params):
    return loss_fn(params, jax.tree.map(lambda x: -x[::-1], BATCH))


test_loss.__test__ = False


def by_hand(learning_rate, scale, num_calls=4):
    """The test loss after training with one update for every K calls, on all of their rows at once."""
    inner, params = optimizer(learning_rate), PARAMS
    state = inner.init(params)
    for i in range(0, num_calls - num_calls % K, K):
        batch = jax.tree.map(lambda x, i=i: jnp.concatenate(x[i : i + K]), CALLS)
        grads = jax.tree.map(lambda g: scale * g, jax.grad(loss_fn)(params, batch))
        updates, state = inner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return test_loss(params)


def accumulated(learning_rate, scale, num_calls=4, *, scanned=True, in_place=True, step=optaccum.apply_gradients):
    """The same through windows of K micro-steps, each scanned over N micro-batches, in an outer scan."""
    tx = optaccum.accumulate(optimizer(learning_rate), K)
    grad_fn = optaccum.grad(loss_fn, num_microbatches=N, in_place=in_place) if scanned else jax.grad(loss_fn)

    def call(carry, batch):
        params, state = carry
        grads = jax.tree.map(lambda g: scale * g, grad_fn(params, batch))
        return step(tx, grads, state, params), None

    calls = jax.tree.map(lambda x: x[:num_calls], CALLS)
    (params, _), _ = lax.scan(call, (PARAMS, tx.init(PARAMS)), calls)
    return test_loss(params)


def update_and_apply(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


# Derivatives.


@pytest.mark.parametrize(
    ("num_calls", "jit", "derivative", "options"),
    [
        (4, True, jax.grad, {"scanned": False}),
        (3, True, jax.grad, {"step": update_and_apply}),  # the last window is open
        (3, False, jax.jacfwd, {"step": update_and_apply, "scanned": False}),
        (4, True, jax.grad, {}),
        (4, False, jax.grad, {}),
    ],
    ids=["streaming", "open window", "open window forward", "both", "both eager"],
)
def test_meta_gradients_in_an_outer_scan(num_calls, jit, derivative, options):
    meta = derivative(functools.partial(accumulated, num_calls=num_calls, **options), (0, 1))
    actual = (jax.jit(meta) if jit else meta)(0.1, 0.7)
    expected = jax.jit(jax.grad(functools.partial(by_hand, num_calls=num_calls), (0, 1)))
    assert_trees_close(actual, expected(0.1, 0.7), rtol=1e-4)
    with pytest.raises(AssertionError):
        assert_trees_close(actual, expected(0.1, 0.71), rtol=1e-4)


def test_forward_over_reverse_through_both():
    actual = jax.jit(jax.hessian(functools.partial(accumulated, in_place=False), (0, 1)))(0.1, 0.7)
    expected = jax.jit(jax.hessian(by_hand, (0, 1)))
    assert_trees_close(actual, expected(0.1, 0.7), rtol=1e-3)
    with pytest.raises(AssertionError):
        assert_trees_close(actual, expected(0.1, 0.75), rtol=1e-3)


def test_a_gradient_of_a_loss_that_takes_accumulated_gradients():
    support = jax.tree.map(lambda x: x[1], CALLS)

    def adapted_loss(params, batch, *, grad_fn, rate=0.5):
        adapted = jax.tree.map(lambda p, g: p - rate * g, params, grad_fn(params, support))
        return loss_fn(adapted, batch)

    inner = optaccum.grad(loss_fn, num_microbatches=2)
    outer = optaccum.value_and_grad(functools.partial(adapted_loss, grad_fn=inner), num_microbatches=N)
    actual = jax.jit(outer)(PARAMS, BATCH)
    whole = functools.partial(adapted_loss, grad_fn=jax.grad(loss_fn))
    assert_trees_close(actual, jax.value_and_grad(whole)(PARAMS, BATCH), rtol=1e-4)
    with pytest.raises(AssertionError):
        assert_trees_close(actual, jax.value_and_grad(loss_fn)(PARAMS, BATCH), rtol=1e-4)


def test_checkpoint_around_value_and_grad():
    grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=N)

    def meta(remat, params):
        value, grads = remat(grad_fn)(params, BATCH)
        return value + optax.tree.norm(grads, squared=True)

    with_checkpoint = jax.grad(functools.partial(meta, jax.checkpoint))
    without = jax.grad(functools.partial(meta, lambda fn: fn))
    assert_trees_close(jax.jit(with_checkpoint)(PARAMS), without(PARAMS), rtol=1e-5)
    texts = [str(jax.make_jaxpr(fn)(PARAMS)) for fn in (with_checkpoint, without)]
    assert [("checkpoint" in text or "remat" in text) for text in texts] == [True, False]


# Many at once.


@pytest.mark.parametrize("step", [optaccum.apply_gradients, update_and_apply])
def test_an_ensemble_at_different_steps_of_a_schedule_that_skips_differently(step):
    tx = optaccum.accumulate(optax.adam(0.1), lambda step: 1 + step // 2, should_skip_update_fn=optax.skip_not_finite)
    grads = jnp.arange(1.0, 31.0).reshape(3, 5, 2).at[1, 0, 1].set(jnp.nan).at[2, 3, 0].set(jnp.inf)

    def member(start, grads):
        params = jnp.ones(2)
        state = tx.init(params)._replace(gradient_step=start)

        def call(carry, g):
            params, state = step(tx, g, carry[1], carry[0])
            return (params, state), (state.has_updated, state.num_skipped)

        return lax.scan(call, (params, state), grads)

    starts = jnp.array([0, 2, 4])
    together = jax.jit(jax.vmap(member))(starts, grads)
    alone = jax.jit(member)
    assert_trees_close(together, jax.tree.map(lambda *m: jnp.stack(m), *(alone(starts[i], grads[i]) for i in range(3))))
    emitted, skipped = together[1]
    assert emitted.astype(int).tolist() == [[1, 1, 0, 1, 0], [0, 0, 1, 0, 1], [0, 0, 1, 0, 0]]
    assert skipped[:, -1].tolist() == [0, 1, 1]


def test_shard_map_around_accumulate():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optaccum.accumulate(optimizer(0.1), K, track_noise_scale=True)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), CALLS)
    mask = jnp.arange(4 * ROWS) % 5 != 0
    mask = mask.at[: 2 * ROWS].set(jnp.arange(2 * ROWS) < 3).astype(jnp.float32)  # uneven over the devices

    def train(rows, mask, reduce):
        params, state = PARAMS, tx.init(PARAMS)
        batches = jax.tree.map(lambda x: x.reshape(K, -1, *x.shape[1:]), (rows, mask))

        def call(carry, batch):
            params, state = carry
            data, mask = batch

            def total(params):
                errors = jnp.tanh(data["x"] @ params["w"] + params["b"]) - data["y"]
                return (mask * errors**2).sum()

            grads, weight = reduce(jax.grad(total)(params), mask.sum())
            return optaccum.apply_gradients(tx, grads, state, params, denominator=weight), None

        return lax.scan(call, (params, state), batches)[0][0]

    def sharded(reduce):
        fn = functools.partial(train, reduce=reduce)
        return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False))

    def by_device(x):  # micro-step i has the i-th half of each device's rows
        return x.reshape(2, K, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    expected = train(*jax.tree.map(by_device, (rows, mask)), lambda g, w: (g, w))
    actual = sharded(lambda g, w: lax.psum((g, w), "data"))(rows, mask)
    assert_trees_close(actual, expected, rtol=1e-5)
    own = sharded(lambda g, w: (lax.pmean(jax.tree.map(lambda g: g / jnp.maximum(w, 1), g), "data"), 1.0))
    with pytest.raises(AssertionError):  # the mean of each device's own mean
        assert_trees_close(own(rows, mask), expected, rtol=1e-5)
