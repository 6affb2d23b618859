"""`microbatched`: a loss that whoever may differentiate, in the memory of a micro-batch."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal
from jax.sharding import NamedSharding, PartitionSpec as P
from scanning_problem import (
    BATCH,
    LOSSES,
    PARAMS,
    mean_loss,
    mean_of_means,
    per_example,
    ratio_loss,
    token_loss,
)
from sharded_problem import AUTO, EXPLICIT, make_mesh

import optaccum


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [1, 3, 7])
def test_value_and_gradient_are_the_whole_batchs(name, n):
    loss_fn, whole = LOSSES[name]
    expected = jax.value_and_grad(whole)(PARAMS, BATCH)
    for in_place in (None, False):
        loss = optaccum.microbatched(loss_fn, num_microbatches=n, in_place=in_place)
        assert_trees_close(jax.value_and_grad(loss)(PARAMS, BATCH), expected, rtol=1e-5, atol=1e-6)
        assert_trees_close(jax.jit(loss)(PARAMS, BATCH), expected[0], rtol=1e-5)
    if name == "weighted" and n == 3:
        with pytest.raises(AssertionError):
            assert_trees_close(mean_of_means(whole, n), expected, rtol=1e-2)


def scaled_loss(params, batch, scale):
    loss = token_loss(params, batch)
    return optaccum.WeightedMean(loss.total * scale["s"] ** 2, loss.weight)


def scaled_whole(params, batch, scale):
    return ratio_loss(params, batch) * scale["s"] ** 2


@pytest.mark.parametrize("in_place", [None, False])
@pytest.mark.parametrize("argnums", [1, (0, 2), (1, 2)])
def test_any_arguments_are_differentiated_the_batch_too(argnums, in_place):
    loss = optaccum.microbatched(scaled_loss, num_microbatches=3, in_place=in_place)
    args = PARAMS, BATCH, {"s": 1.5, "name": "text", "fn": np.sin}
    arrays = args[0], args[1], {"s": 1.5}

    def with_static(fn):
        return lambda p, b, s: fn(p, b, {**args[2], **s})

    actual = jax.grad(with_static(loss), argnums)(*arrays)
    expected = jax.grad(with_static(scaled_whole), argnums)(*arrays)
    # The weight is a constant to differentiation: so is the mask, but for what it lets through.
    for tree in (actual, expected):
        for part in tree if isinstance(tree, tuple) else (tree,):
            if "mask" in part:
                part.pop("mask")
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)
    doubled = jax.grad(lambda *args: 2 * with_static(loss)(*args), argnums)(*arrays)
    with pytest.raises(AssertionError):
        assert_trees_close(doubled, actual | {"mask": doubled["mask"]} if argnums == 1 else actual, rtol=1e-2)


def test_closures_are_differentiated_and_transformed_in_any_order():
    def value(scale, loss_of):
        return loss_of(lambda params, batch: scaled_loss(params, batch, {"s": scale}))(PARAMS, BATCH)

    def split(fn):
        return optaccum.microbatched(fn, num_microbatches=3)

    def whole(fn):
        return lambda *args: (t := fn(*args)).total / t.weight

    for transform in (
        jax.grad,
        lambda f: jax.jit(jax.grad(f)),
        lambda f: jax.grad(jax.checkpoint(f)),
        lambda f: jax.grad(jax.grad(f)),
    ):
        actual, expected = (transform(lambda s, of=of: value(s, of))(1.5) for of in (split, whole))
        assert_trees_close(actual, expected, rtol=1e-5)
        with pytest.raises(AssertionError):
            assert_trees_close(actual, 1.1 * expected, rtol=1e-2)
    scales = jnp.array([0.5, 2.0])
    for transform in (lambda f: jax.vmap(jax.grad(f)), lambda f: jax.grad(lambda s: jax.vmap(f)(s).sum())):
        actual, expected = (transform(lambda s, of=of: value(s, of))(scales) for of in (split, whole))
        assert_trees_close(actual, expected, rtol=1e-5)


def test_meta_gradients_through_training_steps_in_a_scan():
    def after_training(rate, loss):
        def step(params, _):
            return jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params, BATCH)), None

        return ratio_loss(jax.lax.scan(step, PARAMS, None, length=2)[0], BATCH)

    loss = optaccum.microbatched(token_loss, num_microbatches=3)
    actual, expected = (jax.jit(jax.grad(lambda r, f=f: after_training(r, f)))(0.3) for f in (loss, ratio_loss))
    assert_trees_close(actual, expected, rtol=1e-4)
    assert abs(float(actual)) > 1e-3


def test_keys_carry_and_aux_come_as_from_value_and_grad():
    def loss_fn(params, batch, key, carry):
        noise = jax.random.normal(key, batch["mask"].shape)
        aux = {"rows": batch["x"] * 2, "largest": optaccum.Max(batch["x"].max()), "mean": batch["x"].mean()}
        return jnp.mean(per_example(params, batch) * noise), ({"n": carry["n"] + 1}, aux)

    options = {"num_microbatches": 3, "key_argnum": 2, "carry_argnum": 3, "has_aux": True}
    args = PARAMS, BATCH, jax.random.key(0), {"n": 0}
    loss = optaccum.microbatched(loss_fn, **options)
    expected = optaccum.value_and_grad(loss_fn, **options)(*args)
    assert_trees_close(jax.value_and_grad(loss, has_aux=True)(*args), expected, rtol=1e-6)
    assert_trees_close(loss(*args), expected[0], rtol=1e-6)
    with pytest.raises(TypeError, match="expected no derivative of the aux"):
        jax.grad(lambda params: loss(params, *args[1:])[1][1]["mean"])(PARAMS)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_over_devices_the_gradient_crosses_once(kind):
    mesh, _ = make_mesh(kind)
    batch = {name: jnp.concatenate([x, x, x[:2] / 2]) for name, x in BATCH.items()}
    on_mesh = jax.device_put(batch, NamedSharding(mesh, P("data")))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    loss = optaccum.microbatched(scaled_loss, num_microbatches=2, data_axes="data")
    grad_fn = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))
    actual = grad_fn(params, on_mesh, {"s": 1.5})
    expected = jax.value_and_grad(scaled_whole, argnums=(0, 2))(PARAMS, batch, {"s": 1.5})
    assert_trees_close(jax.device_get(actual), jax.device_get(expected), rtol=1e-5)
    counts = optaccum.count_collectives(grad_fn.lower(params, on_mesh, {"s": 1.5}).compile())
    assert not counts.in_loops
    each_time = jax.jit(jax.grad(optaccum.microbatched(scaled_loss, num_microbatches=2)))
    if kind == AUTO:
        compiled = each_time.lower(params, on_mesh, {"s": 1.5}).compile()
        assert optaccum.count_collectives(compiled).in_loops
    closed = jax.grad(
        lambda s: optaccum.microbatched(lambda p, b: scaled_loss(p, b, {"s": s}), num_microbatches=2, data_axes="data")(
            params, on_mesh
        )
    )
    with jax.set_mesh(mesh):
        assert_trees_close(jax.device_get(closed(1.5)), jax.device_get(expected[1][1]["s"]), rtol=1e-5)


def test_memory_is_that_of_value_and_grad_and_a_loss_alone_makes_no_gradient():
    def loss_fn(params, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)
        return jnp.mean(h**2)

    params, x = (
        jax.ShapeDtypeStruct((12, 256, 256), jnp.float32),
        jax.ShapeDtypeStruct((16, 256), jnp.float32),
    )

    def temp(fn):
        memory = jax.jit(fn).lower(params, x).compile().memory_analysis()
        return memory.temp_size_in_bytes / (12 * 256 * 256 * 4)

    loss = optaccum.microbatched(loss_fn, num_microbatches=4)
    reference = temp(optaccum.value_and_grad(loss_fn, num_microbatches=4))
    assert temp(jax.value_and_grad(loss)) <= reference + 0.05
    assert temp(loss) < 0.1
    in_a_carry = optaccum.microbatched(loss_fn, num_microbatches=4, in_place=False)
    assert temp(jax.value_and_grad(in_a_carry)) > reference + 0.5


def test_gradients_are_rounded_once_to_the_arguments_dtype():
    x = jnp.ones((512, 1))

    def loss_fn(w, x):
        return jnp.mean(x @ w.astype(jnp.float32)) * 512 / 256

    w = jnp.ones(1, jnp.bfloat16)
    grad = jax.grad(optaccum.microbatched(lambda w, x: loss_fn(w, x) * 1.25, num_microbatches=512))(w, x)
    assert (grad.dtype, float(grad[0])) == (jnp.bfloat16, 2.5)
    narrow = optaccum.microbatched(
        lambda w, x: loss_fn(w, x) * 1.25,
        num_microbatches=512,
        accumulator_dtype=jnp.bfloat16,
        in_place=False,
    )
    assert float(jax.grad(narrow)(w, x)[0]) != 2.5  # the sum stops growing


class Model(eqx.Module):
    layers: list
    activation: callable
    name: str = eqx.field(static=True)

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def test_an_equinox_model_as_it_is():
    k1, k2 = jax.random.split(jax.random.key(0))
    model = Model([eqx.nn.Linear(3, 8, key=k1), eqx.nn.Linear(8, 1, key=k2)], jax.nn.gelu, "a model")

    def loss_fn(model, batch):
        return jnp.mean((jax.vmap(model)(batch["x"])[:, 0] - batch["mask"]) ** 2)

    loss = optaccum.microbatched(loss_fn, num_microbatches=3)
    value, grads = eqx.filter_jit(eqx.filter_value_and_grad(loss))(model, BATCH)
    expected = eqx.filter_value_and_grad(loss_fn)(model, BATCH)
    expected = expected[0], eqx.filter(expected[1], eqx.is_array)
    assert_trees_close((value, eqx.filter(grads, eqx.is_array)), expected, rtol=1e-5, atol=1e-7)
    assert grads.activation is None
    with pytest.raises(TypeError, match=r"argument 0\.activation to be an array.*eqx\.partition"):
        optaccum.grad(loss_fn, num_microbatches=3)(model, BATCH)


def test_lbfgs_searches_along_the_whole_batchs_loss():
    def minimise(loss):
        solver = optax.lbfgs()
        value_and_grad = optax.value_and_grad_from_state(lambda p: loss(p, BATCH))
        params, state = PARAMS, solver.init(PARAMS)
        for _ in range(3):
            value, grad = value_and_grad(params, state=state)
            updates, state = solver.update(
                grad, state, params, value=value, grad=grad, value_fn=lambda p: loss(p, BATCH)
            )
            params = optax.apply_updates(params, updates)
        return params

    actual = minimise(optaccum.microbatched(token_loss, num_microbatches=3))
    assert_trees_close(actual, minimise(ratio_loss), rtol=1e-2, atol=1e-3)
    with pytest.raises(AssertionError):
        assert_trees_close(actual, minimise(mean_loss), rtol=1e-2, atol=1e-3)


def test_a_loss_scale_stands_inside_the_loss():
    """float16: gradients of 1e-6 underflow; scaled inside they do not, from outside it is too late."""
    w, x = jnp.full(4, 0.5, jnp.float16), jnp.full((8, 4), 1e-3, jnp.float16)

    def loss_fn(w, x, scale):
        return jnp.mean((x @ w).astype(jnp.float32) * 1e-6 * scale)

    loss = optaccum.microbatched(loss_fn, num_microbatches=4)
    scale = 2.0**15
    inside = jax.grad(loss)(w, x, scale).astype(jnp.float32) / scale
    outside = jax.grad(lambda w: loss(w, x, 1.0) * scale)(w).astype(jnp.float32) / scale
    np.testing.assert_allclose(inside, 1e-9, rtol=1e-2)
    assert_trees_equal(outside, jnp.zeros(4))
    assert not jnp.isfinite(jax.grad(loss)(w, x, 2.0**60)).all()  # overflow, which a dynamic scale looks for


@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit, lambda fn: lambda t: jax.vmap(fn)(t[None])[0]])
def test_calls_that_are_differentiated_by_other_arguments_stay_apart(transform):
    """In one derivative: their residuals have one structure, for JAX confuses them."""

    def loss_fn(a, batch, b):
        return jnp.mean(jnp.tanh(batch["x"] @ a + 2) * jnp.sin(3 * batch["x"] @ b))

    first, second = PARAMS["w"], jnp.array([0.1, 0.5, -0.2])

    def total(loss):
        calls = [lambda t: loss(t, BATCH, first), lambda t: loss(first, BATCH, t)]
        calls += [lambda t: loss(t, {"x": BATCH["x"] * t}, t), lambda t: jax.grad(loss, 2)(t, BATCH, first).sum()]
        return lambda t: sum((i + 1) * call(t) for i, call in enumerate(calls))

    expected = jax.grad(total(loss_fn))(second)
    actual = jax.grad(transform(total(optaccum.microbatched(loss_fn, num_microbatches=3))))(second)
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)
    swapped = total(lambda a, batch, b: loss_fn(b, batch, a))
    with pytest.raises(AssertionError):
        assert_trees_close(actual, jax.grad(swapped)(second), rtol=1e-2)


@pytest.mark.parametrize("data_axes", [None, "data"])
def test_no_tracer_leaks(data_axes):
    def value(params, scale):
        def loss_fn(params, batch):
            return scale * mean_loss(params, batch), batch["mask"]

        loss = optaccum.microbatched(loss_fn, num_microbatches=2, has_aux=True, data_axes=data_axes)
        return loss(params, {"x": BATCH["x"][:4], "mask": BATCH["mask"][:4]})[0]

    leaked = []
    with jax.checking_leaks(), jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AUTO,))):
        jax.block_until_ready(jax.jit(jax.grad(value))(PARAMS, 2.0))
        jax.block_until_ready(jax.jit(value)(PARAMS, 2.0))
        with pytest.raises(Exception, match=r"[Ll]eaked"):
            jax.jit(lambda x: leaked.append(x) or x)(1.0)


@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit])
def test_calls_of_one_vmapped_loss_stay_apart(transform):
    """Their residuals have one batching."""
    batches, fixed, moved = jnp.stack([BATCH["x"], 2 * BATCH["x"]]), PARAMS["w"], jnp.array([0.1, 0.5, -0.2])

    def loss_fn(a, x, b):
        return jnp.mean(jnp.tanh(x @ a + 2) * jnp.sin(3 * x @ b))

    def total(loss):
        many = jax.vmap(loss, (None, 0, None))
        return lambda t: (many(t, batches, fixed) + 2 * many(fixed, batches, t) + 3 * many(t, batches * t, t)).sum()

    expected = jax.grad(total(loss_fn))(moved)
    actual = jax.grad(transform(total(optaccum.microbatched(loss_fn, num_microbatches=3))))(moved)
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        assert_trees_close(actual, jax.grad(total(lambda a, x, b: loss_fn(b, x, a)))(moved), rtol=1e-2)


@pytest.mark.parametrize("in_place", [True, False])
def test_aux_of_a_vmapped_loss_is_each_members_own(in_place):
    def loss_fn(scale, x):
        return jnp.mean(jnp.tanh(x * scale)), optaccum.Stack(jnp.sum(x) * scale)

    def total(scales):
        losses, stacks = jax.vmap(loss, (0, None))(scales, x)
        return jnp.sum(losses), stacks

    x, scales = jnp.arange(6.0), jnp.array([0.5, 2.0, 3.0])
    loss = optaccum.microbatched(loss_fn, num_microbatches=3, has_aux=True, in_place=in_place)
    stacks = jax.grad(total, has_aux=True)(scales)[1]
    expected = scales[:, None] * jnp.array([3.0, 5.0, 7.0])
    assert_trees_equal(stacks, expected)
    with pytest.raises(AssertionError):
        assert_trees_equal(stacks.T, expected)


def test_forward_mode_is_told_the_way_out():
    loss = optaccum.microbatched(mean_loss, num_microbatches=3)
    with pytest.raises(TypeError, match="forward-mode") as info:
        jax.jvp(lambda p: loss(p, BATCH), (PARAMS,), (PARAMS,))
    assert "reverse mode alone" in "".join(info.value.__notes__)
