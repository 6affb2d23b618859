"""Collectives counted in compiled programs, in real program texts, and in texts written to mislead.

`data/cpu_*.hlo.txt` are programs that XLA:CPU compiled for 8 devices, without source locations: `each_layer`
the gradient of a scanned model summed in a scan over micro-batches (JAX 0.10.2), `kinds` a `shard_map` with
one collective of each kind (JAX 0.12.0). `data/gpu_async.hlo.txt` was written by hand, in the form of XLA:GPU
programs (asynchronous pairs, generic async wrappers, a command buffer, a custom fusion), after its
documentation and tests: no GPU was at hand. XLA's own parser reads it.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import optaccum

DATA = pathlib.Path(__file__).parent / "data"
NUM_DEVICES = 8
RING = [(i, (i + 1) % NUM_DEVICES) for i in range(NUM_DEVICES)]


def _mesh():
    return jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def _count(fn, *shapes):
    """`fn` on each device's rows of arrays sharded over "data"."""
    mesh = _mesh()
    step = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False))
    args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, P("data"))) for s in shapes]
    return optaccum.count_collectives(step.lower(*args).compile())


def _psum(x):
    return jax.lax.psum(x, "data")


def _model(weights, x, layer=lambda h, w: (jnp.tanh(h @ w), None)):
    return jnp.mean(jax.lax.scan(layer, x, weights)[0] ** 2)


def _sum_grads(weights, micro_batches):
    def body(grad_sum, x):
        return grad_sum + jax.grad(_model)(weights, x), None

    return jax.lax.scan(body, jnp.zeros_like(weights), micro_batches)[0]


def _sum_grads_then_reduce(weights, micro_batches):
    return _psum(_sum_grads(jax.lax.pcast(weights, "data", to="varying"), micro_batches))


@pytest.mark.parametrize(
    ("once", "in_loops", "outside"), [(False, {"all-reduce": 1}, {}), (True, {}, {"all-reduce": 1})]
)
def test_gradient_reduced_each_layer_and_once(once, in_loops, outside):
    mesh = _mesh()
    weights = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32, sharding=NamedSharding(mesh, P()))
    batch = jax.ShapeDtypeStruct((2, 16, 4), jnp.float32, sharding=NamedSharding(mesh, P(None, "data")))
    fn = _sum_grads
    if once:
        fn = jax.shard_map(_sum_grads_then_reduce, mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=P())
    counts = optaccum.count_collectives(jax.jit(fn).lower(weights, batch).compile())
    assert counts == (in_loops, outside)


KINDS = {
    "all-reduce": _psum,
    "all-gather": lambda x: jax.lax.all_gather(x, "data").sum(0),
    "reduce-scatter": lambda x: jnp.tile(jax.lax.psum_scatter(x, "data", tiled=True), NUM_DEVICES),
    "all-to-all": lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True),
    "collective-permute": lambda x: jax.lax.ppermute(x, "data", RING),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_inside_and_outside(name):
    def fn(x):
        x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(KINDS[name](x)), x)
        return jnp.cos(KINDS[name](jnp.cos(KINDS[name](x))))

    assert _count(fn, (64,)) == ({name: 1}, {name: 2})


def test_no_collectives():
    counts = _count(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x * 2, x), (64,))
    assert counts == ({}, {})
    assert counts.in_loops["all-reduce"] == counts.outside["all-reduce"] == 0
    assert counts == ({}, {}), "asking for an absent name adds it"


def test_nested_loops():
    def inner(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(_psum(x)), x)

    def outer(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: KINDS["all-gather"](inner(x)), x)

    assert _count(inner, (64,)) == ({"all-reduce": 1}, {})
    assert _count(outer, (64,)) == ({"all-reduce": 1, "all-gather": 1}, {})
    assert _count(lambda x: KINDS["all-gather"](inner(x)), (64,)) == ({"all-reduce": 1}, {"all-gather": 1})


def _branch(x):
    """Each device takes the branch that the sum over devices says, so that all take the same."""
    return jax.lax.cond(_psum(x.sum()) > 0, KINDS["all-to-all"], KINDS["collective-permute"], x)


def test_every_branch_of_a_conditional():
    branches = {"all-to-all": 1, "collective-permute": 1, "all-reduce": 1}
    assert _count(_branch, (64,)) == ({}, branches)
    assert _count(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: _branch(x), x), (64,)) == (branches, {})


def test_loop_condition():
    def fn(x):
        return jax.lax.while_loop(lambda x: _psum(x.sum()) < 10, lambda x: x + 1, x)

    assert _count(fn, (64,)) == ({"all-reduce": 1}, {})


def test_rematerialised_collectives_are_counted_again():
    def layer(h, w):
        return jnp.tanh(KINDS["all-gather"](jnp.sin(h)) * w), None

    def count(layer):
        return _count(jax.grad(lambda w, x: _model(w, x, layer).sum()), (64, 8), (64,))

    kept = count(layer)
    remat = count(jax.checkpoint(layer))
    assert kept.outside == remat.outside
    assert remat.in_loops["all-gather"] == kept.in_loops["all-gather"] + 1


@pytest.mark.parametrize(
    ("name", "in_loops", "outside"),
    [
        ("cpu_each_layer", {"all-reduce": 1}, {}),
        (
            "cpu_kinds",
            {"all-reduce": 1, "all-gather": 1, "collective-permute": 1},
            {"all-reduce": 1, "reduce-scatter": 1, "all-to-all": 1},
        ),
        (
            "gpu_async",
            {"all-gather": 1, "all-to-all": 1, "collective-permute": 1, "reduce-scatter": 1},
            {"all-reduce": 1, "reduce-scatter": 1},
        ),
    ],
)
def test_program_texts(name, in_loops, outside):
    text = (DATA / f"{name}.hlo.txt").read_text()
    assert optaccum.count_collectives(text) == (in_loops, outside)
    # Without the percent signs, as HLO is printed in short, and with every loop unmade.
    assert optaccum.count_collectives(text.replace("%", "")) == (in_loops, outside)
    unmade = re.sub(r" while\((.*), condition=%?[\w.\-]+, body=(%?[\w.\-]+)", r" call(\1, to_apply=\2", text)
    all_outside = {kind: in_loops.get(kind, 0) + outside.get(kind, 0) for kind in {**in_loops, **outside}}
    assert optaccum.count_collectives(unmade) == ({}, all_outside)


def _module(entry, *computations):
    header = "HloModule m, entry_computation_layout={(f32[8]{0})->f32[8]{0}}"
    return "\n\n".join(
        [header, *computations, _computation("main", entry).replace("%main", "ENTRY %main", 1)]
    )


def _computation(name, *lines):
    body = "\n".join(f"  {line}" for line in ["%p = f32[8]{0} parameter(0)", *"\n".join(lines).split("\n")])
    return f"%{name} (p: f32[8]) -> f32[8] {{\n{body}\n}}"


REDUCE = "ROOT %r = f32[8]{0} all-reduce(%p), replica_groups={}, to_apply=%sum"
SUM = "%sum (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  ROOT %y = f32[] parameter(1)\n}"


@pytest.mark.parametrize(
    ("entry", "in_loops", "outside"),
    [
        ("ROOT %a = f32[8]{0} add(%p, %p)", 0, 0),  # nothing runs %reduce
        ("%a = f32[8]{0} call(%p), to_apply=%reduce", 0, 1),
        ("%a = f32[8]{0} call(%p), to_apply=%reduce\n%b = f32[8]{0} call(%a), to_apply=%reduce", 0, 2),
        ("%a = f32[8]{0} call(%p), to_apply=%twice\n%b = f32[8]{0} call(%a), to_apply=%twice", 0, 4),
        ("%a = f32[8]{0} while(%p), condition=%plain, body=%reduce\n" + REDUCE, 1, 1),
        ("%a = f32[8]{0} while(%p), condition=%reduce, body=%twice", 3, 0),
        ("%a = f32[8]{0} while(%p), condition=%plain, body=%loop\n" + REDUCE, 1, 1),
        (
            "%a = f32[8]{0} call(%p), to_apply=%reduce\n"
            "%b = f32[8]{0} while(%p), condition=%plain, body=%reduce",
            1,
            1,
        ),
        ("%a = f32[8]{0} call(%p), to_apply=%loop", 1, 0),
        ("%a = f32[8]{0} fusion(%p), kind=kCustom, calls=%reduce", 0, 1),
        ("%a = f32[8]{0} conditional(%p, %p), branch_computations={%reduce, %twice, %plain}", 0, 3),
        ("%a = f32[8]{0} conditional(%p, %p), branch_computations={%reduce, %reduce}", 0, 2),
        ("%a = f32[8]{0} conditional(%p), true_computation=%reduce, false_computation=%loop", 1, 1),
        ('%a = f32[8]{0} custom-call(%p), called_computations={%reduce}, custom_call_target="f"', 0, 1),
        (
            "%s = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%p), calls=%reduce\n"
            "%u = ((f32[8]{0}), f32[8]{0}, u32[]) async-update(%s), calls=%reduce\n"
            "%d = f32[8]{0} async-done(%u), calls=%reduce",
            0,
            1,
        ),
        (
            "%s = ((f32[8]{0}), f32[8]{0}, u32[]) call-start(%p), to_apply=%twice\n"
            "%d = f32[8]{0} call-done(%s)",
            0,
            2,
        ),
        ("%s = f32[8]{0} all-reduce-start(%p), to_apply=%sum\n%d = f32[8]{0} all-reduce-done(%s)", 0, 1),
        # Tiled layouts, tuples, comments, operands printed with their types, a wrapped line.
        ("%a = (f32[8]{0:T(8,128)(2,1)S(1)}, /*index=1*/f32[8]{0:T(256)}) all-reduce(%p, %p)", 0, 1),
        ("%a = f32[8]{0} all-reduce((f32[8]{0}, f32[]) %p), to_apply=%sum", 0, 1),
        ("%a = f32[8]{0}\n    all-reduce(%p), control-predecessors={%reduce},\n    to_apply=%sum", 0, 1),
        # Names that are not operations.
        ("%all-reduce.1 = f32[8]{0} add(%p, %p)\n%b = f32[8]{0} negate(%all-reduce.1)", 0, 0),
        ('%a = f32[8]{0} negate(%p), metadata={op_name="x = f32[8] all-reduce(y), calls=%reduce"}', 0, 0),
        ('%a = f32[8]{0} negate(%p), metadata={op_name="\\", calls=%reduce, x=\\""}', 0, 0),
        ("%a = f32[8]{0} negate(%p), control-predecessors={%reduce}", 0, 0),
        ("%a = f32[8]{0} all-reduce-fusion(%p)", 0, 0),
        ("%a = (f32[8]{0}, u32[], token[]) send(%p, %t), channel_id=1", 0, 0),
    ],
)
def test_what_counts(entry, in_loops, outside):
    computations = [
        SUM,
        _computation("plain", "ROOT %a = f32[8]{0} negate(%p)"),
        _computation("reduce", REDUCE),
        _computation("twice", "%a = f32[8]{0} call(%p), to_apply=%reduce", REDUCE),
        _computation("loop", "ROOT %w = f32[8]{0} while(%p), condition=%plain, body=%reduce"),
    ]
    expected = tuple({"all-reduce": n} if n else {} for n in (in_loops, outside))
    assert optaccum.count_collectives(_module(entry, *computations)) == expected


@pytest.mark.parametrize(
    "name",
    [
        "all-gather",
        "all-reduce",
        "all-to-all",
        "collective-broadcast",
        "collective-permute",
        "ragged-all-to-all",
        "reduce-scatter",
    ],
)
def test_names(name):
    assert optaccum.count_collectives(_module(f"%a = f32[8]{{0}} {name}(%p)")) == ({}, {name: 1})
    pair = f"%a = (f32[8], f32[8]) {name}-start(%p)\n%b = f32[8]{{0}} {name}-done(%a)"
    assert optaccum.count_collectives(_module(pair)) == ({}, {name: 1})


def test_modules_of_one_program_add_up():
    first = _module("%a = f32[8]{0} call(%p), to_apply=%f", _computation("f", REDUCE))
    second = _module(
        "%a = f32[8]{0} call(%p), to_apply=%f", _computation("f", "ROOT %a = f32[8] all-gather(%p)")
    )
    both = optaccum.count_collectives(first + "\n\n" + second)
    assert both == ({}, {"all-reduce": 1, "all-gather": 1})


class _NoText:
    def as_text(self):
        return None


@pytest.mark.parametrize(
    ("compiled", "error", "message"),
    [
        (jax.jit(jnp.sin), TypeError, r"lower\(\*args\)\.compile\(\)"),
        (None, TypeError, "NoneType"),
        (jax.jit(jnp.sin).lower(1.0), ValueError, "compiled first"),
        ("", ValueError, "ENTRY"),
        (_NoText(), ValueError, "no text"),
        (_module("%a = f32[8]{0} call(%p), to_apply=%gone"), ValueError, "'gone'.*cut short"),
        (_module("%a = f32[8]{0} all-red"), ValueError, "cannot read"),
    ],
)
def test_errors(compiled, error, message):
    with pytest.raises(error, match=message):
        optaccum.count_collectives(compiled)
