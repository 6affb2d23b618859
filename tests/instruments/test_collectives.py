"""Collectives counted in compiled programs, in real program texts, and in texts written to mislead.

`data/*.hlo.txt` are programs compiled for 8 devices, without source locations. CPU: `each_layer` the gradient of a
scanned model summed in a scan over micro-batches (JAX 0.10.2), `kinds` a `shard_map` with one collective of each kind
(JAX 0.12.0). GPU (an H100) and TPU (a v5e), compiled without one, and without what holds neither a collective nor a
loop: `micro_step` the gradient of three scanned layers and `apply_gradients`, parameters sharded over the devices, the
norm clipped; `once` and `kinds` each a `shard_map`.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
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
    assert counts[:2] == (in_loops, outside)
    num_bytes = 4 * 4 * 4 * (3 if once else 1)
    assert counts[2:] == tuple(dict.fromkeys(where, num_bytes) for where in (in_loops, outside))


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

    # 8 rows of f32 on each device: all of them, or one.
    num_bytes = {"all-gather": 256, "reduce-scatter": 4}.get(name, 32)
    assert _count(fn, (64,)) == ({name: 1}, {name: 2}, {name: num_bytes}, {name: 2 * num_bytes})


def test_no_collectives():
    counts = _count(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x * 2, x), (64,))
    assert counts == ({}, {}, {}, {})
    assert counts.in_loops["all-reduce"] == counts.outside["all-reduce"] == 0
    assert counts == ({}, {}, {}, {}), "asking for an absent name adds it"


def test_nested_loops():
    def inner(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(_psum(x)), x)

    def outer(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: KINDS["all-gather"](inner(x)), x)

    assert _count(inner, (64,))[:2] == ({"all-reduce": 1}, {})
    assert _count(outer, (64,))[:2] == ({"all-reduce": 1, "all-gather": 1}, {})
    assert _count(lambda x: KINDS["all-gather"](inner(x)), (64,))[:2] == (
        {"all-reduce": 1},
        {"all-gather": 1},
    )


def _branch(x):
    """Each device takes the branch that the sum over devices says, so that all take the same."""
    return jax.lax.cond(_psum(x.sum()) > 0, KINDS["all-to-all"], KINDS["collective-permute"], x)


def test_every_branch_of_a_conditional():
    branches = {"all-to-all": 1, "collective-permute": 1, "all-reduce": 1}
    assert _count(_branch, (64,))[:2] == ({}, branches)
    assert _count(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: _branch(x), x), (64,))[:2] == (branches, {})


def test_loop_condition():
    def fn(x):
        return jax.lax.while_loop(lambda x: _psum(x.sum()) < 10, lambda x: x + 1, x)

    assert _count(fn, (64,))[:2] == ({"all-reduce": 1}, {})


def test_rematerialised_collectives_are_counted_again():
    def layer(h, w):
        return jnp.tanh(KINDS["all-gather"](jnp.sin(h)) * w), None

    def count(layer):
        return _count(jax.grad(lambda w, x: _model(w, x, layer).sum()), (64, 8), (64,))

    kept = count(layer)
    remat = count(jax.checkpoint(layer))
    assert kept.outside == remat.outside
    assert remat.in_loops["all-gather"] == kept.in_loops["all-gather"] + 1


@pytest.mark.parametrize("scanned", [False, True])
def test_what_an_emit_does_is_in_no_loop_but_that_of_the_steps(scanned):
    """The norm of sharded sums crosses devices when a window ends: in a loop of at most one trip."""
    sharding = NamedSharding(_mesh(), P("data"))
    tx = optaccum.accumulate(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), 4)

    def shard(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if x.shape[:1] == (64,) else None)

    def step(params, state, grads):
        return optaccum.apply_gradients(tx, grads, state, params)

    def steps(params, state, grads):
        def body(carry, i):
            return step(*carry, grads * i), None

        return jax.lax.scan(body, (params, state), jnp.arange(1, 3))[0]

    params = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    args = jax.tree.map(shard, (params, jax.eval_shape(tx.init, params), params))
    compiled = jax.jit(steps if scanned else step).lower(*args).compile()
    assert compiled.as_text().count(" while(") == 1 + scanned
    norm, nothing = ({"all-reduce": 1}, {"all-reduce": 4}), ({}, {})
    counts = optaccum.count_collectives(compiled)
    assert (counts.in_loops, counts.bytes_in_loops) == (norm if scanned else nothing)
    assert (counts.outside, counts.bytes_outside) == (nothing if scanned else norm)


@pytest.mark.parametrize(
    ("name", "in_loops", "outside", "bytes_in_loops", "bytes_outside"),
    [
        ("cpu_each_layer", {"all-reduce": 1}, {}, {"all-reduce": 64}, {}),
        (
            "cpu_kinds",
            {"all-reduce": 1, "all-gather": 1, "collective-permute": 1},
            {"all-reduce": 1, "reduce-scatter": 1, "all-to-all": 1},
            {"all-reduce": 32, "all-gather": 256, "collective-permute": 32},
            {"all-reduce": 4, "reduce-scatter": 4, "all-to-all": 32},
        ),
        (  # forward and backward f32[1024,1024]; f32[128,1024]; the norm
            "gpu_micro_step",
            {"all-gather": 2, "reduce-scatter": 1},
            {"all-reduce": 1},
            {"all-gather": 2 * 2**22, "reduce-scatter": 2**19},
            {"all-reduce": 4},
        ),
        (  # (f32[1024], f32[1024,3,1024]); (f32[128,3,1024], f32[128]); f32[]
            "gpu_once",
            {},
            {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 1},
            {},
            {"all-gather": 2**12 + 3 * 2**22, "reduce-scatter": 3 * 2**19 + 2**9, "all-reduce": 4},
        ),
        (  # as on a GPU, but in bf16; three fusions hold the backward pass's all-gather
            "tpu_micro_step",
            {"all-gather": 2, "reduce-scatter": 1},
            {"all-reduce": 1},
            {"all-gather": 2 * 2**21, "reduce-scatter": 2**19},
            {"all-reduce": 4},
        ),
        (  # each f32[8,1024]; a scatter of so few rows is compiled to an all-reduce
            "tpu_kinds",
            {"collective-permute": 1},
            {"all-to-all": 1, "collective-permute": 1, "all-reduce": 2, "all-gather": 1},
            {"collective-permute": 2**15},
            {"all-to-all": 2**15, "collective-permute": 2**15, "all-reduce": 2**16, "all-gather": 2**15},
        ),
    ],
)
def test_program_texts(name, in_loops, outside, bytes_in_loops, bytes_outside):
    text = (DATA / f"{name}.hlo.txt").read_text()
    assert optaccum.count_collectives(text) == (in_loops, outside, bytes_in_loops, bytes_outside)
    # With every loop unmade.
    unmade = re.sub(r" while\((.*), condition=%?[\w.\-]+, body=(%?[\w.\-]+)", r" call(\1, to_apply=\2", text)
    all_outside = {kind: in_loops.get(kind, 0) + outside.get(kind, 0) for kind in {**in_loops, **outside}}
    assert optaccum.count_collectives(unmade)[:2] == ({}, all_outside)


FLAG = r"(ROOT \S+ = pred\S+) get-tuple-element\((%param\S+), index=0"  # the condition of an emit's loop


@pytest.mark.parametrize("name", ["gpu_micro_step", "tpu_micro_step"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"constant\(false\)", "constant(true)"),
        (r"constant\(false\)", "parameter(1)"),
        (FLAG, r"\1 compare(\2, \2), direction=EQ"),
        (FLAG, r"%flags = (pred[]) custom-call(\2)\n  \1 get-tuple-element(%flags), index=0"),
    ],
    ids=["true", "unknown", "compared", "computed"],
)
def test_a_loop_that_may_run_twice_is_a_loop(name, old, new):
    text, number = re.subn(old, new, (DATA / f"{name}.hlo.txt").read_text())
    assert number == 1
    counts = optaccum.count_collectives(text)
    assert counts.in_loops["all-reduce"] == 1
    assert not counts.outside


def _module(entry, *computations):
    header = "HloModule m, entry_computation_layout={(f32[8]{0})->f32[8]{0}}"
    return "\n\n".join([header, *computations, _computation("main", entry).replace("%main", "ENTRY %main", 1)])


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
            "%a = f32[8]{0} call(%p), to_apply=%reduce\n%b = f32[8]{0} while(%p), condition=%plain, body=%reduce",
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
            "%s = ((f32[8]{0}), f32[8]{0}, u32[]) call-start(%p), to_apply=%twice\n%d = f32[8]{0} call-done(%s)",
            0,
            2,
        ),
        ("%s = f32[8]{0} all-reduce-start(%p), to_apply=%sum\n%d = f32[8]{0} all-reduce-done(%s)", 0, 1),
        # Tiled layouts, tuples, comments, operands printed with their types.
        ("%a = (f32[8]{0:T(8,128)(2,1)S(1)}, /*index=1*/f32[8]{0:T(256)}) all-reduce(%p, %p)", 0, 1),
        ("%a = f32[8]{0} all-reduce((f32[8]{0}, f32[]) %p), to_apply=%sum", 0, 1),
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
    assert optaccum.count_collectives(_module(entry, *computations))[:2] == expected


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
def test_names_and_bytes(name):
    for type_, num_bytes in [
        ("f32[]", 4),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("(pred[3]{0}, /*index=1*/s4[3]{0:T(128)E(4)}, f8e4m3fn[5]{0}, c64[2]{0}, token[])", 3 + 2 + 5 + 16),
    ]:
        expected = ({}, {name: 1}, {}, {name: num_bytes})
        assert optaccum.count_collectives(_module(f"%a = {type_} {name}(%p)")) == expected
        pair = f"%a = ({type_}, {type_}, u32[]) {name}-start(%p)\n%b = {type_} {name}-done(%a)"
        assert optaccum.count_collectives(_module(pair)) == expected


class _NoText:
    def as_text(self):
        return None


@pytest.mark.parametrize(
    ("compiled", "error", "message"),
    [
        (jax.jit(jnp.sin), TypeError, r"lower\(\*args\)\.compile\(\)"),
        (None, TypeError, "got NoneType"),
        (jax.jit(jnp.sin).lower(1.0), ValueError, "compiled first"),
        ("", ValueError, "ENTRY"),
        (_NoText(), ValueError, "a text; got none"),
        (_module("%a = f32[8]{0} call(%p), to_apply=%gone"), ValueError, "'gone'.*cut short"),
        (_module("%a = f32[8]{0} all-red"), ValueError, "an HLO instruction; got"),
    ],
)
def test_errors(compiled, error, message):
    with pytest.raises(error, match=message):
        optaccum.count_collectives(compiled)
