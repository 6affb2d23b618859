"""optaccum.nnx.value_and_grad: any arguments differentiated, objects that share, what the loss sows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, assert_trees_equal
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optaccum
import optaccum.nnx

X = jax.random.normal(jax.random.key(0), (8, 4))
N = 4
KERNEL = nnx.PathContains("kernel")


def linear(seed):
    return nnx.Linear(4, 4, rngs=nnx.Rngs(seed))


def arguments():
    towers = {"a": linear(1), "b": linear(2), "shift": jnp.arange(4.0)}
    return X, linear(0), towers, nnx.Param(jnp.float32(0.7))


def loss_fn(x, model, towers, scale):
    h = towers["b"](jnp.tanh(towers["a"](model(x)) + towers["shift"]))
    return scale[...] * jnp.mean((h - x) ** 2), h


@pytest.mark.parametrize(
    "argnums",
    [
        1,
        np.int64(1),
        [1],
        (2, 1),
        nnx.DiffState(1, KERNEL),
        (3, nnx.DiffState(2, KERNEL)),
        pytest.param((-1, -2), id="from the end"),
    ],
    ids=str,
)
def test_differentiates_any_arguments(argnums):
    plain = int(argnums) if isinstance(argnums, np.int64) else argnums  # NNX takes ints alone
    from_the_front = (3, 2) if plain == (-1, -2) else plain
    (loss, h), grads = nnx.value_and_grad(loss_fn, argnums=from_the_front, has_aux=True)(*arguments())
    grad_fn = optaccum.nnx.value_and_grad(loss_fn, argnums=argnums, batch_argnums=0, has_aux=True, num_microbatches=N)
    args = arguments()
    actual = grad_fn(*args)
    assert_trees_close(actual, ((loss, h), grads), rtol=1e-5, atol=1e-6)
    assert_trees_equal(nnx.state(args[1:]), nnx.state(arguments()[1:]))
    if isinstance(grads, tuple) and len(grads) > 1:
        assert jax.tree.structure(grads) != jax.tree.structure(grads[::-1])  # the order can be seen


@pytest.mark.parametrize("argnums", [(0, 2), (-3, -1)], ids=str)
def test_the_callers_micro_batches_as_many_as_there_are(argnums):
    first, count = argnums

    def counted_loss_fn(model, x, count):
        model.calls[...] += 1
        return jnp.mean(model(x) ** 2)

    def make():
        model = linear(0)
        model.calls = nnx.Variable(jnp.int32(0))
        return model

    grad_fn = optaccum.nnx.value_and_grad(
        counted_loss_fn, argnums=first, batch_argnums=first + 1, count_argnum=count, presplit=True
    )
    model, x = make(), X.reshape(4, 2, 4)
    results = grad_fn(model, x, 3)
    assert int(model.calls[...]) == 3
    assert_trees_close(results, nnx.value_and_grad(counted_loss_fn)(make(), X[:6], 3), rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_trees_close(results, nnx.value_and_grad(counted_loss_fn)(make(), X, 3), rtol=1e-5)


def test_a_keyword_argument_is_no_obstacle():
    *_, towers, scale = arguments()
    grad_fn = optaccum.nnx.value_and_grad(loss_fn, argnums=1, batch_argnums=0, has_aux=True, num_microbatches=N)
    by_name = grad_fn(X, linear(0), scale=scale, towers=towers)
    assert_trees_equal(by_name, grad_fn(X, linear(0), towers, scale))


@pytest.mark.parametrize("argnums", [0, 1, (0, 1), (1, 0)], ids=str)
def test_what_two_objects_share_stays_one(argnums):
    def shared_loss_fn(first, second, x):
        return jnp.mean(second(first(x)) ** 2), optaccum.Stack(first.mean[...])

    def make():
        first, second = (nnx.BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0)) for _ in range(2))
        second.scale, second.mean = first.scale, first.mean
        return first, second

    first, second = make()
    grad_fn = optaccum.nnx.value_and_grad(
        shared_loss_fn, argnums=argnums, batch_argnums=2, has_aux=True, num_microbatches=N
    )
    (_, means), grads = grad_fn(first, second, X)
    assert second.scale is first.scale
    assert second.mean is first.mean
    one, two = make()
    plain_fn = nnx.value_and_grad(shared_loss_fn, argnums=(0, 1), has_aux=True)
    results = [plain_fn(one, two, X[i::N]) for i in range(N)]
    assert_trees_close(means, jnp.stack([aux.value for (_, aux), _ in results]))
    assert_trees_close(first.mean[...], one.mean[...])
    assert not (means[0] == means[1]).all()
    # A shared parameter's gradient is that of both uses, in the first of the objects that are differentiated.
    scale = jnp.mean(jnp.stack([plain[0]["scale"][...] for _, plain in results]), 0)
    own = grads if argnums in (0, 1) else grads[argnums.index(0)]
    assert_trees_close(own["scale"][...], scale, rtol=1e-4)
    alone = nnx.value_and_grad(shared_loss_fn, has_aux=True)(*[nnx.clone(x) for x in make()], X[::N])[1]
    assert not jnp.allclose(alone["scale"][...], results[0][1][0]["scale"][...], rtol=1e-2)


class Sowing(nnx.Module):
    """A layer that sows what it computes."""

    def __init__(self):
        self.linear = linear(3)

    def __call__(self, x):
        h = jnp.tanh(self.linear(x))
        self.sow(nnx.Intermediate, "hidden", h)
        self.linear.sow(nnx.Intermediate, "largest", optaccum.Max(jnp.abs(h).max()))
        return h


def sown_in(model):
    return jax.tree.leaves(nnx.state(model, nnx.Intermediate))


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("evaluated", [False, True], ids=["fresh", "evaluated before"])
@pytest.mark.parametrize("data_axes", [None, "data"])
def test_what_the_loss_sows_is_the_whole_batchs(evaluated, data_axes):
    def sowing_loss_fn(model, x):
        return jnp.mean(model(x) ** 2)

    whole, model = Sowing(), Sowing()
    loss, grads = nnx.value_and_grad(sowing_loss_fn)(whole, X)
    grad_fn = optaccum.nnx.value_and_grad(sowing_loss_fn, num_microbatches=2, data_axes=data_axes)
    x = X
    if data_axes:
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
    for _ in range(2):  # again: nothing piles up
        if evaluated:
            model(2 * X)
        assert_trees_close(grad_fn(model, x), (loss, grads), rtol=1e-5)
        assert_trees_close(sown_in(model), sown_in(whole))
    nnx.pop(model, nnx.Intermediate)
    model(2 * X)
    with pytest.raises(AssertionError):
        assert_trees_close(sown_in(model), sown_in(whole))


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_is_sown_under_a_weighted_loss_says_how_it_combines():
    class Bare(Sowing):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "mean", x.mean())
            return self.linear(x)

    def weighted(model, x):
        return optaccum.WeightedMean(model(x).sum(), x.shape[0])

    with pytest.raises(TypeError, match=r"mean.*wrapped in"):
        optaccum.nnx.value_and_grad(weighted, num_microbatches=N)(Bare(), X)

    def popped(model, x):
        loss = weighted(model, x)
        nnx.pop(model, nnx.Intermediate)
        return loss

    model = Bare()
    model(X)
    optaccum.nnx.value_and_grad(popped, num_microbatches=N)(model, X)
    assert not nnx.to_flat_state(nnx.state(model, nnx.Intermediate))


def test_variables_that_the_loss_takes_away_are_named_with_the_way_out():
    model = linear(0)
    model.seen = nnx.Cache(jnp.zeros(3))

    def taking(model, x):
        nnx.pop(model, nnx.Cache)
        return jnp.mean(model(x))

    with pytest.raises(TypeError, match=r"removes seen\..*nnx\.pop"):
        optaccum.nnx.value_and_grad(taking, num_microbatches=N)(model, X)
    assert nnx.pop(model, nnx.Cache)
    optaccum.nnx.value_and_grad(taking, num_microbatches=N)(model, X)


@pytest.mark.parametrize(
    ("argnums", "error", "match"),
    [
        ((0, nnx.DiffState(0, KERNEL)), ValueError, "argument 0 has two"),
        (1, ValueError, "argnums and batch_argnums"),
        (True, TypeError, "argnums to be an int"),
        ("model", TypeError, "argnums to be an int"),
        (nnx.DiffState("model", KERNEL), TypeError, "argnums to be an int"),
        ((), TypeError, "argnums to be an int"),
        (None, TypeError, "argnums to be an int"),
        (nnx.Param, TypeError, "argnums to be an int"),
    ],
    ids=str,
)
def test_argnums_that_cannot_be_are_refused_at_once(argnums, error, match):
    with pytest.raises(error, match=match):
        optaccum.nnx.value_and_grad(lambda model, x: 0.0, argnums=argnums, num_microbatches=2)


@pytest.mark.parametrize(("option", "value"), [("argnums", 2), ("batch_argnums", 2), ("key_argnum", 2)])
def test_an_argument_that_is_not_there_is_named(option, value):
    grad_fn = optaccum.nnx.value_and_grad(lambda model, x: 0.0, num_microbatches=2, **{option: value})
    with pytest.raises(ValueError, match=rf"{option}.* within the call's 2 positional arguments.*got 2"):
        grad_fn(linear(0), X)
