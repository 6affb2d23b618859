"""Micro-batch i of n is batch[i::n]; nothing is padded or dropped, and the way back is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_equal

import optaccum
from optaccum._scanning.split import (
    batch_size_of,
    check_split_options,
    join,
    resolve_num_microbatches,
    split,
)


def micro_batches_of(batch, n):
    """The micro-batches of each group."""
    return [[group.take(i) for i in range(group.count)] for group in split(batch, n)]


@pytest.mark.parametrize(("batch_size", "n"), [(8, 1), (8, 4), (8, 8), (11, 4), (7, 5), (3, 2)])
def test_micro_batches_are_strided_and_in_order(batch_size, n):
    batch = {
        "x": jnp.arange(batch_size * 6).reshape(batch_size, 2, 3),
        "none": None,
        "i": jnp.arange(batch_size),
    }
    groups = micro_batches_of(batch, n)
    micro_batches = [micro_batch for group in groups for micro_batch in group]
    assert len(micro_batches) == n
    assert len(groups) == (1 if batch_size % n == 0 else 2)
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
    groups = micro_batches_of(rows, n)
    assert_trees_equal(join([jnp.stack(group) for group in groups]), rows)
    by_micro_batch = jnp.concatenate([micro_batch for group in groups for micro_batch in group])
    assert not (by_micro_batch == rows).all()


def test_batches_of_keys_split():
    keys = jax.random.split(jax.random.key(0), 6)
    assert_trees_equal(join([jnp.stack(group) for group in micro_batches_of(keys, 4)]), keys)


@pytest.mark.parametrize("in_place", [True, False])
def test_the_batch_is_not_copied(in_place):
    batch, w = jnp.zeros((512, 1024)), jnp.zeros((1024, 4))

    def loss_fn(w, x):
        return jnp.mean(jnp.tanh(x @ w))

    def temp_in_batches(grad_fn):
        compiled = jax.jit(grad_fn).lower(w, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes / batch.nbytes

    def scanned(w, batch):  # what it would take to scan over batch[i::8] instead
        xs = batch.reshape(64, 8, 1024).swapaxes(0, 1)
        return jax.lax.scan(lambda g, x: (g + jax.grad(loss_fn)(w, x), None), jnp.zeros_like(w), xs)[0]

    assert temp_in_batches(optaccum.grad(loss_fn, num_microbatches=8, in_place=in_place)) < 0.25
    assert temp_in_batches(scanned) > 1


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
