"""A function run once or not at all: in place, and under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, assert_trees_equal
from jax import lax

from optaccum._run_if import run_if


def scaled(predicate, x, scale, shift):
    """Closes over a float and an int; its carry holds every kind of leaf."""
    carry = {"x": x, "count": jnp.int32(0), "key": jax.random.key(0), "none": None}

    def fn(carry):
        return {
            "x": jnp.sin(carry["x"]) * scale + shift,
            "count": carry["count"] + shift,
            "key": jax.random.split(carry["key"])[0],
            "none": None,
        }

    return run_if(predicate, fn, carry)


def scaled_sum(predicate, x, scale, shift):
    return jnp.sum(scaled(predicate, x, scale, shift)["x"])


X = jnp.arange(1.0, 4.0)


@pytest.mark.parametrize("transform", [jax.jit, lambda fn: fn], ids=["jit", "eager"])
def test_runs_where_the_predicate_holds_and_not_elsewhere(transform):
    ran = transform(scaled)(jnp.array(True), X, 2.0, 3)
    kept = transform(scaled)(jnp.array(False), X, 2.0, 3)
    assert_trees_close(ran["x"], jnp.sin(X) * 2 + 3)
    assert_trees_equal(kept["x"], X)
    assert (int(ran["count"]), int(kept["count"])) == (3, 0)
    assert_trees_equal(kept["key"], jax.random.key(0))
    with pytest.raises(AssertionError):  # a key that moves is seen
        assert_trees_equal(ran["key"], kept["key"])


@pytest.mark.parametrize("predicate", [True, False])
@pytest.mark.parametrize(
    "derivative", [jax.grad, jax.jacfwd, jax.hessian, lambda f, n: jax.jacrev(jax.jacfwd(f, n), n)]
)
def test_differentiates_as_python_branching_does(derivative, predicate):
    def by_hand(x, scale):
        return jnp.sum(jnp.sin(x) * scale + 3 if predicate else x)

    def by_run_if(x, scale):
        return scaled_sum(predicate_array, x, scale, 3)

    predicate_array = jnp.array(predicate)
    jitted = jax.jit(lambda p, x, s: derivative(lambda x, s: scaled_sum(p, x, s, 3), (0, 1))(x, s))
    expected = derivative(by_hand, (0, 1))(X, 2.0)
    assert_trees_close(jitted(predicate_array, X, 2.0), expected, atol=1e-6)
    assert_trees_close(derivative(by_run_if, (0, 1))(X, 2.0), expected, atol=1e-6)
    with pytest.raises(AssertionError):
        assert_trees_close(jitted(~predicate_array, X, 2.0), expected, atol=1e-6)


@pytest.mark.parametrize("transform", [jax.jit, lambda fn: fn], ids=["jit", "eager"])
def test_vmap_batches_the_predicate_and_closed_over_integers(transform):
    predicates, shifts = jnp.array([True, False, True]), jnp.arange(3)
    batched = transform(jax.vmap(scaled_sum, (0, None, None, 0)))(predicates, X, 2.0, shifts)
    expected = [jnp.sum(jnp.sin(X) * 2), jnp.sum(X), jnp.sum(jnp.sin(X) * 2 + 2)]
    assert_trees_close(batched, jnp.stack(expected))
    unbatched_predicate = transform(jax.vmap(scaled_sum, (None, None, None, 0)))(True, X, 2.0, shifts)
    assert_trees_close(unbatched_predicate, jnp.sum(jnp.sin(X) * 2) + 3 * shifts.astype(jnp.float32))


def test_a_gradient_under_vmap_under_jit():
    gradient = jax.jit(jax.vmap(jax.grad(scaled_sum, 2), (0, None, None, 0)))
    slopes = gradient(jnp.array([True, False]), X, 2.0, jnp.arange(2))
    assert_trees_close(slopes, jnp.array([jnp.sum(jnp.sin(X)), 0.0]))


@pytest.mark.parametrize("inner", [lambda fn: fn, jax.jit, jax.vmap], ids=["vmap", "jit", "vmap of vmap"])
@pytest.mark.parametrize("outer", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
def test_a_gradient_of_vmap_where_members_differ(inner, outer):
    predicates = jnp.array([[True], [False], [True]]) if inner is jax.vmap else jnp.array([True, False, True])

    def total(x):
        return jax.vmap(inner(lambda predicate: scaled_sum(predicate, x, 2.0, 3)))(predicates).sum()

    assert_trees_close(outer(jax.grad(total))(X), 4 * jnp.cos(X) + 1)
    assert_trees_close(outer(jax.grad(total))(X), outer(jax.jacfwd(total))(X))
    with pytest.raises(AssertionError):  # as where all run
        assert_trees_close(outer(jax.grad(total))(X), 6 * jnp.cos(X))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_gradient_of_vmap_of_jit_along_any_axis(axis):
    xs, weights = jnp.arange(9.0).reshape(3, 3), jnp.arange(9.0).reshape(3, 3) ** 2

    def total(fn, xs):
        return jnp.sum(jax.vmap(fn, in_axes=axis)(xs) * weights)

    def sines(x):
        return jnp.sin(x) * jnp.arange(3.0)

    jitted = jax.jit(lambda predicate, x: run_if(predicate, sines, x))
    expected = jax.grad(functools.partial(total, sines))(xs)
    actual = jax.grad(functools.partial(total, functools.partial(jitted, True)))(xs)
    assert_trees_close(actual, expected, rtol=1e-6)
    with pytest.raises(AssertionError):
        assert_trees_close(jax.grad(functools.partial(total, sines))(xs.T).T, expected, rtol=1e-2)


@pytest.mark.parametrize("predicate", [True, False])
def test_a_gradient_of_vmap_of_jit_where_members_would_differ_after_a_second_trip(predicate):
    x, xs = jnp.arange(1.0, 4.0), jnp.arange(9.0).reshape(3, 3)

    def shifted(carry, scale):  # "last" differs between members once "now" does
        return {"last": carry["now"], "now": carry["now"] * scale}

    def total(fn, x):
        new = jax.vmap(lambda scale: fn({"last": x**2, "now": x}, scale))(xs)
        return jnp.sum(new["last"] ** 2) + jnp.sum(new["now"])

    jitted = jax.jit(lambda predicate, carry, scale: run_if(predicate, lambda carry: shifted(carry, scale), carry))
    expected = jax.grad(functools.partial(total, shifted if predicate else lambda carry, _: carry))(x)
    assert_trees_close(jax.grad(functools.partial(total, functools.partial(jitted, predicate)))(x), expected)
    with pytest.raises(AssertionError):
        assert_trees_close(jax.grad(functools.partial(total, lambda carry, _: carry | {"now": x}))(x), expected)


def test_what_does_not_run_gives_no_gradient_not_even_a_nan():
    def member(x, predicate):
        return run_if(predicate, jnp.sqrt, x)

    predicates = jnp.array([False, True])
    gradient = jax.jit(jax.grad(lambda x: jax.vmap(member)(x, predicates).sum()))
    assert_trees_equal(gradient(jnp.array([0.0, 4.0])), jnp.array([1.0, 0.25]))
    assert not jnp.isfinite(gradient(jnp.zeros(2))[1])


def test_does_not_evaluate_what_it_does_not_run():
    calls = []

    def step(predicate, x):
        def fn(x):
            jax.debug.callback(lambda: calls.append(1))
            return x + 1

        return run_if(predicate, fn, x)

    jax.block_until_ready(jax.jit(step)(jnp.array(False), X))
    jax.effects_barrier()
    assert calls == []
    jax.block_until_ready(jax.jit(step)(jnp.array(True), X))
    jax.effects_barrier()
    assert calls == [1]


def temp_copies(step, *arguments):
    compiled = jax.jit(step, donate_argnums=1).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes / arguments[1].nbytes


def test_works_in_place_where_the_carry_is_donated():
    def through_select(predicate, x, y):
        return jnp.where(predicate, lax.cumsum(x) + y, x)  # what masking an update costs

    def in_place(predicate, x, y):
        return run_if(predicate, lambda x: x * 0.5 + y, x)

    x = jnp.ones((256, 256))
    assert temp_copies(in_place, jnp.array(True), x, x) < 0.01
    assert temp_copies(through_select, jnp.array(True), x, x) > 0.5


def test_traces_the_function_once():
    traces = []

    @jax.jit
    def step(predicate, x):
        return run_if(predicate, lambda x: (traces.append(1), x + 1)[1], x)

    for predicate in (True, False, True):
        step(jnp.array(predicate), X)
    assert len(traces) == 1


def test_a_carry_may_start_varying_over_fewer_mesh_axes_than_it_ends_with():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data"))
    def step(predicate, x):
        return run_if(predicate, lambda carry: carry + x, jnp.zeros(1))

    rows = jnp.arange(8.0)
    assert_trees_equal(step(jnp.array(True), rows), rows)
    assert_trees_equal(step(jnp.array(False), rows), jnp.zeros(8))


def test_a_different_structure_raises():
    with pytest.raises((TypeError, ValueError)):
        jax.jit(lambda p, x: run_if(p, lambda c: (c[0],), (x, x)))(jnp.array(True), X)


def test_no_tracer_outlives_its_trace():
    with jax.checking_leaks():
        jax.jit(scaled)(jnp.array(True), X, 2.0, 3)
        jax.jit(jax.grad(scaled_sum, 2))(jnp.array(True), X, 2.0, 3)
        leaked = []
        with pytest.raises(Exception, match=r"[Ll]eaked trace"):
            jax.jit(lambda x: leaked.append(x))(X)


def test_disable_jit_takes_the_same_branches():
    with jax.disable_jit():
        assert_trees_close(scaled(jnp.array(True), X, 2.0, 3)["x"], np.sin(X) * 2 + 3)
        assert_trees_equal(scaled(jnp.array(False), X, 2.0, 3)["x"], X)
