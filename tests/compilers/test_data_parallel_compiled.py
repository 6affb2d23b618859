"""One reduction per window on pods and on eight H100, as the program says that will run there."""

import pytest
from jax.sharding import AxisType
from programs import PODS, SCANNED, K, batch, host_transfers, weighted_loss

import optaccum
from benchmarks.compiled import Program, temp_copies
from benchmarks.measure import num_bytes
from examples._targets import find


def data_parallel(grad_fn, target):
    return Program(grad_fn, (SCANNED, batch(SCANNED, len(find(target).devices))), batch=1)


@pytest.mark.parametrize(
    ("target", "axis_type"),
    [
        *((target, AxisType.Auto) for target in PODS),
        ("v5e:2x4", AxisType.Explicit),
        ("h100:1x1x8", AxisType.Explicit),
    ],
)
def test_gradients_cross_once_per_window(target, axis_type):
    grad_fn = optaccum.value_and_grad(weighted_loss, num_microbatches=K, data_axes="data")
    compiled = data_parallel(grad_fn, target).compile(target, axis_type)
    counts = optaccum.count_collectives(compiled)
    assert not counts.in_loops
    assert set(counts.outside) == {"all-reduce"}
    assert counts.outside["all-reduce"] <= 3  # compilers combine them up to a threshold
    assert 0 <= counts.bytes_outside["all-reduce"] - num_bytes(SCANNED) < 1000  # the gradients, and a few scalars
    assert temp_copies(compiled, SCANNED) < 0.8
    assert not host_transfers(compiled)


@pytest.mark.parametrize("target", ["v5e:2x4", "h100:1x1x8"])
def test_without_data_axes_they_cross_in_the_loop(target):
    grad_fn = optaccum.value_and_grad(weighted_loss, num_microbatches=K)
    compiled = data_parallel(grad_fn, target).compile(target)
    counts = optaccum.count_collectives(compiled)
    assert counts.in_loops
    assert sum(counts.bytes_in_loops.values()) > 1000
    assert temp_copies(compiled, SCANNED) > 1.2
