"""optaccum.nnx: what NNX users expect of value_and_grad, one micro-batch at a time."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optaccum
import optaccum.nnx

N = 4


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def loss_fn(model, x):
    h = model(x)
    return jnp.mean(h**2), h


def inputs(rows=16):
    return jax.random.normal(jax.random.key(1), (rows, 3))


def one_after_the_other(n, x):
    """What a loop over micro-batches gives, the model mutated by each call."""
    model = Model(nnx.Rngs(0))
    results = [nnx.value_and_grad(loss_fn, has_aux=True)(model, x[i::n]) for i in range(n)]
    loss = sum(loss for (loss, _), _ in results) / n
    grads = jax.tree.map(lambda *gs: sum(gs) / n, *(grads for _, grads in results))
    return model, loss, grads


def state_of(model):
    return jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat, nnx.RngCount)[0]))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "nnx.jit"])
def test_state_threads_through_the_micro_batches_and_ends_in_the_model(jit):
    x = inputs()
    expected_model, expected_loss, expected_grads = one_after_the_other(N, x)
    model = Model(nnx.Rngs(0))
    untouched = state_of(model)
    grad_fn = optaccum.nnx.value_and_grad(loss_fn, num_microbatches=N, has_aux=True, in_place=jit)
    (loss, h), grads = (nnx.jit(lambda model, x: grad_fn(model, x)) if jit else grad_fn)(model, x)

    chex.assert_trees_all_close(loss, expected_loss, rtol=1e-6)
    chex.assert_trees_all_close(nnx.to_pure_dict(grads), nnx.to_pure_dict(expected_grads), atol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(expected_grads)
    chex.assert_trees_all_close(state_of(model), state_of(expected_model), rtol=1e-6)
    assert int(model.dropout.rngs.count[...]) == N == int(expected_model.dropout.rngs.count[...])
    assert h.shape == (16, 4)
    with pytest.raises(AssertionError):  # the statistics did move, and the whole batch's would be others
        chex.assert_trees_all_close(state_of(model), untouched, rtol=1e-6)
    whole = Model(nnx.Rngs(0))
    nnx.value_and_grad(loss_fn, has_aux=True)(whole, x)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(state_of(model), state_of(whole), rtol=1e-3)


def test_each_micro_batch_draws_its_own_dropout():
    def mask_fn(model, x):
        return jnp.mean(model.linear(x)), optaccum.Stack(model.dropout(jnp.ones(64)))

    grad_fn = optaccum.nnx.value_and_grad(mask_fn, num_microbatches=N, has_aux=True)
    model = Model(nnx.Rngs(0))
    (_, masks), _ = grad_fn(model, inputs())
    (_, later), _ = grad_fn(model, inputs())
    assert len({bytes(memoryview(jax.device_get(m))) for m in [*masks, *later]}) == 2 * N
    (_, again), _ = grad_fn(Model(nnx.Rngs(0)), inputs())
    assert (again == masks).all()


def test_weighted_mean_is_the_whole_batchs():
    def total_and_weight(model, batch):
        return (model.linear(batch["x"]).sum(-1) * batch["mask"]).sum(), batch["mask"].sum()

    batch = {"x": inputs(), "mask": (jnp.arange(16) % 5 < 2).astype(jnp.float32)}
    model = Model(nnx.Rngs(0))
    loss, grads = optaccum.nnx.value_and_grad(
        lambda model, batch: optaccum.WeightedMean(*total_and_weight(model, batch)), num_microbatches=N
    )(model, batch)

    def ratio(model, batch):
        total, weight = total_and_weight(model, batch)
        return total / weight

    expected_loss, expected = nnx.value_and_grad(ratio)(model, batch)
    chex.assert_trees_all_close(loss, expected_loss, rtol=1e-5)
    chex.assert_trees_all_close(nnx.to_pure_dict(grads), nnx.to_pure_dict(expected), rtol=1e-5)
    wrong, _ = optaccum.nnx.value_and_grad(ratio, num_microbatches=N)(model, batch)
    assert abs(wrong - expected_loss) > 1e-3 * abs(expected_loss)


def test_what_the_loss_writes_into_what_is_differentiated_is_not_kept():
    """As `nnx.WeightNorm` writes the kernel that it has normalised."""

    def writing(model, x):
        loss = jnp.mean(model(x) ** 2)
        model.kernel[...] *= 2.0
        return loss

    model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (8, 4))
    kernel = jnp.copy(model.kernel[...])
    expected = nnx.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))(model, x)
    chex.assert_trees_all_close(optaccum.nnx.value_and_grad(writing, num_microbatches=4)(model, x), expected, rtol=1e-5)
    assert (model.kernel[...] == kernel).all()
    nnx.value_and_grad(writing)(model, x)
    assert (model.kernel[...] == 2 * kernel).all()


def test_a_dropped_micro_batch_leaves_the_models_state_alone():
    x = inputs().at[1].set(jnp.nan)  # in micro-batch 1 of 4
    model = Model(nnx.Rngs(0))
    grad_fn = optaccum.nnx.value_and_grad(
        loss_fn, num_microbatches=N, has_aux=True, skip_nonfinite=True, return_info=True
    )
    (loss, _), _, info = grad_fn(model, x)
    assert int(info.num_skipped) == 1
    assert jnp.isfinite(loss)
    assert all(jnp.isfinite(s).all() for s in jax.tree.leaves(state_of(model)))
    poisoned = Model(nnx.Rngs(0))
    optaccum.nnx.value_and_grad(loss_fn, num_microbatches=N, has_aux=True)(poisoned, x)
    assert not all(jnp.isfinite(s).all() for s in jax.tree.leaves(state_of(poisoned)))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_across_devices_counts_advance_and_statistics_are_averaged(axis_type):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    x = inputs()

    def draws_fn(model, x):
        h = model(x)
        return jnp.mean(h**2), optaccum.Stack(model.dropout(jnp.ones(64)))

    with jax.set_mesh(mesh):
        model = Model(nnx.Rngs(0))
        grad_fn = optaccum.nnx.value_and_grad(draws_fn, num_microbatches=2, has_aux=True, data_axes="data")
        (_, masks), _ = nnx.jit(lambda m, x: grad_fn(m, x))(model, jax.device_put(x, NamedSharding(mesh, P("data"))))
        assert int(model.dropout.rngs.count[...]) == 2 * 2  # two draws in each of two micro-batches
        assert len({bytes(memoryview(m)) for m in jax.device_get(masks)}) == 8  # every device its own, in each
        mean = jax.device_get(model.norm.mean[...])
        key = jax.device_get(jax.random.key_data(model.dropout.rngs.key[...]))
    reference = Model(nnx.Rngs(0))
    means = []
    for device in range(4):
        rows = x[4 * device : 4 * device + 4]
        local = Model(nnx.Rngs(0))
        for i in range(2):
            local(rows[i::2])
        means.append(local.norm.mean[...])
    chex.assert_trees_all_close(mean, jnp.mean(jnp.stack(means), 0), atol=1e-6)
    assert not jnp.allclose(means[0], means[1], atol=1e-3)
    assert (key == jax.random.key_data(reference.dropout.rngs.key[...])).all()


def test_the_loss_function_is_traced_for_the_first_call_alone():
    traces = []

    def counted(model, x):
        traces.append(None)
        return loss_fn(model, x)[0]

    grad_fn = optaccum.nnx.value_and_grad(counted, num_microbatches=N)
    model = Model(nnx.Rngs(0))
    grad_fn(model, inputs())
    first = len(traces)
    for _ in range(2):
        grad_fn(model, inputs())
    assert len(traces) == first


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"carry_argnum": 2}, TypeError, "carry"),
        ({}, ValueError, "num_microbatches"),
        ({"has_aux": "yes"}, TypeError, "has_aux to be True or False; got 'yes'"),
    ],
)
def test_mistakes_are_named_where_they_are_made(options, error, match):
    with pytest.raises(error, match=match):
        optaccum.nnx.value_and_grad(loss_fn, **({"num_microbatches": 2} if options else {}), **options)
