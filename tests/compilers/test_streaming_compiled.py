"""Streaming on the accelerators' compilers: memory, passes over it, donated buffers, host transfers."""

import jax
import optax
import pytest
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from programs import CHIPS, aliased_share, host_transfers

import optaccum
from benchmarks.compiled import INNER, Program, streaming_programs, temp_copies
from benchmarks.measure import num_bytes
from benchmarks.streaming import MULTI, OURS, STANDARD
from benchmarks.traffic import count_traffic
from examples._targets import find


@pytest.mark.parametrize("target", CHIPS)
def test_apply_gradients_touches_the_sum_alone_until_it_emits(target):
    (program,) = streaming_programs(OURS, INNER["AdamW"]())
    params, state, _ = program.args
    compiled = program.compile(target)
    assert temp_copies(compiled, params) < 0.05
    assert aliased_share(compiled, params, state) > 0.999
    assert not host_transfers(compiled)
    each_call, emit = (number / num_bytes(params) for number in count_traffic(compiled.as_text()))
    assert 3 <= each_call < 3.4  # two reads and a write; TPU reads some of the sum ahead, for an emit that may not come
    assert 6 < emit < 7.1

    undonated = program._replace(donate=()).compile(target)
    assert aliased_share(undonated, params, state) == 0
    assert temp_copies(undonated, params) + 4 > temp_copies(compiled, params) + 3.9


@pytest.mark.parametrize("target", CHIPS)
def test_multi_steps_runs_the_optimizer_in_every_call_but_holds_nothing_besides(target):
    (program,) = streaming_programs(MULTI, INNER["AdamW"]())
    compiled = program.compile(target)
    each_call, emit = (number / num_bytes(program.args[0]) for number in count_traffic(compiled.as_text()))
    assert each_call >= 8.9
    assert emit == 0
    assert temp_copies(compiled, program.args[0]) < 0.05  # three copies on CPU


@pytest.mark.parametrize("target", CHIPS)
def test_update_holds_its_updates(target):
    (program,) = streaming_programs(STANDARD, INNER["AdamW"]())
    compiled = program.compile(target)
    assert 0.95 < temp_copies(compiled, program.args[0]) < 1.1
    each_call, _ = count_traffic(compiled.as_text())
    assert 6.9 < each_call / num_bytes(program.args[0]) < 7.4


@pytest.mark.parametrize("target", CHIPS)
def test_a_transfer_to_the_host_is_seen(target):
    args = (jax.ShapeDtypeStruct((1024, 1024), "float32"),)
    sends = Program(lambda x: jax.device_put(x + 1, jax.memory.Space.Host), args)
    assert host_transfers(sends.compile(target))
    assert not host_transfers(Program(lambda x: x + 1, args).compile(target))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("target", ["v5e:2x4", "h100:1x1x8"])
def test_with_sharded_parameters_nothing_crosses(target, axis_type):
    """FSDP: sums and optimizer state lie as the parameters, and the emit gathers nothing."""
    mesh = Mesh(find(target).devices, ("data",), axis_types=(axis_type,))
    (program,) = streaming_programs(OURS, INNER["AdamW"]())
    params = program.args[0]

    def compile_with(specs):
        def placed(x, spec):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec if x.ndim > 1 else P()))

        args = [
            jax.tree.map(lambda x, spec=spec: placed(x, spec), arg)
            for arg, spec in zip(program.args, specs, strict=True)
        ]
        with jax.set_mesh(mesh):
            compiled = jax.jit(program.fn, donate_argnums=program.donate).lower(*args).compile()
        return optaccum.count_collectives(compiled), temp_copies(compiled, params)

    counts, temp = compile_with([P("data"), P("data"), P("data")])
    assert not counts.in_loops
    assert not counts.outside
    assert temp < 0.1  # of all parameters; less than a device's part of them
    if axis_type == AxisType.Auto:  # Explicit types refuse a state that lies in another way
        counts, _ = compile_with([P("data"), P(None, "data"), P(None, "data")])
        assert counts.outside


def rows_last(inner):
    """The recipe of docs/memory.md."""

    def pin(tree):
        return jax.tree.map(
            lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if x.ndim > 1 else x, tree
        )

    def update(updates, state, params=None, **extra_args):
        updates, state = inner.update(pin(updates), pin(state), pin(params), **extra_args)
        return pin(updates), pin(state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def test_layouts_that_muon_prefers_cost_every_call_until_told():
    def each_call(inner):
        (program,) = streaming_programs(OURS, inner)
        compiled, params = program.compile("h100:1x1x1"), program.args[0]  # v5e: the same, in minutes
        return count_traffic(compiled.as_text()).each_call / num_bytes(params), temp_copies(compiled, params)

    passes, temp = each_call(rows_last(INNER["Muon"]()))
    assert passes < 3.1
    assert temp < 2.2
    passes, temp = each_call(INNER["Muon"]())
    assert passes > 6
    assert temp > 2.4
