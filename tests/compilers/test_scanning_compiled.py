"""Scanning on the accelerators' compilers: memory of gradients and of whole steps, beside the peer."""

import jax
import pytest
from programs import (
    CHIPS,
    SCANNED,
    UNROLLED,
    K,
    aliased_share,
    batch,
    host_transfers,
    loss_fn,
    peer_grad_fn,
    training_step,
)

import optaccum
from benchmarks.compiled import Program, temp_copies

OURS = optaccum.value_and_grad(loss_fn, num_microbatches=K)


@pytest.mark.parametrize("target", CHIPS)
def test_scanned_gradients_hold_the_sum_alone(target):
    compiled = Program(OURS, (SCANNED, batch(SCANNED))).compile(target)
    peer = Program(peer_grad_fn(), (SCANNED, batch(SCANNED))).compile(target)
    assert temp_copies(compiled, SCANNED) < temp_copies(peer, SCANNED) - 0.9
    assert not host_transfers(compiled)


@pytest.mark.parametrize("target", CHIPS)
def test_a_scanned_step_holds_little_more_than_one_without_accumulation(target):
    program = training_step(OURS, SCANNED)
    compiled = program.compile(target)
    alone = training_step(jax.value_and_grad(loss_fn), SCANNED)
    rows = jax.ShapeDtypeStruct((alone.args[2].shape[0] // K, alone.args[2].shape[1]), "float32")
    alone = alone._replace(args=(*alone.args[:2], rows)).compile(target)
    peer = training_step(peer_grad_fn(), SCANNED).compile(target)
    assert aliased_share(compiled, *program.args[:2]) > 0.999
    assert temp_copies(compiled, SCANNED) < temp_copies(alone, SCANNED) + 0.05
    assert temp_copies(compiled, SCANNED) < temp_copies(peer, SCANNED) - 0.7


@pytest.mark.parametrize("target", CHIPS)
def test_an_unrolled_step_holds_the_sum_as_the_peer_does(target):
    compiled = training_step(OURS, UNROLLED).compile(target)
    peer = training_step(peer_grad_fn(), UNROLLED).compile(target)
    assert 1 < temp_copies(compiled, UNROLLED) < 1.35
    assert temp_copies(compiled, UNROLLED) < temp_copies(peer, UNROLLED) + 0.05
