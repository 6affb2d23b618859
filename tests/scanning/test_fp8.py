"""FP8 with Flax: the state that gradients carry takes the maximum over micro-batches, and training goes on."""

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_trees_close, assert_trees_equal
from flax import linen as nn
from flax.linen import fp8_ops

import optaccum

pytestmark = pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp is deprecated:DeprecationWarning")
STATE = fp8_ops.OVERWRITE_WITH_GRADIENT


def reduction(path, leaf):
    return "max" if path[0].key == STATE else "mean"


@pytest.mark.parametrize("op", [fp8_ops.Fp8DotGeneralOp, fp8_ops.Fp8DirectDotGeneralOp])
def test_amax_histories_take_the_maximum(op):
    model = nn.Dense(4, dot_general_cls=op)
    rows = jax.random.normal(jax.random.key(0), (6, 8)).at[1, 0].set(40.0)  # in micro-batch 1 of 3
    variables = jax.jit(model.init)(jax.random.key(1), rows)

    def loss_fn(variables, rows):
        return jnp.mean(model.apply(variables, rows) ** 2)

    def grads(in_place, grad_reduction_fn=reduction):
        options = {"num_microbatches": 3, "grad_reduction_fn": grad_reduction_fn, "in_place": in_place}
        return optaccum.grad(loss_fn, **options)(variables, rows)

    actual = grads(True)
    assert_trees_close(actual, grads(False), rtol=1e-5)
    each = [jax.jit(jax.grad(loss_fn))(variables, rows[i::3])[STATE] for i in range(3)]
    assert_trees_equal(actual[STATE], jax.tree.map(lambda *xs: jnp.stack(xs).max(0), *each))
    assert max(float(x.max()) for x in jax.tree.leaves(actual[STATE])) >= 40
    with pytest.raises(AssertionError):
        assert_trees_close(grads(True, None)[STATE], actual[STATE], rtol=1e-2)


def test_it_trains():
    model = nn.Dense(1, dot_general_cls=fp8_ops.Fp8DotGeneralOp)
    rows = jax.random.normal(jax.random.key(0), (32, 8))
    targets = rows @ jnp.linspace(-1, 1, 8)[:, None]
    variables = jax.jit(model.init)(jax.random.key(1), rows)

    def loss_fn(variables, batch):
        return jnp.mean((model.apply(variables, batch[0]) - batch[1]) ** 2)

    grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=4, grad_reduction_fn=reduction)

    @jax.jit
    def step(variables):
        value, grads = grad_fn(variables, (rows, targets))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads["params"])
        return {"params": params, STATE: grads[STATE]}, value

    values = []
    for _ in range(30):
        variables, value = step(variables)
        values.append(float(value))
    assert values[-1] < 0.05 * values[0]
