"""`microbatched` over devices: parameters sharded, gradients as `value_and_grad` leaves them."""

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_trees_close, assert_trees_equal
from jax.sharding import NamedSharding, PartitionSpec as P
from sharded_problem import AUTO, EXPLICIT, KINDS
from test_sharded import (
    CASES,
    ONE_AXIS,
    ROWS,
    SPECS,
    assert_sharded_alike,
    expected,
    loss_fn,
    make_batch,
    make_params,
    place,
    whole,
)

import optaccum


def value_and_grad(axes, **options):
    options = {"num_microbatches": 3, "has_aux": True, "data_axes": axes, **options}
    return jax.jit(jax.value_and_grad(optaccum.microbatched(loss_fn, **options), has_aux=True))


@pytest.mark.parametrize("shard_sums", [False, True])
@pytest.mark.parametrize(
    "case", ["stacked layers-Explicit", "beside a tensor axis-Auto", "two data axes-Auto", "model first"]
)
def test_whole_batch(case, shard_sums):
    kind, where = CASES[case]
    _, axes, params, batch = place(kind, where)
    specs = where[1] if kind == AUTO else None  # an Explicit mesh shows them
    out = value_and_grad(axes, param_specs=specs, shard_sums=shard_sums)(params, batch)
    assert_trees_close(out, expected(), rtol=3e-6, atol=3e-6)
    assert_sharded_alike(out[1], params)
    half = jax.tree.map(lambda x: x[: ROWS // 2], make_batch())  # half of the devices
    with pytest.raises(AssertionError, match="differ beyond"):
        assert_trees_close(out, expected(batch=half), rtol=1e-2)


def collectives(fn, *args):
    counts = optaccum.count_collectives(fn.lower(*args).compile())
    return dict(counts.in_loops), dict(counts.outside)


@KINDS
def test_parameters_cross_once_and_gradients_leave_as_the_parameters_lie(kind):
    mesh, axes, params, batch = place(kind, SPECS["one axis"])
    given = value_and_grad(axes, param_specs=ONE_AXIS)
    assert collectives(given, params, batch) == ({}, {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 2})
    alone = jax.jit(
        optaccum.microbatched(loss_fn, num_microbatches=3, has_aux=True, data_axes=axes, param_specs=ONE_AXIS)
    )
    assert collectives(alone, params, batch)[1].keys() == {"all-gather", "all-reduce"}  # no gradient is made
    replicated = jax.device_put(make_params(), NamedSharding(mesh, P()))
    zero_1 = value_and_grad(axes, grad_specs=ONE_AXIS)
    if kind == EXPLICIT:
        with pytest.raises(ValueError, match="expected no grad_specs on a mesh with Explicit axes"):
            zero_1(replicated, batch)
        return
    assert collectives(zero_1, replicated, batch) == ({}, {"reduce-scatter": 2, "all-reduce": 2})
    assert_sharded_alike(zero_1(replicated, batch)[1], params)
    shown = value_and_grad(axes)  # nothing shows in `jax.grad` on an Auto mesh
    assert all(g.sharding.is_fully_replicated for g in jax.tree.leaves(shown(params, batch)[1]))


def test_gather_dtype_rounds_the_parameters_and_no_gradient():
    """1 + 255 times 2^-8, each exact in bf16, their sum not."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    x = jax.device_put(jnp.full((2048, 1), 2.0**-8).at[:8].set(1.0), NamedSharding(mesh, P("data")))
    w = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))
    seen = []

    def loss(w, x, scale):
        seen.append((w.dtype, scale.dtype))
        h, _ = jax.lax.scan(lambda h, w: (h + w.astype(jnp.float32) * x.sum(), None), 0.0, w)
        return optaccum.WeightedMean(h * scale, 1 / 2048)

    options = {
        "microbatch_size": 8,
        "data_axes": "data",
        "param_specs": P("data"),
        "gather_dtype": jnp.bfloat16,
    }
    for form in ({}, {"shard_sums": True}):
        grads = jax.grad(optaccum.microbatched(loss, **options, **form))(w, x, 1.0)
        assert_trees_equal(grads, jnp.full(8, (8 + 2040 * 2.0**-8) * 1.0))
        assert grads.sharding.spec == P("data")
    assert set(seen) == {(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))}  # the parameters alone
    narrow = jax.grad(
        optaccum.microbatched(loss, microbatch_size=8, data_axes="data", accumulator_dtype=jnp.bfloat16, in_place=False)
    )(w.astype(jnp.bfloat16), x, 1.0)
    assert float(narrow[0]) != float(grads[0])


def test_rows_closures_and_second_order():
    _, axes, params, batch = place(AUTO, SPECS["one axis"])

    def accumulated(scale):
        def loss(params, batch):
            terms, aux = loss_fn(params, batch)
            terms = {name: optaccum.WeightedMean(t.total * scale, t.weight) for name, t in terms.items()}
            return terms, aux

        options = {"num_microbatches": 3, "has_aux": True, "data_axes": axes, "param_specs": ONE_AXIS}
        return optaccum.microbatched(loss, **options)

    def at_once(scale):
        return lambda params, batch: (whole(params, batch)[0] * scale, ())

    def gradients(loss_of, params, batch):
        def value(params, y, scale):
            return loss_of(scale)(params, batch | {"y": y})[0]

        def sq_norm(params):
            grads = jax.grad(value)(params, batch["y"], 1.5)
            return sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads))

        def both(params):
            return jax.grad(value, (0, 1, 2))(params, batch["y"], 1.5), jax.grad(sq_norm)(params)

        return jax.jit(both)(params)

    first, second = gradients(accumulated, params, batch)
    first_whole, second_whole = gradients(at_once, make_params(), make_batch())
    assert_trees_close(first, first_whole, rtol=3e-6, atol=1e-5)
    assert_trees_close(second, second_whole, rtol=1e-4, atol=1e-3)
    with pytest.raises(AssertionError, match="differ beyond"):
        assert_trees_close(first, jax.tree.map(lambda x: 1.01 * x, first_whole), rtol=1e-3)


@KINDS
@pytest.mark.parametrize("rows", [P(), P("model"), P(("data", "model"))], ids=str)
def test_the_gradient_of_rows_lies_as_they_do(kind, rows):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    loss = optaccum.microbatched(lambda w, x: jnp.mean((w * x) ** 2), num_microbatches=2, data_axes="data")
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, rows))
    with jax.set_mesh(mesh):
        grads = jax.jit(jax.grad(loss, (0, 1)))(jnp.float32(3), x)
    assert_trees_close(grads, (jnp.float32(105), 9 / 4 * jnp.arange(8.0)), rtol=1e-6)
    if kind == EXPLICIT:
        assert jax.typeof(grads[1]) == jax.typeof(x)
    with pytest.raises(AssertionError, match="differ beyond"):
        assert_trees_close(grads, (jnp.float32(105), 9 / 4 * jnp.arange(8.0)[::-1]), rtol=1e-2)


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_someones_own_shard_map(check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    w, x = jnp.arange(4.0) / 4, jax.random.normal(jax.random.key(0), (ROWS, 4))

    def loss(w, x):
        return jnp.mean((x @ w) ** 2)

    def on_each_device(w, x):
        own = optaccum.microbatched(loss, num_microbatches=3)
        if not check_vma:
            return jax.lax.pmean(jax.grad(own)(w, x), "data")
        return jax.grad(lambda w: jax.lax.pmean(own(w, x), "data"))(w)

    mapped = jax.jit(
        jax.shard_map(on_each_device, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma)
    )
    assert_trees_close(mapped(w, x), jax.grad(loss)(w, x), rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_trees_close(mapped(w, x), jax.grad(loss)(w, x[:6]), rtol=1e-2)
    counts = optaccum.count_collectives(mapped.lower(w, x).compile())
    assert not counts.in_loops
