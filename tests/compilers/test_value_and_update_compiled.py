"""One micro-step from micro-batch to parameters, as the accelerators' compilers have it."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from programs import CHIPS, SCANNED, aliased_share, batch, layer, loss_fn

import optaccum
from benchmarks.compiled import Program, temp_copies

TX = optaccum.accumulate(optax.adamw(1e-3), 8)


def by_a_gradient(params, state, rows):
    loss, grads = jax.value_and_grad(loss_fn)(params, rows)
    return loss, *optaccum.apply_gradients(TX, grads, state, params)


def uncast_loss(params, rows):
    """`loss_fn` with each layer's parameters behind an operation that rounds nothing."""

    def uncast_layer(x, p):
        return layer(x, jax.tree.map(lambda w: lax.reduce_precision(w, 8, 23), p))

    x, _ = lax.scan(jax.checkpoint(uncast_layer), rows.astype(jnp.bfloat16), params)
    return jnp.mean(x.astype(jnp.float32) ** 2)


def compile_step(step, target):
    args = SCANNED, jax.eval_shape(TX.init, SCANNED), batch(SCANNED)
    compiled = Program(step, args, (0, 1)).compile(target)
    assert aliased_share(compiled, *args[:2]) > 0.999
    return temp_copies(compiled, SCANNED)


@pytest.mark.parametrize("target", CHIPS)
def test_holds_no_gradient(target):
    """On TPU half a copy is the compiler's: all layers cast to bf16 before the loops over them."""
    temp = compile_step(optaccum.value_and_update(loss_fn, TX), target)
    assert temp < {"v5e:1x1": 0.55, "h100:1x1x1": 0.45}[target]
    assert compile_step(by_a_gradient, target) > temp + 0.7


@pytest.mark.parametrize("target", CHIPS)
def test_nor_a_cast_copy_of_all_layers(target):
    """docs/memory.md: what keeps TPU's compiler from making it."""
    step = optaccum.value_and_update(uncast_loss, TX)
    assert compile_step(step, target) < {"v5e:1x1": 0.1, "h100:1x1x1": 0.45}[target]


def test_nor_does_a_window_on_tpu():
    def temp(loss):
        grad_fn = optaccum.value_and_grad(loss, num_microbatches=4)
        return temp_copies(Program(grad_fn, (SCANNED, batch(SCANNED))).compile("v5e:1x1"), SCANNED)

    assert temp(uncast_loss) < 0.05
    assert temp(loss_fn) > 0.2
