"""The micro-batch loop: one gradient buffer, and in which form it runs, from wherever it is called."""

import functools

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_trees_close
from jax import lax
from optax import microbatching

import optaccum

LAYERS, WIDTH, K = 8, 128, 8


def _layer(h, weights):
    h = h + jax.nn.gelu(h @ weights["up"]) @ weights["down"]
    return h / jnp.sqrt(1e-3 + jnp.mean(h**2, -1, keepdims=True)), None


def transformer_loss(params, batch, *, scanned=True):
    h = jnp.tile(batch[..., None] * 0.1, (1, 1, WIDTH))
    if scanned:
        h, _ = lax.scan(jax.checkpoint(_layer), h, params)
    else:
        for i in range(LAYERS):
            h, _ = jax.checkpoint(_layer)(h, params[i])
    return jnp.mean(h[..., 0] ** 2)


def shapes(scanned=True, dtype=jnp.float32):
    def struct(*shape):
        return jax.ShapeDtypeStruct((LAYERS, *shape) if scanned else shape, dtype)

    layer = {"up": struct(WIDTH, 4 * WIDTH), "down": struct(4 * WIDTH, WIDTH)}
    return layer if scanned else [layer] * LAYERS


SHAPES = jax.ShapeDtypeStruct((16, 8), jnp.float32)  # of the batch


def temp_bytes(fn, params):
    return jax.jit(fn).lower(params, SHAPES).compile().memory_analysis().temp_size_in_bytes


def num_bytes(params):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def hand_written(loss_fn):
    def fn(params, batch):
        def step(acc, micro_batch):
            loss, grads = jax.value_and_grad(loss_fn)(params, micro_batch)
            return jax.tree.map(lambda a, g: a + g.astype(a.dtype), acc, grads), loss

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        acc, losses = lax.scan(step, zeros, batch.reshape(-1, K, 8).swapaxes(0, 1))
        return losses.mean(), jax.tree.map(lambda a: a / K, acc)

    return fn


def peer(loss_fn):
    return microbatching.microbatch(
        jax.value_and_grad(loss_fn),
        argnums=1,
        microbatch_size=16 // K,
        accumulator=microbatching.AccumulationType.MEAN,
    )


def test_scanned_layers_need_no_second_gradient_buffer():
    params = shapes()
    in_place = temp_bytes(optaccum.value_and_grad(transformer_loss, num_microbatches=K), params)
    assert in_place <= 0.4 * temp_bytes(peer(transformer_loss), params)
    assert in_place <= 0.4 * temp_bytes(hand_written(transformer_loss), params)
    assert in_place < 0.5 * num_bytes(params)
    carried = temp_bytes(optaccum.value_and_grad(transformer_loss, num_microbatches=K, in_place=False), params)
    assert carried > num_bytes(params)  # what the comparison would see if references did nothing


def test_terms_with_their_own_weights_need_none_either():
    def loss_fn(params, batch):
        loss = transformer_loss(params, batch)
        rows = optaccum.WeightedMean(loss * len(batch), len(batch))
        return {"a": optaccum.WeightedMean(loss, (batch > 0).sum()), "b": rows}

    params = shapes()
    in_place, carried = (
        temp_bytes(optaccum.value_and_grad(loss_fn, num_microbatches=K, in_place=in_place), params)
        for in_place in (True, False)
    )
    assert in_place < 0.5 * num_bytes(params) < num_bytes(params) < carried


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unrolled_layers_and_narrow_parameters_are_no_worse_than_the_carry(dtype):
    loss_fn = functools.partial(transformer_loss, scanned=False)
    for params, loss in ((shapes(False, dtype), loss_fn), (shapes(True, dtype), transformer_loss)):
        actual = temp_bytes(optaccum.value_and_grad(loss, num_microbatches=K), params)
        assert actual <= 1.01 * temp_bytes(hand_written(loss), params)


# Which form runs.

PARAMS = {"w": jnp.arange(1.0, 5.0).reshape(2, 2), "b": jnp.float32(0.5)}
BATCH = jnp.arange(10.0).reshape(5, 2) / 10


def straight_loss(params, batch, scale=1.0):
    return jnp.mean(jnp.tanh(batch @ params["w"] + params["b"]) ** 2) * scale


def mean_loss(params, batch, scale=1.0):
    """The same with a scan, over one layer."""
    h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w + params["b"]), None), batch, params["w"][None])
    return jnp.mean(h**2) * scale


def is_in_place(loss_fn, *args, **options):
    """Whether references are in the traced program."""
    grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=2, **options)
    return "Ref{" in str(jax.make_jaxpr(grad_fn)(*(args or (PARAMS, BATCH))))


def with_effects(params, batch):
    jax.debug.callback(lambda x: None, batch[0])
    return mean_loss(params, batch)


@pytest.mark.parametrize(
    ("loss_fn", "options", "in_place"),
    [
        (mean_loss, {}, True),
        (mean_loss, {"in_place": False}, False),
        (straight_loss, {}, False),
        (straight_loss, {"in_place": True}, True),
        (mean_loss, {"skip_nonfinite": True}, False),
        (mean_loss, {"return_info": True, "track_noise_scale": True}, False),
        (mean_loss, {"accumulator_dtype": jnp.bfloat16}, False),
        (with_effects, {}, False),
    ],
)
def test_which_form_is_chosen(loss_fn, options, in_place):
    assert is_in_place(loss_fn, **options) == in_place
    actual = optaccum.value_and_grad(loss_fn, num_microbatches=2, **options)(PARAMS, BATCH)[:2]
    expected = jax.value_and_grad(mean_loss)(PARAMS, BATCH)
    assert_trees_close(jax.tree.map(lambda x: x.astype(jnp.float32), actual), expected, rtol=2e-2)


@pytest.mark.parametrize(
    ("loss_fn", "options", "message"),
    [
        (
            mean_loss,
            {"accumulator_dtype": jnp.bfloat16},
            "bfloat16 sum is narrower than its float32 parameter",
        ),
        (with_effects, {}, "has effects"),
    ],
)
def test_in_place_or_raise(loss_fn, options, message):
    with pytest.raises(ValueError, match=f"in_place=True to be possible; got .*{message}.*in_place"):
        optaccum.value_and_grad(loss_fn, num_microbatches=2, in_place=True, **options)(PARAMS, BATCH)


def test_static_slices_fall_back_where_jax_cannot_slice_references():
    def loss_fn(params, batch):
        return mean_loss(params, batch) + jnp.mean((batch @ params["w"][0]) ** 2)

    for in_place in (None, False):
        actual = optaccum.value_and_grad(loss_fn, num_microbatches=2, in_place=in_place)(PARAMS, BATCH)
        assert_trees_close(actual, jax.value_and_grad(loss_fn)(PARAMS, BATCH), rtol=1e-5)


def test_a_collective_over_an_axis_of_vmap():
    def loss_fn(params, batch, scale):
        return mean_loss(params, batch) * lax.psum(scale, "members")

    def vmapped(value_and_grad):
        return jax.vmap(value_and_grad, (None, None, 0), axis_name="members")(PARAMS, BATCH, jnp.arange(3.0))

    actual = vmapped(optaccum.value_and_grad(loss_fn, num_microbatches=2))
    assert_trees_close(actual, vmapped(jax.value_and_grad(loss_fn)), rtol=1e-5)
    with pytest.raises(ValueError, match="members"):
        vmapped(optaccum.value_and_grad(loss_fn, num_microbatches=2, in_place=True))


@pytest.mark.parametrize("in_place", [True, False])
def test_what_the_loss_closes_over_may_be_traced(in_place):
    """A hyperparameter in every mode, an integer under vmap, from inside and outside of jit."""

    def outer(value_and_grad, h, i):
        loss, grads = value_and_grad(lambda p, b: mean_loss(p, b, h) * i.astype(jnp.float32))(PARAMS, BATCH)
        return loss + jnp.sum(grads["w"] ** 2)

    def transformed(value_and_grad):
        fn = functools.partial(outer, value_and_grad)
        batched = jax.vmap(jax.value_and_grad(fn), (None, 0))(0.5, jnp.arange(3))
        return (
            batched,
            jax.grad(lambda h: jax.vmap(fn, (None, 0))(h, jnp.arange(3)).sum())(0.5),
            jax.jit(jax.hessian(fn))(0.5, jnp.int32(2)),
            jax.jvp(lambda h: fn(h, jnp.int32(2)), (0.5,), (1.0,)),
        )

    actual = transformed(functools.partial(optaccum.value_and_grad, num_microbatches=2, in_place=in_place))
    assert_trees_close(actual, transformed(jax.value_and_grad), rtol=1e-4)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_losses_that_are_wrapped(wrap):
    loss_fn = wrap(mean_loss)
    assert is_in_place(loss_fn)
    actual = optaccum.value_and_grad(loss_fn, num_microbatches=2)(PARAMS, BATCH)
    assert_trees_close(actual, jax.value_and_grad(mean_loss)(PARAMS, BATCH), rtol=1e-5)


def test_inside_control_flow():
    def train(value_and_grad):
        def descend(params):
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, value_and_grad(params, BATCH)[1])

        params = lax.fori_loop(0, 2, lambda _, params: descend(params), PARAMS)
        return lax.cond(params["b"] < 9, descend, lambda params: params, params)

    actual = jax.jit(train, static_argnums=0)(optaccum.value_and_grad(mean_loss, num_microbatches=2))
    assert_trees_close(actual, train(jax.value_and_grad(mean_loss)), rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_trees_close(actual, PARAMS, rtol=1e-2)


@pytest.mark.parametrize("in_place", [None, False])
def test_inside_someones_shard_map_gradients_come_as_jax_gives_them_there(in_place):
    """Each device has its own rows and its own weights; a gradient for what all share is the sum of theirs."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec
    batch = jnp.arange(24.0).reshape(12, 2) / 10 - 0.5

    def loss_fn(params, batch):
        losses, weights = jnp.tanh(batch @ params["w"]), (batch > 0).astype(jnp.float32)
        return {
            "a": optaccum.WeightedMean((losses * weights).sum(), weights.sum()),
            "b": optaccum.WeightedMean(mean_loss(params, batch) * len(batch), len(batch)),
        }

    def whole(params, batch):
        terms = loss_fn(params, batch)
        return sum(term.total / term.weight for term in terms.values())

    def on_two_devices(grad_fn):
        mapped = jax.shard_map(grad_fn, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
        return jax.jit(mapped)(PARAMS, batch)

    actual = on_two_devices(optaccum.grad(loss_fn, num_microbatches=3, in_place=in_place))
    assert_trees_close(actual, on_two_devices(jax.grad(whole)), rtol=1e-5)
    averaged = on_two_devices(optaccum.grad(lambda p, b: lax.pmean(mean_loss(p, b), "data"), num_microbatches=3))
    assert_trees_close(averaged, jax.grad(mean_loss)(PARAMS, batch), rtol=1e-4)
    with pytest.raises(AssertionError):
        assert_trees_close(actual, jax.grad(whole)(PARAMS, batch), rtol=1e-2)
