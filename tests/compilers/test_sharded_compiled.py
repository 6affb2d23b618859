"""Parameters sharded over eight devices: what crosses, and what it holds, as the accelerators' compilers have it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from programs import SCANNED, batch, loss_fn

import optaccum
from benchmarks.compiled import temp_copies
from benchmarks.measure import num_bytes
from examples._targets import find

TARGETS = ["v5e:2x4", "h100:1x1x8"]
K, BF16 = 8, jnp.bfloat16
SPECS = {"up": P(None, "data", None), "down": P(None, None, "data")}
TENSOR_SPECS = {"up": P(None, "data", "model"), "down": P(None, "model", "data")}


def compile_for(target, grad_fn, specs=SPECS, shape=(8,), axis_type=AxisType.Auto, rows=("data",)):
    names = ("data", "model")[: len(shape)]
    mesh = Mesh(np.array(find(target).devices).reshape(shape), names, axis_types=(axis_type,) * len(shape))

    def placed(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    num_shards = math.prod(mesh.shape[name] for name in rows)
    args = jax.tree.map(placed, SCANNED, specs), placed(batch(SCANNED, 8 * num_shards), P(rows))
    with jax.set_mesh(mesh):
        compiled = jax.jit(grad_fn).lower(*args).compile()
    counts, temp = optaccum.count_collectives(compiled), temp_copies(compiled, SCANNED)
    print(target, axis_type, counts, round(temp, 2))
    return counts, temp


def grad_fn(**options):
    return optaccum.value_and_grad(loss_fn, **{"num_microbatches": K, "data_axes": "data", **options})


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    ("target", "gather_dtype", "most"),
    [("v5e:2x4", None, 1.55), ("v5e:2x4", BF16, 1.55), ("h100:1x1x8", None, 2.55), ("h100:1x1x8", BF16, 1.9)],
)
def test_window(target, gather_dtype, most, axis_type):
    counts, temp = compile_for(
        target, grad_fn(param_specs=SPECS, gather_dtype=gather_dtype), axis_type=axis_type
    )
    assert not counts.in_loops
    assert dict(counts.outside) == {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 1}
    assert counts.bytes_outside["all-reduce"] < 1024
    assert temp < most
    if axis_type == AxisType.Auto and gather_dtype is not None:  # bytes among eight devices: 6N against 48N
        layers, _ = compile_for(target, grad_fn(data_axes=None))
        assert layers.in_loops
        size = num_bytes(SCANNED)
        assert counts.bytes_outside["all-gather"] <= size * 0.51
        assert counts.bytes_outside["reduce-scatter"] <= size / 8 * 1.01


@pytest.mark.parametrize(("target", "most"), [("v5e:2x4", 0.7), ("h100:1x1x8", 0.9)])
def test_sharded_sums(target, most):
    """Reduced layer by layer, inside the scan over layers."""
    counts, temp = compile_for(target, grad_fn(param_specs=SPECS, gather_dtype=BF16, shard_sums=True))
    assert set(counts.in_loops) == {"reduce-scatter"}
    assert dict(counts.outside) == {"all-gather": 2, "all-reduce": 1}
    assert temp < most


@pytest.mark.parametrize("target", TARGETS)
def test_zero_1(target):
    replicated = jax.tree.map(lambda _: P(), SPECS, is_leaf=lambda x: isinstance(x, P))
    counts, temp = compile_for(target, grad_fn(grad_specs=SPECS), replicated)
    assert not counts.in_loops
    assert dict(counts.outside) == {"reduce-scatter": 2, "all-reduce": 1}
    assert temp < 1.55


@pytest.mark.parametrize("target", TARGETS)
def test_beside_a_tensor_axis(target):
    """What is in the loop is the tensor axis' own; parameters given by their data axes alone take more."""
    counts, temp = compile_for(
        target, grad_fn(param_specs=TENSOR_SPECS, gather_dtype=BF16), TENSOR_SPECS, (4, 2)
    )
    assert set(counts.in_loops) == {"all-reduce"}
    assert dict(counts.outside) == {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 1}
    assert temp < 1.2
    data_alone = {"up": P(None, "data"), "down": P(None, None, "data")}
    more, temp_of_more = compile_for(
        target, grad_fn(param_specs=data_alone, gather_dtype=BF16), TENSOR_SPECS, (4, 2)
    )
    assert more.outside["all-gather"] > 2
    assert temp_of_more > temp


@pytest.mark.parametrize(("target", "most"), [("v5e:2x4", 0.1), ("h100:1x1x8", 0.3)])
def test_layer_by_layer(target, most):
    """Under a bare `jax.jit` sums and gradients are sharded as the parameters."""
    counts, temp = compile_for(target, grad_fn(data_axes=None))
    assert counts.in_loops
    assert temp < most


@pytest.mark.parametrize(("target", "most"), [("v5e:2x4", 0.1), ("h100:1x1x8", 0.35)])
def test_replicas_over_one_axis_and_sharded_over_another(target, most):
    """Rows over both: layer by layer within a replica, one all-reduce of each device's part between the replicas."""
    specs = {"up": P(None, "model", None), "down": P(None, None, "model")}
    counts, temp = compile_for(target, grad_fn(), specs, (2, 4), rows=("data", "model"))
    assert counts.in_loops["all-gather"]
    assert set(counts.outside) == {"all-reduce"}
    assert counts.bytes_outside["all-reduce"] <= num_bytes(SCANNED) / 4 * 1.01
    assert temp < most
