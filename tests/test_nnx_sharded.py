"""optaccum.nnx with parameters sharded over the data axis: gathered once, gradients scattered once."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from sharded_problem import KINDS, make_mesh

import optaccum
import optaccum.nnx

WIDTH, HIDDEN = 8, 16


def make_model():
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(WIDTH, momentum=0.5, rngs=rngs)
    return nnx.Sequential(norm, nnx.Linear(WIDTH, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, WIDTH, rngs=rngs))


def loss_fn(model, x):
    norm, *layers = model.layers
    norm(x)  # its statistics alone, for a whole batch's are not the micro-batches'
    for layer in layers:
        x = jnp.tanh(layer(x))
    return jnp.mean((x - 1) ** 2)


@KINDS
@pytest.mark.parametrize("sharded", [True, False])
def test_param_specs(kind, sharded):
    x = jax.random.normal(jax.random.key(1), (32, WIDTH))
    expected_loss, expected = nnx.value_and_grad(loss_fn)(make_model(), x)
    mesh, axis = make_mesh(kind)
    model = make_model()
    params = nnx.state(model, nnx.Param)
    specs = jax.tree.map(lambda p: P(None, axis) if p.ndim == 2 and sharded else P(), params)
    with jax.set_mesh(mesh):
        nnx.update(model, jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), params, specs))
        rows = jax.device_put(x, NamedSharding(mesh, P(axis)))
        grad_fn = optaccum.nnx.value_and_grad(
            loss_fn, num_microbatches=4, data_axes=axis, param_specs=specs if sharded else P()
        )
        graphdef, state = nnx.split(model)
        pure = jax.jit(lambda state, rows: grad_fn(nnx.merge(graphdef, state), rows))
        counts = optaccum.count_collectives(pure.lower(state, rows).compile())
        loss, grads = nnx.jit(lambda model, rows: grad_fn(model, rows))(model, rows)
    chex.assert_trees_all_close(jax.device_get(loss), expected_loss, rtol=1e-6)
    numbers, expected = (nnx.to_pure_dict(jax.device_get(g)) for g in (grads, expected))
    chex.assert_trees_all_close(numbers, expected, atol=1e-6)
    assert not counts.in_loops
    scattered = {"all-gather": 2, "reduce-scatter": 2} if sharded else {}
    assert dict(counts.outside) == scattered | {"all-reduce": counts.outside["all-reduce"]}
    for path, grad in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(grads)):
        spec = P(None, axis) if grad.ndim == 2 and sharded else P()
        assert grad.sharding.is_equivalent_to(NamedSharding(mesh, spec), grad.ndim), path
    statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))["layers"][0]
    assert not jnp.allclose(statistics["mean"], 0)  # the state beside them threads as ever
