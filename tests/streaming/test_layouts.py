"""Streaming on meshes: what is kept keeps its sharding, whatever comes; an emit gathers nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal
from jax.sharding import AxisType

import optaccum
from optaccum._dtypes import keep_sharding

PARAMS = {"w": jnp.arange(32.0).reshape(8, 4), "b": jnp.ones(3)}
GRADS = [jax.tree.map(lambda p, i=i: (p - i) / 8, PARAMS) for i in range(3)]
EVERYWHERE, SHARDED = jax.P(), jax.P("data")
LAYOUTS = {  # of the parameters, of the gradients, of the state
    "ZeRO-1": (EVERYWHERE, EVERYWHERE, SHARDED),
    "FSDP, gradients everywhere": (SHARDED, EVERYWHERE, SHARDED),
    "FSDP": (SHARDED, SHARDED, SHARDED),
    "gradients sharded": (EVERYWHERE, SHARDED, EVERYWHERE),
}


def put(mesh, tree, spec):
    """The leaves whose rows divide over the devices so, the others everywhere."""

    def place(x):
        divides = x.ndim > 1 and x.shape[0] % 8 == 0
        return jax.device_put(x, jax.NamedSharding(mesh, spec if divides else EVERYWHERE))

    return jax.tree.map(place, tree)


def layout(tree):
    return [(*x.sharding.spec, None, None)[: x.ndim] for x in jax.tree.leaves(tree) if x.ndim > 1]


@functools.cache
def tx_of(skip):
    return optaccum.accumulate(optax.adamw(0.1), 2, should_skip_update_fn=optax.skip_not_finite if skip else None)


def three_calls(tx, params, state, grads, *, in_one, jit=jax.jit):
    """Of which one ends a window; then a flush."""

    @jit
    def step(params, state, grads):
        if in_one:
            return optaccum.apply_gradients(tx, grads, state, params, weight=2.0)
        updates, state = tx.update(grads, state, params, weight=2.0)
        return jax.tree.map(lambda p, u: keep_sharding(p + u, p), params, updates), state

    for g in grads:
        params, state = step(params, state, g)
    updates, state = jit(functools.partial(optaccum.flush, tx))(state, params)
    return params, state, updates


@pytest.mark.parametrize(
    ("name", "in_one"),
    [(name, name != "FSDP") for name in LAYOUTS] + [("FSDP, gradients everywhere", False)],
)
def test_on_an_explicit_mesh_what_is_kept_keeps_its_layout(name, in_one):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    tx = tx_of(skip=in_one)
    expected = three_calls(tx, PARAMS, tx.init(PARAMS), GRADS, in_one=in_one)
    of_params, of_grads, of_state = LAYOUTS[name]
    with jax.set_mesh(mesh):
        params, state = put(mesh, PARAMS, of_params), put(mesh, tx.init(PARAMS), of_state)
        grads = put(mesh, GRADS, of_grads)
        for jit in [jax.jit, lambda fn: fn] if name == "ZeRO-1" else [jax.jit]:
            new_params, new_state, updates = three_calls(tx, params, state, grads, in_one=in_one, jit=jit)
            assert layout((new_params, new_state)) == layout((params, state))
            assert_trees_close((new_params, new_state, updates), expected, rtol=1e-5)
    assert "data" in str(layout((params, state, grads)))  # the layouts do differ
    with pytest.raises(AssertionError):
        assert_trees_equal(new_params["w"], PARAMS["w"])


@pytest.mark.parametrize("in_one", [False, True])
def test_axes_of_a_mesh_may_be_auto_and_explicit(in_one):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit))
    tx = tx_of(skip=False) if in_one else optax.chain(optax.identity(), tx_of(skip=False))
    expected = three_calls(tx, PARAMS, tx.init(PARAMS), GRADS, in_one=in_one)
    with jax.set_mesh(mesh):
        params, *grads = (
            jax.tree.map(lambda x: jax.device_put(x, jax.P(None, "model") if x.ndim > 1 else EVERYWHERE), tree)
            for tree in (PARAMS, *GRADS)
        )
        for jit in (jax.jit, lambda fn: fn):
            new_params, state, updates = three_calls(tx, params, tx.init(params), grads, in_one=in_one, jit=jit)
            assert_trees_close((new_params, updates), (expected[0], expected[2]))
            assert layout((new_params, state, updates)) == [(None, "model")] * 5


@pytest.mark.parametrize("inside", [False, True])
def test_outside_jit_and_without_a_mesh_set_updates_are_laid_out_as_the_parameters(inside):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    tx = optax.chain(tx_of(skip=False), optax.scale(2.0)) if inside else tx_of(skip=False)

    def results(params, grads):
        zeros, state = tx.update(grads[0], tx.init(params), params)
        updates, _ = tx.update(grads[1], state, params)
        return [zeros, updates, *(optaccum.flush(tx, s, params)[0] for s in (state, tx.init(params)))]

    params, grads = put(mesh, PARAMS, SHARDED), put(mesh, GRADS, SHARDED)
    actual = results(params, grads)
    assert layout(actual) == [("data", None)] * 4
    assert_trees_close(actual, results(PARAMS, GRADS), rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_trees_close(actual[0], actual[1])


def test_value_and_update_adds_in_place_outside_jit_too():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    tx, params = optaccum.accumulate(optax.sgd(1.0), 2), jnp.ones((2, 8, 8))  # two layers

    def loss_fn(params, x):
        x, _ = jax.lax.scan(lambda x, w: (x @ jax.sharding.reshard(w, EVERYWHERE), None), x, params)
        return jnp.sum(x)

    def trained(params, **options):
        step, state = optaccum.value_and_update(loss_fn, tx, **options), tx.init(params)
        for weight in (1.0, 3.0):
            _, params, state = step(params, state, jnp.ones(8), weight=weight)
        return params, state

    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, jax.P(None, "data"))
        expected, actual = trained(sharded, in_place=False), trained(sharded, in_place=True)
        assert layout(actual) == layout(expected) == [(None, "data", None)] * 2
    assert_trees_close(actual, expected)
    with pytest.raises(AssertionError):
        assert_trees_close(actual[0], params)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sums_are_sharded_from_init_on_and_an_emit_gathers_nothing(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = {"w": jnp.ones((64, 32)), "v": jnp.ones((32, 64, 2))}
    tx = tx_of(False)
    with jax.set_mesh(mesh):
        specs = {"w": jax.P("data"), "v": jax.P(None, "data")}
        params = jax.tree.map(lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), params, specs)
        state, jitted = tx.init(params), jax.jit(tx.init)(params)

        def is_laid_out(zeros):
            return [
                z.sharding.is_equivalent_to(x.sharding, x.ndim)
                for z, x in zip(*map(jax.tree.leaves, (zeros, params)), strict=True)
            ]

        assert is_laid_out(state.grad_sum) == is_laid_out(jitted.grad_sum) == [True, True]
        momentum = optax.tree.get(jitted.inner_state, "mu")  # on Auto axes types do not show it inside jit
        assert is_laid_out(momentum) == [kind == AxisType.Explicit] * 2

        def step(params, state, grads):
            return optaccum.apply_gradients(tx, grads, state, params, weight=2.0)

        def collectives(out_shardings=None):
            jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)
            counts = optaccum.count_collectives(jitted.lower(params, state, params).compile())
            return {**counts.in_loops, **counts.outside}

        assert collectives() == {}
        everywhere = jax.NamedSharding(mesh, jax.P())
        if kind == AxisType.Auto:  # a gather is seen
            assert "all-gather" in collectives((everywhere, None))
        jitted, before = jax.jit(step), layout((params, state))
        new, state = params, state
        for _ in range(2):
            new, state = jitted(new, state, params)
        assert layout((new, state)) == before
        assert (np.asarray(new["w"]) != 1).all()
