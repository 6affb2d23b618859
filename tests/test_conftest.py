"""The comparisons can fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, assert_trees_equal

TREE = {"w": jnp.arange(3.0), "b": (jnp.int32(1), None)}


def test_equal_trees_are_equal_and_close():
    for compare in assert_trees_equal, assert_trees_close:
        compare(TREE, jax.tree.map(jnp.copy, TREE))
        compare(jax.random.key(0), jax.random.key(0))
        compare(jnp.array([1.0, jnp.inf]), jnp.array([1.0, jnp.inf]))
        compare(np.zeros(2, jax.dtypes.float0), np.zeros(2, jax.dtypes.float0))


@pytest.mark.parametrize("compare", [assert_trees_equal, assert_trees_close])
@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        pytest.param({}, {}, id="no leaves"),
        pytest.param(TREE, {"w": TREE["w"]}, id="structure"),
        pytest.param(TREE, TREE | {"b": [jnp.int32(1), None]}, id="container"),
        pytest.param(jnp.zeros(3), jnp.zeros((1, 3)), id="shape"),
        pytest.param(jnp.zeros(3), jnp.zeros(3, jnp.bfloat16), id="dtype"),
        pytest.param(jnp.zeros(3), jnp.zeros(3).at[1].set(1e-3), id="value"),
        pytest.param(jnp.int32(1_000_000_001), jnp.int32(1_000_000_000), id="integer"),
        pytest.param(jnp.array([jnp.nan]), jnp.array([jnp.nan]), id="NaN"),
        pytest.param(jnp.array([jnp.nan]), jnp.array([1.0]), id="NaN for a number"),
        pytest.param(jnp.array([1.0]), jnp.array([jnp.inf]), id="number for an infinity"),
        pytest.param(jnp.array([-jnp.inf]), jnp.array([jnp.inf]), id="the other infinity"),
        pytest.param(jax.random.key(0), jax.random.key(1), id="key"),
    ],
)
def test_unequal_trees_are_not(compare, actual, expected):
    with pytest.raises(AssertionError):
        compare(actual, expected)


def test_close_is_as_close_as_asked():
    assert_trees_close(jnp.bfloat16(1.0), jnp.bfloat16(1.0078125), rtol=1e-2)
    assert_trees_close(jnp.array([0.0, 1.0]), jnp.array([1e-8, 1.0]), atol=1e-7)
    with pytest.raises(AssertionError):
        assert_trees_close(jnp.bfloat16(1.0), jnp.bfloat16(1.0078125), rtol=1e-3)


def test_eight_devices():
    assert jax.device_count() == 8
