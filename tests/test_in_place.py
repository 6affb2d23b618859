"""`run_as` runs one form and is transformed as the other; references by themselves are not to be trusted."""

import functools

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_trees_close, assert_trees_equal
from jax import lax

from optaccum._in_place import run_as

WEIGHTS = jax.random.normal(jax.random.key(0), (2, 3, 3))
ROWS = jax.random.normal(jax.random.key(1), (4, 2, 3))
OPERANDS = (WEIGHTS, ROWS, jnp.float32(0.7), jax.random.key(2))


def loss(weights, rows, scale):
    return jnp.mean(lax.scan(lambda x, w: (jnp.tanh(x @ w) * scale, None), rows, weights)[0] ** 2)


def with_carry(operands):
    weights, rows, scale, key = operands

    def step(grads, x):
        value, grad = jax.value_and_grad(loss)(weights, x, scale)
        return grads + grad, value

    grads, values = lax.scan(step, jnp.zeros_like(weights), rows)
    return grads, values.sum(), key


def with_references(operands):
    weights, rows, scale, key = operands
    ref = jax.new_ref(jnp.zeros_like(weights))

    def step(_, x):
        value, vjp = jax.vjp(lambda weights: loss(weights, x, scale), weights)
        vjp.with_refs(ref)(jnp.ones_like(value))
        return (), value

    _, values = lax.scan(step, (), rows)
    return jax.freeze(ref), values.sum(), key


def norm_of(form):
    def fn(scale, weights=WEIGHTS):
        grads, value, _ = form((weights, ROWS, scale, OPERANDS[3]))
        return jnp.sum(grads**2) + value

    return fn


def trained(form):
    """A norm after two steps of descent, as a function of a hyperparameter: a meta-objective."""

    def fn(scale):
        def step(w, _):
            return w - form((w, ROWS, scale, OPERANDS[3]))[0], None

        return jnp.sum(lax.scan(step, WEIGHTS, None, length=2)[0] ** 2)

    return fn


def times(factor):
    """The plain form, with every array output times a factor."""

    def form(operands):
        return jax.tree.map(lambda x: factor * x if x.ndim else x, with_carry(operands))

    return form


TRANSFORMS = {
    "vmap": lambda form: jax.vmap(norm_of(form))(jnp.arange(3.0)),
    "vmap of jit": lambda form: jax.jit(jax.vmap(jax.jit(norm_of(form))))(jnp.arange(3.0)),
    "jvp": lambda form: jax.jvp(jax.jit(norm_of(form)), (0.7,), (1.0,)),
    "grad": lambda form: jax.grad(norm_of(form), argnums=(0, 1))(0.7, WEIGHTS),
    "forward over reverse": lambda form: jax.jit(jax.jacfwd(jax.grad(norm_of(form))))(0.7),
    "forward over forward": lambda form: jax.jit(jax.jacfwd(jax.jacfwd(norm_of(form))))(0.7),
    "remat": lambda form: jax.jit(jax.grad(jax.checkpoint(norm_of(form))))(0.7),
    "outer scan, jit": lambda form: jax.jit(jax.grad(trained(form)))(0.7),
    "outer scan, eager": lambda form: jax.grad(trained(form))(0.7),
    "outer scan, forward": lambda form: jax.jit(jax.jacfwd(trained(form)))(0.7),
    "vmap of grad of outer scan": lambda form: jax.jit(jax.vmap(jax.grad(trained(form))))(jnp.arange(2.0)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transformation_sees_the_plain_form(name):
    transform = TRANSFORMS[name]
    expected = transform(with_carry)
    assert_trees_close(transform(run_as(with_references, with_carry)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vmap of jit", "jvp"])
def test_it_is_the_plain_form_that_is_transformed(name):
    transform = TRANSFORMS[name]
    doubled = transform(run_as(with_references, times(2)))
    assert_trees_close(doubled, transform(times(2)), rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_trees_close(doubled, transform(with_carry), rtol=1e-5)


def test_references_alone_are_silently_wrong_in_an_outer_scan():
    expected = jax.jit(jax.grad(trained(with_carry)))(0.7)
    wrong = 0
    for name in ("outer scan, jit", "outer scan, eager"):
        try:
            actual = TRANSFORMS[name](with_references)
        except Exception:  # an error is a right answer
            continue
        wrong += abs(float(actual - expected)) > 0.1 * abs(float(expected))
    assert wrong, "JAX differentiates through references now: run_as is needed for vmap and forward mode only"


@pytest.mark.parametrize("transform", [jax.jit, lambda fn: fn], ids=["jit", "eager"])
def test_untransformed_the_fast_form_runs(transform):
    assert_trees_equal(transform(run_as(with_references, times(0)))(OPERANDS), transform(with_references)(OPERANDS))
    with pytest.raises(AssertionError):
        assert_trees_equal(transform(run_as(times(0), with_carry))(OPERANDS), transform(with_carry)(OPERANDS))


def test_integers_and_keys_may_be_batched():
    def double(operands):
        return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x + x, operands)

    operands = {"n": jnp.arange(3), "key": jax.random.split(jax.random.key(0), 3), "flag": None}
    assert_trees_equal(jax.vmap(run_as(double, double))(operands), double(operands))


@pytest.mark.parametrize("num_members", [2, 3])
def test_the_derivative_of_a_vmap_has_every_axis_where_the_vmap_has_it(num_members):
    """Of what no member changes, none; of what a scan stacks, whose members JAX puts second, the first."""

    def form(operands):
        x, shared = operands
        return x * x, jnp.sin(shared), lax.map(lambda s: s * x, shared)

    def total(fn, x, shared, swapped=False):
        squares, sines, products = jax.vmap(fn, in_axes=((0, None),))((x, shared))
        products = products.T if swapped else products
        return jnp.sum((squares * jnp.sum(sines, axis=1)) ** 2) + jnp.sum(jnp.sin(products) * jnp.arange(2.0))

    operands = jnp.arange(1.0, 1.0 + num_members), jnp.array([0.3, 0.8])
    expected = jax.grad(functools.partial(total, form), (0, 1))(*operands)
    actual = jax.grad(functools.partial(total, jax.jit(run_as(form, form))), (0, 1))(*operands)
    assert_trees_close(actual, expected, rtol=1e-6)
    if num_members == 2:  # else the shapes tell
        swapped = jax.grad(functools.partial(total, form, swapped=True), (0, 1))(*operands)
        with pytest.raises(AssertionError):
            assert_trees_close(swapped, expected, rtol=1e-2)


def test_no_tracer_outlives_the_trace():
    with jax.checking_leaks():
        jax.jit(run_as(with_references, with_carry))(OPERANDS)
        jax.jit(jax.grad(norm_of(run_as(with_references, with_carry))))(0.7)
