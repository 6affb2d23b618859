"""optaccum.nnx with NNX objects beside the model: Rngs, metrics, other models."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optaccum.nnx

X = jax.random.normal(jax.random.key(0), (8, 4))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, rngs):
        return self.dropout(self.linear(x), rngs=rngs)


def make_objects():
    return Model(nnx.Rngs(0)), nnx.Rngs(7), {"teacher": nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(1))}


def loss_fn(model, x, rngs, others, metric):
    h = model(x, rngs)
    metric.update(values=h)
    return jnp.mean((h - others["teacher"](model.linear(x))) ** 2), optaccum.Stack(h)


def states_of(*objects):
    return jax.tree.map(jnp.asarray, [nnx.to_pure_dict(nnx.state(x, nnx.Not(nnx.RngKey))) for x in objects])


def test_every_object_threads_through_the_micro_batches():
    model, rngs, others = make_objects()
    metric = nnx.metrics.Average()
    untouched = states_of(rngs, others["teacher"], metric)
    grad_fn = optaccum.nnx.value_and_grad(loss_fn, num_microbatches=4, has_aux=True)
    (loss, h), grads = grad_fn(model, X, rngs, others, metric=metric)

    by_hand, rngs2, others2 = make_objects()
    metric2 = nnx.metrics.Average()
    plain = nnx.value_and_grad(loss_fn, has_aux=True)
    results = [plain(by_hand, X[i::4], rngs2, others2, metric2) for i in range(4)]
    chex.assert_trees_all_close(loss, sum(loss for (loss, _), _ in results) / 4, rtol=1e-3)
    chex.assert_trees_all_close(h, jnp.stack([aux.value for (_, aux), _ in results]), rtol=1e-6)
    mean = jax.tree.map(lambda *g: sum(g) / 4, *(nnx.to_pure_dict(g) for _, g in results))
    chex.assert_trees_all_close(nnx.to_pure_dict(grads), mean, rtol=1e-2, atol=1e-3)
    assert jax.tree.structure(grads) == jax.tree.structure(results[0][1])
    expected = states_of(rngs2, others2["teacher"], metric2)
    chex.assert_trees_all_close(states_of(rngs, others["teacher"], metric), expected, rtol=1e-5)
    with pytest.raises(AssertionError):  # they did move
        chex.assert_trees_all_close(untouched, expected, rtol=1e-6)
    (_, later), _ = grad_fn(model, X, rngs, others, metric=metric)
    assert ((h == 0) != (later == 0)).any()  # the next call draws other masks


def test_an_object_in_two_places_stays_one():
    def twice(model, x, same):
        same.bias[...] += jnp.ones(3)
        return jnp.mean(model(x)), optaccum.Stack(model.bias[...])

    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    grad_fn = optaccum.nnx.value_and_grad(
        twice, num_microbatches=4, has_aux=True, argnums=nnx.DiffState(0, nnx.PathContains("kernel"))
    )
    (_, biases), grads = grad_fn(model, X, model)
    assert biases[:, 0].tolist() == [1, 2, 3, 4]
    assert model.bias[...].tolist() == [4, 4, 4]
    assert list(grads) == ["kernel"]


def test_frozen_parameters_do_not_cross_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def all_reduces(filter_):
        grad_fn = optaccum.nnx.value_and_grad(
            lambda model, x: jnp.mean(model(x) ** 2),
            argnums=nnx.DiffState(0, filter_),
            num_microbatches=2,
            data_axes="data",
        )
        graphdef, state = nnx.split(model)

        def pure(state, x):
            model = nnx.merge(graphdef, state)
            loss, grads = grad_fn(model, x)
            return loss, grads, nnx.state(model)

        text = jax.jit(pure).lower(state, x).compile().as_text()
        return [line for line in text.splitlines() if " all-reduce(" in line]

    assert not any("f32[4,3]" in line for line in all_reduces(nnx.PathContains("bias")))
    assert any("f32[4,3]" in line for line in all_reduces(nnx.PathContains("kernel")))


@pytest.mark.parametrize(
    "options", [{"key_argnum": 2}, {"batch_argnums": (1, -1)}, {"count_argnum": 2, "presplit": True}]
)
def test_an_object_is_neither_split_nor_folded_nor_a_count(options):
    options = options if "presplit" in options else {"num_microbatches": 2} | options
    grad_fn = optaccum.nnx.value_and_grad(lambda model, x, rngs: 0.0, **options)
    with pytest.raises(TypeError, match=r"argument 2.*thread"):
        grad_fn(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), X, nnx.Rngs(0))


def test_variables_that_come_or_go_are_named():
    def growing(model, x):
        model.extra = nnx.Variable(jnp.zeros(3))
        return jnp.mean(model(x) ** 2)

    with pytest.raises(TypeError, match="adds or removes extra"):
        optaccum.nnx.value_and_grad(growing, num_microbatches=2)(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), X)


@pytest.mark.parametrize("make", [optaccum.value_and_grad, optaccum.microbatched, optaccum.chunked])
def test_the_core_sends_nnx_objects_here(make):
    """There every micro-batch and every call would draw the same numbers."""
    fn = make(lambda w, x, rngs: jnp.mean(w * x), num_microbatches=2)
    for rngs in (nnx.Rngs(0), {"state": [nnx.Variable(jnp.ones(2))]}):
        with pytest.raises(TypeError, match=r"NNX object, \w+.*optaccum\.nnx.*key_argnum"):
            fn(1.0, jnp.ones(4), rngs)
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    grads = optaccum.grad(lambda s, x: jnp.mean(x * s["kernel"][...].sum()), num_microbatches=2)(state, jnp.ones(4))
    assert grads["kernel"][...].tolist() == [[1.0, 1.0], [1.0, 1.0]]  # a State is a pytree like another


@pytest.mark.parametrize("maybe_jit", [jax.jit, lambda step: step])
def test_streaming_sends_nnx_objects_here_too(maybe_jit):
    """There the statistics of a BatchNorm would stay, and every call would draw the same numbers."""
    model, tx = nnx.BatchNorm(4, rngs=nnx.Rngs(0)), optaccum.accumulate(optax.sgd(1.0), 1)
    graphdef, state = nnx.split(model)

    def loss_fn(params, x, *args):
        return jnp.mean((params if isinstance(params, nnx.BatchNorm) else nnx.merge(graphdef, params))(x))

    step = maybe_jit(optaccum.value_and_update(loss_fn, tx))
    for params, args in ((model, ()), (state, (nnx.Rngs(0),))):
        with pytest.raises(TypeError, match=r"NNX object, (BatchNorm|Rngs).*optaccum\.nnx"):
            step(params, tx.init(params), X, *args)
    _, moved, _ = step(state, tx.init(state), X)  # a State is a pytree like another
    assert moved["bias"][...].tolist() == pytest.approx([-1 / 4] * 4)


@pytest.mark.parametrize("matters", [False, True])
def test_verify_takes_a_split_model(matters):
    """Its loss may write to the state that it carries, as it may under value_and_grad."""
    graphdef, params, rest = nnx.split(nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, x, rest):
        model = nnx.merge(graphdef, params, rest)
        loss = jnp.mean(model(x) ** 2)
        model.mean[...] += 1.0 if matters else 0.0
        return loss, (nnx.state(model, nnx.BatchStat), ())

    report = optaccum.verify(loss_fn, params, X, rest, num_microbatches=4, has_aux=True, carry_argnum=2)
    assert report.ok is not matters
