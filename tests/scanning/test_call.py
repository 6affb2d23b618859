"""A call's arguments: what is an array, what is static, and what is traced again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close
from scanning_problem import BATCH, PARAMS, mean_loss

import optaccum
from optaccum._scanning.call import Roles, as_indices, join_call, split_call


@pytest.mark.parametrize(("argnums", "expected"), [(1, (1,)), (np.int64(1), (1,)), ([0, -1], (0, -1))])
def test_indices(argnums, expected):
    assert as_indices(argnums, "argnums") == expected


@pytest.mark.parametrize("name", ["argnums", "batch_argnums", "key_argnum", "carry_argnum", "count_argnum"])
def test_indices_that_are_none_are_refused_where_they_are_given(name):
    """A sequence where one argument has the role as well: its first would be taken, the others ignored."""

    def make(index):
        return optaccum.value_and_grad(mean_loss, presplit=True, has_aux=True, **{name: index})

    make(2)
    refused = [True, 2.0, "2", np.array([[2]])]
    refused += [None, ()] if name.endswith("argnums") else [(2, 3), [2], np.array([2])]
    for index in refused:
        with pytest.raises(TypeError, match=f"expected {name} to be an int"):
            make(index)


def test_an_array_of_argnums_is_a_sequence():
    args = PARAMS["w"], BATCH["x"], jnp.float32(0.5)
    grad_fn = functools.partial(optaccum.grad, lambda w, x, s: jnp.mean(jnp.tanh(x @ w) * s), num_microbatches=3)
    several = grad_fn(argnums=(0, 2))(*args)
    assert_trees_close(grad_fn(argnums=np.array([0, 2]))(*args), several)
    assert jax.tree.structure(several) != jax.tree.structure(grad_fn(argnums=0)(*args))


def test_join_undoes_split():
    args = ({"w": jnp.ones(2)}, {"x": jnp.zeros((3, 2))}, "tanh", None, [jnp.ones(1), 2.0])
    call, layout = split_call(Roles((0,), (-4,)), args, {"flag": True, "scale": np.float32(2)})
    joined, kwargs = join_call(layout, call)
    assert jax.tree.structure((joined, kwargs)) == jax.tree.structure((list(args), {"flag": True, "scale": 0}))
    assert joined[2] == "tanh"
    assert kwargs["flag"] is True
    assert type(joined[4][1]) is float
    assert [jnp.shape(leaf) for leaf in call.rest] == [(1,), (), ()]  # arrays and floats


class Unhashable:
    __hash__ = None

    def __init__(self, factor):
        self.factor = factor


def counted_loss(params, batch, *, flag, name, fn, factor, traces, scale=1.0):
    assert isinstance(flag, bool)
    assert isinstance(name, str)
    traces.append(flag)
    return mean_loss(params, batch) * fn(1.0) * factor.factor * (scale if flag else 2 * scale)


def test_what_cannot_be_hashed_is_refused_by_name():
    grad_fn = optaccum.grad(lambda p, b, *args, **kwargs: mean_loss(p, b), num_microbatches=3)
    with pytest.raises(TypeError, match=r"argument 2\[1\].*hashable.*got Unhashable.*Close over it"):
        grad_fn(PARAMS, BATCH, (np.cos, Unhashable(3.0)))
    with pytest.raises(TypeError, match="argument 'factor'"):
        grad_fn(PARAMS, BATCH, factor=Unhashable(3.0))


def test_keyword_arguments_pass_whole():
    factor = functools.partial(int)
    factor.factor = 3.0
    options = {"name": "a", "fn": np.cos, "factor": factor, "scale": np.float32(0.5)}
    traces = []
    grad_fn = optaccum.value_and_grad(functools.partial(counted_loss, traces=traces), num_microbatches=3)
    for flag in (True, False):
        actual = grad_fn(PARAMS, BATCH, flag=flag, **options)
        whole = functools.partial(counted_loss, flag=flag, traces=[], **options)
        assert_trees_close(actual, jax.value_and_grad(whole)(PARAMS, BATCH), rtol=1e-5)
        with pytest.raises(AssertionError):
            assert_trees_close(actual, jax.value_and_grad(mean_loss)(PARAMS, BATCH), rtol=1e-2)
    assert traces.count(True) == traces.count(False) > 0  # anew for each value of what is static
    num_traces = len(traces)
    for flag in (True, False):
        grad_fn(PARAMS, BATCH, flag=flag, **options)
    assert len(traces) == num_traces  # and once for each


def test_numbers_that_are_equal_are_not_the_same():
    def loss_fn(w, x, kind):
        assert kind == 1
        return jnp.mean(w * x) * (3 if isinstance(kind, bool) else 2)

    grad_fn = optaccum.grad(loss_fn, num_microbatches=2)
    assert [float(grad_fn(1.0, jnp.ones(2), one)) for one in (1, True)] == [2.0, 3.0]


def test_arrays_and_floats_that_change_do_not_trace_again():
    traces = []

    def loss_fn(w, x, scale, *, shift):
        assert jnp.result_type(scale * x.astype(jnp.bfloat16)) == jnp.bfloat16  # weakly typed
        traces.append(1)
        return jnp.mean(w * x) * scale + shift

    grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=2)
    values, counts = [], []
    for i in range(3):
        values.append(float(grad_fn(1.0, jnp.ones(4), float(i), shift=jnp.float32(i))[0]))
        counts.append(len(traces))
    assert (values, counts[1:]) == ([0.0, 2.0, 4.0], counts[:1] * 2)
    grad_fn = optaccum.value_and_grad(lambda w, x, power: jnp.mean((w * x) ** power), num_microbatches=2)
    assert [float(grad_fn(2.0, jnp.ones(4), power)[0]) for power in (2, 3)] == [4.0, 8.0]  # ints are static


def test_an_argument_passed_by_name_is_told_to_come_by_position():
    with pytest.raises(ValueError, match="by position"):
        optaccum.grad(mean_loss, num_microbatches=2)(PARAMS, batch=BATCH)


def test_gradients_flow_to_every_array_argument():
    def value(h, shift):
        grad_fn = optaccum.value_and_grad(lambda p, b, h, *, shift: mean_loss(p, b) * h + shift, num_microbatches=3)
        return grad_fn(PARAMS, BATCH, h, shift=shift)[0]

    actual = jax.grad(value, argnums=(0, 1))(0.5, 0.1)
    assert_trees_close(actual, (mean_loss(PARAMS, BATCH), jnp.float32(1)), rtol=1e-5)


def test_arguments_of_numpy_and_python():
    params = {"a": 1.5, "b": np.float64(3), "c": np.array([1 + 2j, 3j], np.complex64)}

    def loss_fn(p, batch, scale):
        return jnp.mean(jnp.abs(p["c"] * batch - p["a"]) ** 2 + p["b"]) * scale["s"]

    batch, scale = np.arange(10.0).reshape(5, 2), {"s": np.array(0.5)}
    actual = optaccum.value_and_grad(loss_fn, num_microbatches=2)(params, batch, scale)
    as_arrays = params | {"b": jnp.float32(3)}, jnp.asarray(batch, jnp.float32), {"s": jnp.float32(0.5)}
    assert_trees_close(actual, jax.value_and_grad(loss_fn)(*as_arrays), rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_trees_close(jax.tree.map(jnp.conj, actual), actual)
