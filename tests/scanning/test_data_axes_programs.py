"""What compiled programs with `data_axes` hold: one reduction per window; and what cannot be compiled."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from sharded_problem import (
    AUTO,
    KINDS,
    ROWS,
    make_batch,
    make_mesh,
    make_params,
    mean_loss,
    mean_term,
    put,
)

import optaccum

ONCE = ({}, {"all-reduce": 1})
WIDTH = 8


def _layer(h, w):
    return jnp.tanh(h + h @ w), None


def _scanned(params, batch):
    h, _ = lax.scan(jax.checkpoint(_layer), batch["x"] + params["shift"], params["w"])
    return jnp.mean((h - batch["y"]) ** 2)


def _unrolled(params, batch):
    h = batch["x"] + params["shift"]
    for w in params["w"]:
        h, _ = _layer(h, w)
    return jnp.mean((h - batch["y"]) ** 2)


def _structs(mesh, axes, loss_fn, num_layers=3, rows=64, model=None):
    def struct(*shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    if loss_fn is _scanned:
        w = struct(num_layers, WIDTH, WIDTH, spec=P(None, None, model))
    else:
        w = [struct(WIDTH, WIDTH, spec=P(None, model))] * num_layers
    batch = {name: struct(rows, WIDTH, spec=P(axes)) for name in "xy"}
    return {"w": w, "shift": struct(WIDTH, spec=P())}, batch


def _compile(loss_fn, mesh, axes, structs=None, **options):
    options = {"num_microbatches": 2, "data_axes": axes, **options}
    grad_fn = optaccum.value_and_grad(loss_fn, **options)
    return jax.jit(grad_fn).lower(*(structs or _structs(mesh, axes, loss_fn))).compile()


@KINDS
@pytest.mark.parametrize("loss_fn", [_scanned, _unrolled])
@pytest.mark.parametrize(("num_layers", "n"), [(2, 8), (5, 2), (2, 3)])  # 16 rows on each device
def test_gradients_cross_once(kind, loss_fn, num_layers, n):
    mesh, axes = make_mesh(kind)
    structs = _structs(mesh, axes, loss_fn, num_layers)
    compiled = _compile(loss_fn, mesh, axes, structs, num_microbatches=n)
    assert optaccum.count_collectives(compiled)[:2] == ONCE


@pytest.mark.parametrize("loss_fn", [_scanned, _unrolled])
def test_without_data_axes_they_cross_in_the_loop(loss_fn):
    mesh, axes = make_mesh(AUTO)
    compiled = _compile(loss_fn, mesh, axes, data_axes=None)
    assert optaccum.count_collectives(compiled).in_loops["all-reduce"] > 0


@KINDS
def test_two_data_axes_cross_once(kind):
    mesh, axes = make_mesh(kind, "two data axes")
    assert optaccum.count_collectives(_compile(_scanned, mesh, axes))[:2] == ONCE


def _weighted(params, batch):
    return optaccum.WeightedMean(_scanned(params, batch), batch["y"].sum())


OPTIONS = {
    "in place": (_scanned, {"in_place": True}),
    "carry": (_scanned, {"in_place": False}),
    "weighted, with info": (_weighted, {"return_info": True}),
    "skipping": (_scanned, {"skip_nonfinite": True, "return_info": True}),
    "noise scale": (_scanned, {"track_noise_scale": True, "return_info": True}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_cost_no_reduction(option):
    mesh, axes = make_mesh(AUTO)
    loss_fn, options = OPTIONS[option]
    compiled = _compile(loss_fn, mesh, axes, _structs(mesh, axes, _scanned), **options)
    assert optaccum.count_collectives(compiled)[:2] == ONCE


def test_terms_take_one_more_for_their_weights():
    mesh, axes = make_mesh(AUTO)

    def loss_fn(params, batch):
        return {"a": _weighted(params, batch), "b": mean_term(_scanned(params, batch), batch)}

    counts = optaccum.count_collectives(_compile(loss_fn, mesh, axes, _structs(mesh, axes, _scanned)))
    assert counts[:2] == ({}, {"all-reduce": 2})


@pytest.mark.parametrize("moves", [False, True])
def test_what_the_loss_leaves_of_its_carry_does_not_cross(moves):
    mesh, axes = make_mesh(AUTO)

    def loss_fn(params, batch, carry):
        mean = 0.5 * carry["mean"] + batch["x"].mean()
        frozen = carry["frozen"] + mean if moves else carry["frozen"]
        return _scanned(params, batch), ({"frozen": frozen, "mean": mean}, ())

    carry = {"frozen": jax.ShapeDtypeStruct((5, 7), jnp.float32), "mean": jnp.float32(0)}
    structs = (*_structs(mesh, axes, _scanned), carry)
    text = _compile(loss_fn, mesh, axes, structs, has_aux=True, carry_argnum=2).as_text()
    all_reduces = [line for line in text.splitlines() if " all-reduce(" in line]
    assert all_reduces
    assert any("f32[5,7]" in line for line in all_reduces) == moves


def test_tensor_parallel_collectives_stay_as_they_are():
    def in_loops(data, model, data_axes):
        mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=(AUTO,) * 2)
        structs = _structs(mesh, "data", _unrolled, model="model")
        compiled = _compile(_unrolled, mesh, "data", structs, data_axes=data_axes)
        return optaccum.count_collectives(compiled).in_loops, compiled.output_shardings[1]["w"][0].spec

    alone, _ = in_loops(1, 2, None)
    both, spec = in_loops(4, 2, "data")
    assert sum(alone.values()) > 0
    assert both == alone
    assert spec == P(None, "model")
    each_time, _ = in_loops(4, 2, None)
    assert sum(each_time.values()) > sum(alone.values())


def _contiguous(loss_fn, n):
    """The scan that one writes first: micro-batch i is the i-th n-th of the rows."""

    def grad_fn(params, batch):
        def step(total, micro_batch):
            return jax.tree.map(jnp.add, total, jax.grad(loss_fn)(params, micro_batch)), None

        micro_batches = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)
        return lax.scan(step, jax.tree.map(jnp.zeros_like, params), micro_batches)[0]

    return grad_fn


@KINDS
@pytest.mark.parametrize("n", [2, 8])
def test_split_alone_moves_and_adds_nothing(kind, n):
    mesh, axes = make_mesh(kind)
    structs = _structs(mesh, axes, _unrolled, rows=2**17)

    def cost(fn):
        compiled = jax.jit(fn).lower(*structs).compile()
        return compiled.cost_analysis()["flops"], optaccum.count_collectives(compiled)

    whole, _ = cost(jax.value_and_grad(_unrolled))
    split, counts = cost(optaccum.value_and_grad(_unrolled, num_microbatches=n))
    assert 0.99 < n * split / whole < 1.01
    assert set(counts.in_loops) | set(counts.outside) == {"all-reduce"}  # of gradients
    if kind == AUTO:
        contiguous, counts = cost(_contiguous(_unrolled, n))
        assert n * contiguous / whole > 1.9
        assert set(counts.in_loops) | set(counts.outside) != {"all-reduce"}


def _fails(match, mesh=None, axes="data", data_axes="data", params=None, batch=None, jit=False, **options):
    mesh = make_mesh(AUTO)[0] if mesh is None else mesh
    placed = put(mesh, axes, make_params(), make_batch() if batch is None else batch)
    grad_fn = optaccum.value_and_grad(mean_loss, data_axes=data_axes, **{"num_microbatches": 3, **options})
    with pytest.raises(ValueError, match=match):
        (jax.jit(grad_fn) if jit else grad_fn)(placed[0] if params is None else params, placed[1])


@KINDS
def test_no_such_axis(kind):
    mesh, _ = make_mesh(kind)
    _fails(r"data_axes=\('rows',\); found \('data',\).*device_put", mesh, data_axes="rows")
    _fails(r"data_axes=\('data', 'replica'\)", mesh, data_axes=("data", "replica"))


def test_no_mesh():
    with pytest.raises(ValueError, match=r"found no mesh.*jax.set_mesh"):
        optaccum.grad(mean_loss, num_microbatches=2, data_axes="data")(make_params(), make_batch())


def test_inside_shard_map():
    mesh, axes = make_mesh(AUTO)
    grad_fn = optaccum.grad(mean_loss, num_microbatches=2, data_axes=axes)
    mapped = jax.shard_map(grad_fn, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P())
    with pytest.raises(ValueError, match=r"outside any jax.shard_map.*\('data',\) are manual.*pmean"):
        mapped(make_params(), make_batch())


def test_rows_that_do_not_divide():
    batch = jax.tree.map(lambda x: x[: ROWS - 2], make_batch())
    mesh, _ = make_mesh(AUTO)
    grad_fn = optaccum.grad(mean_loss, num_microbatches=2, data_axes="data")
    with pytest.raises(ValueError, match=r"divide over the 4 devices.*got 22 rows"), jax.set_mesh(mesh):
        grad_fn(make_params(), batch)


@pytest.mark.parametrize("options", [{}, {"num_microbatches": None, "microbatch_size": 3}], ids=str)
def test_more_micro_batches_than_rows_on_a_device(options):
    _fails("got [78] micro-batches for 6 examples on each device", **{"num_microbatches": 7, **options})
