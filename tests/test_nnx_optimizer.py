"""optaccum.nnx.apply_gradients: nnx.Optimizer.update for a micro-step, and in place."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal
from flax import nnx

import optaccum
import optaccum.nnx

X = jax.random.normal(jax.random.key(0), (16, 4))


class MLP(nnx.Module):
    def __init__(self, width, depth, rngs):
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(depth)])
        self.calls = nnx.Variable(jnp.int32(0))

    def __call__(self, x):
        self.calls[...] += 1
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def loss_fn(model, x):
    return jnp.mean((model(x) - 1) ** 2)


def update(optimizer, model, grads, **kwargs):
    optimizer.update(model, grads, **kwargs)


def trained(tx, apply_fn, weights=(None,) * 4, wrt=nnx.Param):
    """The states of model and optimizer after each micro-step."""
    model = MLP(4, 2, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer, x, weight):
        grads = nnx.grad(loss_fn)(model, x)
        apply_fn(optimizer, model, grads, **({} if weight is None else {"weight": weight}))

    states = []
    for i, weight in enumerate(weights):
        step(model, optimizer, X[i::4], weight)
        states.append(jax.tree.map(jnp.copy, nnx.state((model, optimizer))))
    return states


TRANSFORMATIONS = {
    "accumulate": lambda: optaccum.accumulate(optax.adam(1e-2), 2),
    "in a chain": lambda: optax.chain(optax.clip_by_global_norm(0.1), optaccum.accumulate(optax.adam(1e-2), 2)),
    "none": lambda: optax.adamw(1e-2),
}


@pytest.mark.parametrize("wrt", [nnx.Param, nnx.PathContains("kernel")], ids=["Param", "kernel"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_does_what_update_does(name, wrt):
    tx = TRANSFORMATIONS[name]()
    actual = trained(tx, optaccum.nnx.apply_gradients, wrt=wrt)
    assert_trees_close(actual, trained(tx, update, wrt=wrt))
    kernels = [state[0]["layers"][0]["kernel"][...] for state in actual]
    moved = [not (new == old).all() for old, new in itertools.pairwise(kernels)]
    assert moved == ([True] * 3 if name == "none" else [True, False, True])
    assert [int(state[1]["step"][...]) for state in actual] == [1, 2, 3, 4]
    biases = [state[0]["layers"][0]["bias"][...] for state in actual]
    assert (biases[0] != biases[-1]).any() == (wrt is nnx.Param)


@pytest.mark.parametrize("name", ["accumulate", "in a chain"])
def test_weights_reach_the_window(name):
    weights = [1.0, 3.0, 2.0, 0.0]
    tx = TRANSFORMATIONS[name]()
    weighted = trained(tx, optaccum.nnx.apply_gradients, weights)
    assert_trees_close(weighted, trained(tx, update, weights))
    with pytest.raises(AssertionError):
        assert_trees_close(weighted, trained(tx, optaccum.nnx.apply_gradients), rtol=1e-3)


def test_arguments_are_handed_on_only_if_given():
    seen = []

    def note(updates, state, params=None, **extra_args):
        seen.append({name: float(x) for name, x in extra_args.items()})
        return updates, state

    model = MLP(4, 1, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.GradientTransformationExtraArgs(lambda params: (), note), wrt=nnx.Param)
    grads = nnx.grad(loss_fn)(model, X)
    optaccum.nnx.apply_gradients(optimizer, model, grads, value=nnx.Variable(jnp.float32(2)))
    assert seen == [{"value": 2.0}]


def test_emit_ends_a_window():
    model = MLP(4, 1, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optaccum.accumulate(optax.sgd(0.1), None), wrt=nnx.Param)
    grads = nnx.grad(loss_fn)(model, X)
    before = jnp.copy(model.layers[0].kernel[...])
    for emit in (False, True):
        optaccum.nnx.apply_gradients(optimizer, model, grads, denominator=2.0, emit=emit)
        assert bool(optaccum.has_updated(optimizer.opt_state)) == emit
        assert (model.layers[0].kernel[...] != before).any() == emit
    expected = before - 0.1 * 2 * grads["layers"][0]["kernel"][...] / 4
    assert_trees_close(model.layers[0].kernel[...], expected)


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


@pytest.mark.parametrize("argnums", [0, nnx.DiffState(0, nnx.LoRAParam)], ids=["all", "LoRA"])
def test_lora_parameters_alone(argnums):
    model = Adapted(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optaccum.accumulate(optax.sgd(0.1), 2), wrt=nnx.LoRAParam)
    grad_fn = optaccum.nnx.value_and_grad(loss_fn, argnums=argnums, num_microbatches=2)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, x):
        _, grads = grad_fn(model, x)
        optaccum.nnx.apply_gradients(optimizer, model, grads)

    before = jax.tree.map(jnp.copy, nnx.state(model))
    for i in range(2):
        step(model, optimizer, X[i::2])
    after = nnx.state(model)
    expected = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(Adapted(nnx.Rngs(0)), X)
    lora_before, frozen_before = nnx.split_state(before, nnx.LoRAParam, ...)
    lora_after, frozen_after = nnx.split_state(after, nnx.LoRAParam, ...)
    assert_trees_equal(frozen_after, frozen_before)
    assert_trees_close(
        jax.tree.map(lambda new, old: (old - new) / 0.1, lora_after, lora_before),
        expected,
        rtol=1e-4,
        atol=1e-6,
    )
    assert {leaf.shape for leaf in jax.tree.leaves(optimizer.opt_state.grad_sum)} == {(4, 2), (2, 4)}


def copies_of_the_parameters(apply_fn, jit):
    """Scratch memory of a compiled step, in copies of the parameters."""
    model = MLP(256, 12, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optaccum.accumulate(optax.adamw(1e-2), 4), wrt=nnx.Param)

    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(loss_fn)(model, x)
        apply_fn(optimizer, model, grads)
        return loss

    def pure_step(state, x):
        model, optimizer = nnx.merge(graphdef, state)
        loss = step(model, optimizer, x)
        return nnx.state((model, optimizer)), loss

    x = jnp.zeros((2, 256))
    if jit == "nnx.jit":
        compiled = nnx.jit(step, donate_argnums=(0, 1)).lower(model, optimizer, x).compile().compiled
    else:
        graphdef, state = nnx.split((model, optimizer))
        compiled = jax.jit(pure_step, donate_argnums=0).lower(state, x).compile()
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return compiled.memory_analysis().temp_size_in_bytes / num_bytes


@pytest.mark.parametrize("jit", ["nnx.jit", "jax.jit"])
def test_works_in_place(jit):
    # The backward pass itself takes a layer's gradient, a twelfth.
    assert copies_of_the_parameters(optaccum.nnx.apply_gradients, jit) < 0.15
    assert copies_of_the_parameters(update, jit) > 1
