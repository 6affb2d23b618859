"""Parameters tied to sums of another dtype, inside whatever the loss hands them to."""

import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import assert_trees_close
from jax import lax

import optaccum


def _layer(h, p):
    return jnp.tanh(h @ p["w"]) + p["b"], None


def _loss(params, rows):
    """One leaf through scans in `jax.checkpoint`, in `jax.jit` and in scans; and as a slice, and twice."""
    h = rows @ params["table"]
    h, _ = lax.scan(jax.checkpoint(_layer), h, params["layers"])
    h, _ = jax.jit(lambda h, p: lax.scan(_layer, h, p, reverse=True))(h, params["layers"])
    h, _ = lax.scan(lambda h, p: lax.scan(_layer, h, p), h, params["blocks"])
    policy = jax.checkpoint_policies.dots_saveable
    h = jax.checkpoint(lambda h, p: lax.scan(_layer, h, p)[0], policy=policy)(h, params["layers"])
    return jnp.mean((h @ params["table"].T).astype(jnp.float32) ** 2) + params["layers"]["w"][0, 0, 0] ** 2


def _params(dtype):
    def leaf(seed, *shape):
        return (jax.random.normal(jax.random.key(seed), shape) / 3).astype(dtype)

    return {
        "table": leaf(0, 8, 16),
        "layers": {"w": leaf(1, 3, 16, 16), "b": leaf(2, 3, 16)},
        "blocks": {"w": leaf(3, 2, 3, 16, 16), "b": leaf(4, 2, 3, 16)},
    }


def test_16_bit_parameters_in_place():
    rows = jax.random.normal(jax.random.key(5), (16, 8), jnp.bfloat16)
    params = _params(jnp.bfloat16)
    in_place = optaccum.grad(_loss, num_microbatches=4, in_place=True)(params, rows)
    carried = optaccum.grad(_loss, num_microbatches=4, in_place=False)(params, rows)
    assert_trees_close(in_place, carried, rtol=2e-2, atol=2e-3)
    assert {x.dtype for x in jax.tree.leaves(in_place)} == {jnp.dtype(jnp.float32)}
    # What is tied inside a scan is rounded once a layer, and sums across uses in float32.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    assert_trees_close(in_place, jax.grad(_loss)(wide, rows.astype(jnp.float32)), rtol=0.1, atol=2e-2)


def test_16_bit_parameters_in_place_need_no_second_buffer():
    def loss(params, rows):
        h, _ = lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), rows, params)
        return jnp.mean(h.astype(jnp.float32) ** 2)

    params = jax.ShapeDtypeStruct((16, 256, 256), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)

    def temp(**options):
        fn = jax.jit(optaccum.grad(loss, num_microbatches=4, **options))
        return fn.lower(params, rows).compile().memory_analysis().temp_size_in_bytes

    size = 4 * 16 * 256**2
    assert temp(in_place=False) > 0.5 * size
    assert temp(in_place=True) < temp(in_place=False) - size / 4


def _twice(h, a, b):
    return lax.scan(lambda h, ws: (jnp.tanh(h @ ws[0] + 0.3 * h @ ws[1].T), None), h, (a, b))[0]


def _in_turn(h, a, b):
    for weights in (a, b):
        h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, weights)[0]
    return h


CALLED = {
    "scan": _twice,
    "scan in jit": jax.jit(_twice),
    "scan in checkpoint": jax.checkpoint(_twice),
    "jit": jax.jit(_in_turn),
    "cond": lambda h, a, b: lax.cond(h.sum() > -1e9, _in_turn, lambda h, a, b: h, h, a, b),
    "scan in a scan": lambda h, a, b: lax.scan(lambda h, _: (_twice(h, a, b), None), h, length=2)[0],
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CALLED)
def test_what_is_called_may_have_one_parameter_twice(name, dtype):
    """Of which JAX 0.10, by references, keeps the gradient of one use alone, without an error."""

    def loss_fn(w, rows):
        return jnp.mean(CALLED[name](rows.astype(w.dtype), w, w).astype(jnp.float32) ** 2)

    w = (jax.random.normal(jax.random.key(0), (4, 3, 3)) / 2).astype(dtype)
    rows = jax.random.normal(jax.random.key(1), (6, 3))
    expected = jax.grad(loss_fn)(w.astype(jnp.float32), rows)
    tx = optaccum.accumulate(optax.identity(), None)
    step = jax.jit(optaccum.value_and_update(loss_fn, tx))
    _, _, state = step(w, tx.init(w), rows, emit=False)
    of_one_use = jax.grad(lambda w: jnp.mean(CALLED[name](rows, w, lax.stop_gradient(w)) ** 2))(w.astype(jnp.float32))

    def distance(x):
        return jnp.linalg.norm(x - expected) / jnp.linalg.norm(expected)

    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    assert distance(optaccum.grad(loss_fn, num_microbatches=2)(w, rows)) < tolerance
    assert distance(state.grad_sum) < tolerance
    assert distance(of_one_use) > 0.2
