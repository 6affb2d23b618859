"""Micro-batch i of n is batch[i::n]; nothing is padded or dropped, and the way back is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_equal

from optaccum._split import batch_size_of, check_split_options, join, resolve_num_microbatches, split


@pytest.mark.parametrize(("batch_size", "n"), [(8, 1), (8, 4), (8, 8), (11, 4), (7, 5), (3, 2)])
def test_micro_batches_are_strided_and_in_order(batch_size, n):
    batch = {
        "x": jnp.arange(batch_size * 6).reshape(batch_size, 2, 3),
        "none": None,
        "i": jnp.arange(batch_size),
    }
    stacks = split(batch, n)
    micro_batches = [
        jax.tree.map(lambda x, i=i: x[i], stack) for stack in stacks for i in range(stack["i"].shape[0])
    ]
    assert len(micro_batches) == n
    assert len(stacks) == (1 if batch_size % n == 0 else 2)
    for i, micro_batch in enumerate(micro_batches):
        assert_trees_equal(micro_batch, jax.tree.map(lambda x, i=i: x[i::n], batch))
    sizes = [len(m["i"]) for m in micro_batches]
    assert sum(sizes) == batch_size
    assert max(sizes) - min(sizes) <= 1
    contiguous = np.array_split(np.arange(batch_size), n)
    if 1 < n < batch_size:
        assert any(list(a) != list(m["i"]) for a, m in zip(contiguous, micro_batches, strict=True))


@pytest.mark.parametrize(("batch_size", "n"), [(8, 4), (11, 4), (7, 5)])
def test_join_is_the_inverse_of_split(batch_size, n):
    rows = jnp.arange(batch_size * 2).reshape(batch_size, 2)
    stacks = split(rows, n)
    assert_trees_equal(join(stacks), rows)
    by_micro_batch = jnp.concatenate([micro_batch for stack in stacks for micro_batch in stack])
    assert not (by_micro_batch == rows).all()


def test_batches_of_keys_split():
    keys = jax.random.split(jax.random.key(0), 6)
    assert_trees_equal(join(split(keys, 4)), keys)


@pytest.mark.parametrize(("size", "n"), [(4, 2), (3, 3), (8, 1), (100, 1), (1, 8)])
def test_microbatch_size_is_an_upper_bound_met_with_the_fewest(size, n):
    assert resolve_num_microbatches(8, None, size) == n


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ((None, None), ValueError),
        ((2, 2), ValueError),
        ((0, None), ValueError),
        ((None, -1), ValueError),
        ((True, None), TypeError),
        ((2.0, None), TypeError),
    ],
)
def test_split_options_that_are_refused(options, error):
    with pytest.raises(error, match="microbatch"):
        check_split_options(*options)
    check_split_options(np.int64(2), None)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"x": jnp.zeros(3), "y": jnp.zeros(4)}, r"\['x'\].*\['y'\]"),
        ({"x": jnp.zeros(3), "s": jnp.float32(0)}, r"scalar at batch\['s'\]"),
        ({}, "at least one array"),
        (jnp.zeros((0, 3)), "at least one example"),
    ],
)
def test_batches_that_are_refused_name_the_leaf(batch, match):
    with pytest.raises(ValueError, match=match):
        batch_size_of(batch)


def test_more_micro_batches_than_examples_are_refused():
    with pytest.raises(ValueError, match="9 micro-batches for 8 examples"):
        resolve_num_microbatches(8, 9, None)
