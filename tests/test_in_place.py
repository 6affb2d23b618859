"""Which form of the loop runs, and that both are exact for every kind of loss, from wherever it is called."""

import functools

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_trees_close, assert_trees_equal
from flax import linen as nn
from flax.linen import fp8_ops
from jax import lax

import optaccum

PARAMS = {"w": jnp.arange(1.0, 5.0).reshape(2, 2), "b": jnp.float32(0.5)}
BATCH = jnp.arange(10.0).reshape(5, 2) / 10


def mean_loss(params, batch, scale=1.0):
    return jnp.mean(jnp.tanh(batch @ params["w"] + params["b"]) ** 2) * scale


def is_in_place(loss_fn, *args, **options):
    """Whether references are in the traced program."""
    grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=2, **options)
    return "Ref{" in str(jax.make_jaxpr(grad_fn)(*(args or (PARAMS, BATCH))))


@pytest.mark.parametrize(
    ("loss_fn", "options", "in_place"),
    [
        (mean_loss, {}, True),
        (mean_loss, {"in_place": False}, False),
        (mean_loss, {"skip_nonfinite": True}, False),
        (mean_loss, {"return_info": True, "track_noise_scale": True}, False),
        (mean_loss, {"accumulator_dtype": jnp.bfloat16}, False),
        (lambda p, b: (jax.debug.callback(lambda x: None, b[0]), mean_loss(p, b))[1], {}, False),
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
        (lambda p, b: (jax.debug.callback(lambda x: None, b[0]), mean_loss(p, b))[1], {}, "has effects"),
    ],
)
def test_in_place_or_raise(loss_fn, options, message):
    with pytest.raises(ValueError, match=f"in_place=True cannot be honoured: .*{message}.*in_place"):
        optaccum.value_and_grad(loss_fn, num_microbatches=2, in_place=True, **options)(PARAMS, BATCH)


def test_static_slices_fall_back_where_jax_cannot_slice_references():
    def loss_fn(params, batch):
        return jnp.mean((batch @ params["w"][0]) ** 2) + jnp.sum(params["w"][1:])

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
            "b": mean_loss(params, batch),
        }

    def whole(params, batch):
        terms = loss_fn(params, batch)
        return terms["a"].total / terms["a"].weight + terms["b"]

    def on_two_devices(grad_fn):
        mapped = jax.shard_map(grad_fn, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
        return jax.jit(mapped)(PARAMS, batch)

    actual = on_two_devices(optaccum.grad(loss_fn, num_microbatches=3, in_place=in_place))
    assert_trees_close(actual, on_two_devices(jax.grad(whole)), rtol=1e-5)
    averaged = on_two_devices(
        optaccum.grad(lambda p, b: lax.pmean(mean_loss(p, b), "data"), num_microbatches=3)
    )
    assert_trees_close(averaged, jax.grad(mean_loss)(PARAMS, batch), rtol=1e-4)
    with pytest.raises(AssertionError):
        assert_trees_close(actual, jax.grad(whole)(PARAMS, batch), rtol=1e-2)


def scanned_layers(w, batch):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch, w)[0]


def test_terms_with_their_own_weights_are_in_place_too():
    def loss_fn(w, batch):
        y = scanned_layers(w, batch)
        return {"a": optaccum.WeightedMean((y**2).sum(), (batch > 0).sum()), "b": jnp.mean(y)}

    def temp(in_place):
        shapes = jax.ShapeDtypeStruct((8, 64, 64), jnp.float32), jax.ShapeDtypeStruct((16, 64), jnp.float32)
        grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=4, in_place=in_place)
        return jax.jit(grad_fn).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / (
            8 * 64 * 64 * 4
        )

    assert temp(in_place=True) < 0.5
    assert temp(in_place=False) > 0.9


@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp is deprecated:DeprecationWarning")
@pytest.mark.parametrize("op", [fp8_ops.Fp8DotGeneralOp, fp8_ops.Fp8DirectDotGeneralOp])
def test_fp8_amax_histories_take_the_maximum(op):
    model = nn.Dense(4, dot_general_cls=op)
    rows = jax.random.normal(jax.random.key(0), (6, 8)).at[1, 0].set(40.0)  # in micro-batch 1 of 3
    variables = jax.jit(model.init)(jax.random.key(1), rows)
    state = fp8_ops.OVERWRITE_WITH_GRADIENT

    def loss_fn(variables, rows):
        return jnp.mean(model.apply(variables, rows) ** 2)

    def reduction(path, leaf):
        return "max" if path[0].key == state else "mean"

    def grads(in_place, grad_reduction_fn=reduction):
        options = {"num_microbatches": 3, "grad_reduction_fn": grad_reduction_fn, "in_place": in_place}
        return optaccum.grad(loss_fn, **options)(variables, rows)

    actual = grads(True)
    assert_trees_close(actual, grads(False), rtol=1e-5)
    each = [jax.jit(jax.grad(loss_fn))(variables, rows[i::3])[state] for i in range(3)]
    assert_trees_equal(actual[state], jax.tree.map(lambda *xs: jnp.stack(xs).max(0), *each))
    assert max(float(x.max()) for x in jax.tree.leaves(actual[state])) >= 40
    with pytest.raises(AssertionError):
        assert_trees_close(grads(True, None)[state], actual[state], rtol=1e-2)


@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp is deprecated:DeprecationWarning")
def test_fp8_trains():
    model = nn.Dense(1, dot_general_cls=fp8_ops.Fp8DotGeneralOp)
    rows = jax.random.normal(jax.random.key(0), (32, 8))
    targets = rows @ jnp.linspace(-1, 1, 8)[:, None]
    variables = jax.jit(model.init)(jax.random.key(1), rows)
    state = fp8_ops.OVERWRITE_WITH_GRADIENT

    def loss_fn(variables, batch):
        return jnp.mean((model.apply(variables, batch[0]) - batch[1]) ** 2)

    grad_fn = optaccum.value_and_grad(
        loss_fn,
        num_microbatches=4,
        grad_reduction_fn=lambda path, _: "max" if path[0].key == state else "mean",
    )

    @jax.jit
    def step(variables):
        value, grads = grad_fn(variables, (rows, targets))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads["params"])
        return {"params": params, state: grads[state]}, value

    values = []
    for _ in range(30):
        variables, value = step(variables)
        values.append(float(value))
    assert values[-1] < 0.05 * values[0]
