"""`chunked`: what it returns, its derivatives, its memory, and where it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, assert_trees_equal
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optaccum

B, D = 12, 5


def problem(batch_size=B):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(D, 8)), "b": rng.normal(size=8)}
    batch = {"image": rng.normal(size=(batch_size, D)), "text": rng.normal(size=(batch_size, D))}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch))


def encode(params, batch):
    def one(x):
        h = jnp.tanh(x @ params["w"] + params["b"])
        return h / jnp.linalg.norm(h, axis=-1, keepdims=True)

    return one(batch["image"]), one(batch["text"])


def info_nce(params, batch, encode=encode):
    image, text = encode(params, batch)
    return -jnp.diag(jax.nn.log_softmax(image @ text.T * 4)).mean()


def spread(params, batch, encode=encode):
    """A loss of batch statistics."""
    image, text = encode(params, batch)
    return -jnp.log(jnp.var(image - text, axis=0)).mean()


@pytest.mark.parametrize(
    "options", [{"num_microbatches": 4}, {"num_microbatches": 5}, {"microbatch_size": 12}], ids=str
)
def test_a_contrastive_loss_is_that_of_the_whole_batch(options):
    params, batch = problem()
    expected = jax.value_and_grad(info_nce, argnums=(0, 1))(params, batch)
    through_chunks = functools.partial(info_nce, encode=optaccum.chunked(encode, **options))
    actual = jax.jit(jax.value_and_grad(through_chunks, argnums=(0, 1)))(params, batch)
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_contrastive_loss_of_each_micro_batch_is_another():
    params, batch = problem()
    expected, _ = jax.value_and_grad(info_nce)(params, batch)
    loss, _ = optaccum.value_and_grad(info_nce, num_microbatches=4)(params, batch)
    assert abs(float(loss) / float(expected) - 1) > 0.3


def test_forward_mode_and_second_derivatives():
    params, batch = problem()
    tangent = jax.tree.map(jnp.sin, params)
    losses = info_nce, functools.partial(info_nce, encode=optaccum.chunked(encode, num_microbatches=5))
    plain, chunked = (jax.jvp(lambda p, f=f: f(p, batch), (params,), (tangent,)) for f in losses)
    assert_trees_close(chunked, plain, rtol=1e-5)
    plain, chunked = (
        jax.jit(jax.jvp, static_argnums=0)(jax.grad(lambda p, f=f: f(p, batch)), (params,), (tangent,)) for f in losses
    )
    assert_trees_close(chunked, plain, rtol=1e-4, atol=1e-6)


def outputs(scale, x, y, *, shift):
    """Rows in several places, and one of each wrapper."""
    return {
        "rows": x * scale + shift,
        "last axis": (x * y).T,
        "middle": [jnp.stack([x, y]).astype(jnp.bfloat16)],
        "int": jnp.arange(len(x)) * 0 + y[:, 0].astype(jnp.int32),
        "mean": optaccum.WeightedMean((x * scale).sum(), y.sum()),
        "sum": optaccum.Sum(x.sum(0)),
        "max": optaccum.Max(x.max(0)),
        "min": optaccum.Min(y.min()),
    }


@pytest.mark.parametrize("n", [3, 5])
def test_outputs_come_back_as_the_whole_batch_gives_them(n):
    x = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (B, D)), jnp.float32)
    args = jnp.float32(3), x, x[::-1] + 10
    expected = outputs(*args, shift=0.5)
    expected = {
        name: value.total / value.weight if name == "mean" else getattr(value, "value", value)
        for name, value in expected.items()
    }
    fn = optaccum.chunked(outputs, num_microbatches=n, batch_argnums=(1, -1))
    for shift in (0.5, jnp.float32(0.5)):
        assert_trees_equal(fn(*args, shift=shift), expected)
    assert fn.__name__ == "outputs"


def test_last_and_stack_are_in_order():
    fn = optaccum.chunked(lambda x: (optaccum.Last(x[0]), optaccum.Stack(x.sum())), batch_argnums=0, num_microbatches=3)
    last, stack = fn(jnp.arange(7))
    assert int(last) == 2
    assert stack.tolist() == [0 + 3 + 6, 1 + 4, 2 + 5]


def test_each_micro_batch_has_its_own_key():
    def noise(x, keys):
        return jax.random.uniform(keys["a"], x.shape)

    key = jax.random.key(3)
    fn = optaccum.chunked(noise, num_microbatches=3, batch_argnums=0, key_argnum=1)
    drawn = fn(jnp.zeros(7), {"a": key})
    for i, size in enumerate((3, 2, 2)):
        assert_trees_equal(drawn[i::3], jax.random.uniform(jax.random.fold_in(key, i), (size,)))
    assert len(set(drawn.tolist())) == 7


def test_the_backward_pass_draws_what_the_forward_pass_drew():
    def dropped(w, x, key):
        return w * x * jax.random.bernoulli(key, 0.5, x.shape)

    fn = optaccum.chunked(dropped, num_microbatches=4, key_argnum=2)
    w, x, key = jnp.float32(2), jnp.arange(1.0, 33), jax.random.key(0)
    value, grad = jax.value_and_grad(lambda w: fn(w, x, key).sum())(w)
    assert 0 < float(value) < 2 * float(x.sum())
    assert float(value) == 2 * float(grad)


def test_bf16_stays_bf16():
    params, batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problem())
    fn = optaccum.chunked(encode, num_microbatches=4)
    assert_trees_close(fn(params, batch), encode(params, batch), rtol=2e-2)
    grads = jax.grad(lambda p: sum(x.sum() for x in fn(p, batch)))(params)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def deep(params, x):
    for _ in range(12):
        x = jnp.sin(x @ params)
    return x.mean(-1)


def test_memory_is_that_of_one_micro_batch_in_the_backward_pass_too():
    params = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    x = jax.ShapeDtypeStruct((1024, 64), jnp.float32)

    def temp(fn):
        step = jax.jit(jax.grad(lambda params, x: jnp.var(fn(params, x))))
        return step.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    whole, chunked = temp(deep), temp(optaccum.chunked(deep, num_microbatches=32))
    kept = temp(lambda params, x: jax.lax.map(functools.partial(deep, params), x.reshape(32, 32, 64)).ravel())
    assert chunked < whole / 4
    assert chunked < kept / 4  # a loop alone, without recomputation, keeps every activation


def test_it_is_traced_as_often_for_many_micro_batches_as_for_few():
    def traces(n):
        count = 0

        def fn(x):
            nonlocal count
            count += 1
            return jnp.sin(x)

        chunked = optaccum.chunked(fn, num_microbatches=n, batch_argnums=0)
        jax.jit(jax.grad(lambda x: chunked(x).sum()))(jnp.arange(48.0))
        once = count
        jax.eval_shape(chunked, jnp.arange(48.0))
        chunked(jnp.arange(48.0))
        assert count <= 2 * once
        return once

    assert traces(2) == traces(24) <= 5
    assert traces(5) == traces(23)


def test_eager_calls_compile_once():
    count = 0

    def fn(x):
        nonlocal count
        count += 1
        return jnp.sin(x)

    chunked = optaccum.chunked(fn, num_microbatches=3, batch_argnums=0)
    chunked(jnp.arange(6.0))
    once = count
    assert_trees_equal(chunked(jnp.arange(6.0) + 1), jnp.sin(jnp.arange(6.0) + 1))
    assert count == once


def test_under_vmap_and_inside_value_and_grad():
    params, batch = problem()
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    through_chunks = functools.partial(info_nce, encode=optaccum.chunked(encode, num_microbatches=3))
    actual = jax.vmap(jax.grad(through_chunks), in_axes=(0, None))(many, batch)
    assert_trees_close(actual, jax.vmap(jax.grad(info_nce), in_axes=(0, None))(many, batch), rtol=1e-4, atol=1e-6)
    nested = optaccum.value_and_grad(through_chunks, num_microbatches=2)(params, batch)
    plain = optaccum.value_and_grad(info_nce, num_microbatches=2)(params, batch)
    assert_trees_close(nested, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("n", [2, 3])
def test_a_sharded_batch(axis_type, n):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:4])
    params, batch = problem(24)
    expected = encode(params, batch)
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    step = jax.jit(optaccum.chunked(encode, num_microbatches=n))
    with jax.set_mesh(mesh):
        compiled = step.lower(params, batch).compile()
        assert_trees_close(compiled(params, batch), expected, rtol=1e-5, atol=1e-6)
        grads = jax.jit(jax.grad(functools.partial(spread, encode=step)))(params, batch)
    plain = jax.grad(spread)(*problem(24))
    assert_trees_close(jax.tree.map(np.asarray, grads), jax.tree.map(np.asarray, plain), rtol=1e-4, atol=1e-6)
    if n == 2:  # divides each device's six rows
        assert optaccum.count_collectives(compiled)[:2] == ({}, {})
        assert compiled.output_shardings[0].spec[0] == "data"


def test_under_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    params, batch = problem(24)

    def local(params, batch):
        rows = optaccum.chunked(encode, num_microbatches=3)(params, batch)
        total = optaccum.chunked(lambda x: optaccum.Sum(x.sum()), num_microbatches=3, batch_argnums=0)(rows[0])
        return rows, jax.lax.psum(total, "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), P()))
    rows, total = jax.jit(mapped)(params, batch)
    expected = encode(params, batch)
    assert_trees_close(rows, expected, rtol=1e-5, atol=1e-6)
    assert float(total) == pytest.approx(float(expected[0].sum()), rel=1e-4)


def test_mistakes_raise():
    x = jnp.ones((4, 3))
    for kind, options, message in [
        (ValueError, {}, "exactly one of num_microbatches, microbatch_size"),
        (ValueError, {"num_microbatches": 2, "microbatch_size": 2}, "exactly one"),
        (ValueError, {"num_microbatches": 0}, "int >= 1"),
        (TypeError, {"microbatch_size": True}, "int >= 1"),
        (TypeError, {"num_microbatches": 2, "batch_argnums": ()}, "non-empty"),
    ]:
        with pytest.raises(kind, match=message):
            optaccum.chunked(lambda x: x, **options)

    def chunk(fn, **options):
        return optaccum.chunked(fn, **{"num_microbatches": 2, "batch_argnums": 0, **options})

    for kind, call, message in [
        (ValueError, lambda: chunk(lambda x: x, num_microbatches=5)(x), "as many micro-batches as examples"),
        (ValueError, lambda: chunk(lambda x: x, batch_argnums=1)(x), "batch_argnums within"),
        (ValueError, lambda: chunk(lambda x, key: x, key_argnum=0)(x, x), "one role"),
        (ValueError, lambda: chunk(lambda x: x)({"a": x, "b": x[:2]}), "same leading size"),
        (TypeError, lambda: chunk(lambda x: {"mean": x.mean()})(x), r"output\['mean'\] has shape \(\)"),
        (TypeError, lambda: chunk(lambda x: x @ x.T)(x), "one axis that is the batch's"),
    ]:
        with pytest.raises(kind, match=message):
            call()


def test_rows_in_a_wrapper_are_named():
    with pytest.raises(TypeError, match=r"Max holds.*bare, to be concatenated"):
        optaccum.chunked(lambda w, x: optaccum.Max(w * x), num_microbatches=2)(1.0, jnp.ones(5))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_data_axes_leave_no_collective_in_the_loops(kind):
    params, batch = problem(24)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    on_mesh = jax.device_put(batch, NamedSharding(mesh, P("data")))
    replicated = jax.device_put(params, NamedSharding(mesh, P()))

    def grad_of(**options):
        encoded = optaccum.chunked(encode, num_microbatches=3, **options)

        def loss_fn(params, batch):
            image, text = encoded(params, batch)
            gathered = [jax.lax.with_sharding_constraint(x, P()) if kind == AxisType.Auto else x for x in (image, text)]
            if kind == AxisType.Explicit:
                gathered = [jax.sharding.reshard(x, P()) for x in gathered]
            return info_nce(params, None, encode=lambda *_: gathered)

        return jax.jit(jax.value_and_grad(loss_fn))

    with jax.set_mesh(mesh):
        grad_fn = grad_of(data_axes="data")
        assert_trees_close(
            jax.device_get(grad_fn(replicated, on_mesh)),
            jax.device_get(jax.value_and_grad(info_nce)(params, batch)),
            rtol=1e-5,
            atol=1e-6,
        )
        counts = optaccum.count_collectives(grad_fn.lower(replicated, on_mesh).compile())
        assert not counts.in_loops
        assert counts.outside
        if kind == AxisType.Auto:  # as JAX places them
            assert optaccum.count_collectives(grad_of().lower(replicated, on_mesh).compile()).in_loops
