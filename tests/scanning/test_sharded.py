"""Parameters sharded over the data axes, against the whole batch on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, assert_trees_equal
from jax.sharding import NamedSharding, PartitionSpec as P
from sharded_problem import AUTO, EXPLICIT, KINDS

import optaccum

ROWS, WIDTH = 48, 16
SHAPES = {"data": (8,), "tensor": (4, 2), "two": (2, 4), "three": (2, 2, 2)}
NAMES = {
    "data": ("data",),
    "tensor": ("data", "model"),
    "two": ("replica", "data"),
    "three": ("replica", "data", "model"),
}
ONE_AXIS = {"table": P(None, "data"), "layers": {"w": P(None, None, "data"), "b": P()}}
SPECS = {
    "one axis": ("data", ONE_AXIS),
    "stacked layers": ("data", {"table": P("data"), "layers": {"w": P("data"), "b": P(None, "data")}}),
    "beside a tensor axis": (
        "tensor",
        {"table": P("data", "model"), "layers": {"w": P(None, "data", "model"), "b": P(None, "data")}},
    ),
    "two data axes": (
        "two",
        {"table": P(("replica", "data")), "layers": {"w": P(None, "data", "replica"), "b": P(None, "data")}},
    ),
}
# A dimension that both axes divide, in either order; Explicit losses would have to say how products come out.
MERGED = {
    "data first": (
        "tensor",
        {"table": P(("data", "model")), "layers": {"w": P(None, ("data", "model")), "b": P()}},
    ),
    "model first": (
        "three",
        {"table": P(("model", "data")), "layers": {"w": P(None, "replica", ("model", "data")), "b": P()}},
    ),
}
FORMS = [{}, {"in_place": False}, {"shard_sums": True}, {"shard_sums": True, "in_place": False}]


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "table": jax.random.normal(keys[0], (8, WIDTH)),
        "layers": {
            "w": jax.random.normal(keys[1], (8, WIDTH, WIDTH)) / 4,
            "b": jax.random.normal(keys[2], (8, WIDTH)),
        },
    }


def make_batch():
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "token": jax.random.randint(keys[0], (ROWS,), 0, 8),
        "y": jax.random.normal(keys[1], (ROWS, WIDTH)),
        "mask": jax.random.bernoulli(keys[2], 0.4, (ROWS,)).astype(jnp.float32),
    }


def loss_fn(params, batch):
    """Embeddings, scanned layers that are computed again, and terms with their own denominators; aux."""

    @jax.checkpoint
    def layer(h, p):
        return jnp.tanh(h @ p["w"]) + p["b"], None

    rows, table = (jax.typeof(x).sharding for x in (batch["token"], params["table"]))
    as_typed = NamedSharding(rows.mesh, P(rows.spec[0], table.spec[1])) if rows.spec and table.spec else None
    h = params["table"].at[batch["token"]].get(out_sharding=as_typed)
    h, _ = jax.lax.scan(layer, h, params["layers"])
    errors = ((h - batch["y"]) ** 2).sum(1)
    terms = {
        "masked": optaccum.WeightedMean((errors * batch["mask"]).sum(), batch["mask"].sum()),
        "penalty": optaccum.WeightedMean(1e-2 * (h**2).sum(), len(h)),
    }
    return terms, optaccum.Sum(batch["mask"].sum())


def whole(params, batch):
    terms, aux = loss_fn(params, batch)
    return sum(term.total / term.weight for term in terms.values()), aux.value


def expected(params=None, batch=None):
    grad_fn = jax.value_and_grad(whole, has_aux=True)
    return grad_fn(make_params() if params is None else params, make_batch() if batch is None else batch)


def place(kind, where):
    layout, specs = where
    mesh = jax.make_mesh(SHAPES[layout], NAMES[layout], axis_types=(kind,) * len(NAMES[layout]))
    axes = tuple(axis for axis in NAMES[layout] if axis != "model")
    params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), make_params(), specs)
    return mesh, axes, params, jax.device_put(make_batch(), NamedSharding(mesh, P(axes)))


def value_and_grad(axes, **options):
    return optaccum.value_and_grad(loss_fn, **{"num_microbatches": 3, "has_aux": True, "data_axes": axes, **options})


def assert_sharded_alike(grads, params):
    for (path, g), x in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(params), strict=True):
        assert g.sharding.is_equivalent_to(x.sharding, x.ndim), f"{path}: {g.sharding.spec}, not {x.sharding.spec}"


CASES = {f"{name}-{kind.name}": (kind, SPECS[name]) for name in SPECS for kind in (AUTO, EXPLICIT)}
CASES |= {name: (AUTO, MERGED[name]) for name in MERGED}


@pytest.mark.parametrize(
    ("case", "form"),
    [
        *((case, {"shard_sums": shard_sums}) for case in CASES for shard_sums in (False, True)),
        *(("one axis-Auto", form) for form in FORMS if "in_place" in form),
    ],
    ids=str,
)
def test_whole_batch(case, form):
    _, axes, params, batch = place(*CASES[case])
    out = value_and_grad(axes, **form)(params, batch)
    assert_trees_close(out, expected(), rtol=3e-6, atol=3e-6)
    assert_sharded_alike(out[1], params)
    half = jax.tree.map(lambda x: x[: ROWS // 2], make_batch())  # half of the devices
    with pytest.raises(AssertionError, match="differ beyond"):
        assert_trees_close(out, expected(batch=half), rtol=1e-2)


@KINDS
def test_collectives(kind):
    _, axes, params, batch = place(kind, SPECS["one axis"])

    def count(**options):
        fn = jax.jit(value_and_grad(axes, **{"param_specs": ONE_AXIS, **options}))
        return optaccum.count_collectives(fn.lower(params, batch).compile())

    window = count()
    assert not window.in_loops
    # One all-reduce for the weights of both terms, which come first, and one for all else that is replicated.
    assert dict(window.outside) == {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 2}
    size = 4 * (8 * WIDTH + 8 * WIDTH**2)
    assert window.bytes_outside["all-gather"] == size
    assert window.bytes_outside["reduce-scatter"] == size // 8
    sums = count(shard_sums=True)
    assert dict(sums.in_loops) == {"reduce-scatter": 2}
    assert dict(sums.outside) == {"all-gather": 2, "all-reduce": 2}
    if kind == AUTO:  # an Explicit loss would have to say how sharded products come out
        layers = count(data_axes=None, param_specs=None)
        assert "all-gather" in layers.in_loops


def test_inside_jit_on_an_auto_mesh_nothing_shows():
    _, axes, params, batch = place(AUTO, SPECS["one axis"])
    given = jax.jit(value_and_grad(axes, param_specs=ONE_AXIS))(params, batch)
    assert_trees_close(given, expected(), rtol=3e-6, atol=3e-6)
    assert_sharded_alike(given[1], params)
    out, grads = jax.jit(value_and_grad(axes))(params, batch)
    assert_trees_close((out, grads), expected(), rtol=3e-6, atol=3e-6)
    assert all(g.sharding.is_fully_replicated for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gather_dtype(form):
    """The loss sees bf16; gradients are summed and leave in float32."""
    _, axes, params, batch = place(AUTO, SPECS["one axis"])
    seen = []

    def loss(params, batch):
        seen.extend(x.dtype for x in jax.tree.leaves(params))
        return loss_fn(jax.tree.map(lambda x: x.astype(jnp.float32), params), batch)

    options = {"num_microbatches": 6, "has_aux": True, "data_axes": axes, "gather_dtype": jnp.bfloat16}
    _, grads = optaccum.value_and_grad(loss, **options, **form)(params, batch)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), make_params())
    # Each micro-batch's gradient is rounded where it leaves the loss, for it is one with respect to bf16.
    assert_trees_close(grads, expected(rounded)[1], rtol=2e-2, atol=2e-3)
    assert_sharded_alike(grads, params)
    half = jax.tree.map(lambda x: x[: ROWS // 2], make_batch())
    with pytest.raises(AssertionError, match="differ beyond"):
        assert_trees_close(grads, expected(rounded, half)[1], rtol=2e-2, atol=2e-3)


def test_the_sum_of_rounded_gradients_is_not_rounded():
    """1 + 255 times 2^-8, each exact in bf16, their sum not."""
    mesh = jax.make_mesh((8,), ("data",))
    x = jax.device_put(jnp.full((2048, 1), 2.0**-8).at[:8].set(1.0), NamedSharding(mesh, P("data")))
    w = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))

    def loss(w, x):
        h, _ = jax.lax.scan(lambda h, w: (h + w.astype(jnp.float32) * x.sum(), None), 0.0, w)
        return optaccum.WeightedMean(h, 1 / 2048)

    for form in FORMS:
        options = {"microbatch_size": 8, "data_axes": "data", "gather_dtype": jnp.bfloat16}
        grads = optaccum.grad(loss, **options, **form)(w, x)
        assert_trees_equal(grads, jnp.full(8, (8 + 2040 * 2.0**-8) * 1.0))


@KINDS
@pytest.mark.parametrize("shard_sums", [False, True])
def test_zero_1(kind, shard_sums):
    mesh, axes, _, batch = place(kind, SPECS["one axis"])
    params = jax.device_put(make_params(), NamedSharding(mesh, P()))
    fn = value_and_grad(axes, grad_specs=ONE_AXIS, shard_sums=shard_sums)
    out = fn(params, batch)
    assert_trees_close(out, expected(), rtol=3e-6, atol=3e-6)
    assert_sharded_alike(out[1], place(kind, SPECS["one axis"])[2])
    counts = optaccum.count_collectives(jax.jit(fn).lower(params, batch).compile())
    if not shard_sums:
        assert not counts.in_loops
        assert dict(counts.outside) == {"reduce-scatter": 2, "all-reduce": 2}


@KINDS
@pytest.mark.parametrize(("reduction", "shard_sums"), [("mean", False), ("mean", True), ("max", False)])
def test_zero_1_along_a_dimension_that_a_tensor_axis_divides(kind, reduction, shard_sums):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    w, x = jnp.linspace(-1, 1, 8), jax.random.normal(jax.random.key(0), (8, 8))
    args = jax.device_put(w, NamedSharding(mesh, P("model"))), jax.device_put(x, NamedSharding(mesh, P("data")))
    fn = optaccum.grad(
        lambda w, x: jnp.mean(jnp.tanh(x * w).sum(1)),
        num_microbatches=2,
        data_axes="data",
        grad_specs=P("data"),
        shard_sums=shard_sums,
        grad_reduction_fn=lambda *_: reduction,
    )
    each = jax.vmap(jax.grad(lambda w, x: jnp.tanh(x * w).sum()), (None, 0))(w, x)
    wanted = {"max": each.max(0), "mean": each.mean(0)}
    grads = fn(*args)
    assert_trees_close(grads, wanted.pop(reduction), rtol=1e-6, atol=1e-6)
    assert grads.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 1)
    with pytest.raises(AssertionError, match="differ beyond"):
        assert_trees_close(grads, *wanted.values(), rtol=1e-2)


@KINDS
@pytest.mark.parametrize("axes", [("data", "model"), ("model", "data")], ids=str)
def test_specs_of_the_data_axes_alone_leave_the_order_of_axes_as_it_shows(kind, axes):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    w, x = jnp.arange(8.0), jax.random.normal(jax.random.key(0), (8, 8))
    args = jax.device_put(w, NamedSharding(mesh, P(axes))), jax.device_put(x, NamedSharding(mesh, P("data")))
    loss, options = lambda w, x: jnp.mean((x * w) ** 2), {"num_microbatches": 2, "data_axes": "data"}
    grads = optaccum.grad(loss, param_specs=P("data"), **options)(*args)
    assert_trees_close(grads, jax.grad(loss)(w, x), rtol=1e-5)
    assert grads.sharding.is_equivalent_to(args[0].sharding, 1)
    other = NamedSharding(mesh, P(axes[::-1]))
    assert not grads.sharding.is_equivalent_to(other, 1)


@KINDS
def test_other_arguments_and_the_carry_are_gathered(kind):
    mesh, axes, params, batch = place(kind, SPECS["one axis"])
    base = jax.device_put(jnp.linspace(0.5, 1.5, WIDTH), NamedSharding(mesh, P("data")))

    def loss(params, batch, base, carry):
        errors = (params["table"] * base).sum() * batch["mask"] * carry["scale"][:, 0].mean()
        return errors.mean(), ({"scale": carry["scale"]}, ())

    carry = {"scale": jnp.full((8, 2), 2.0)}
    options = {"num_microbatches": 3, "has_aux": True, "carry_argnum": 3, "data_axes": axes}
    args = base, jax.device_put(carry, NamedSharding(mesh, P("data")))
    (_, (new, _)), grads = optaccum.value_and_grad(loss, **options)(params, batch, *args)
    wanted = jax.grad(lambda p: loss(p, make_batch(), np.asarray(base), carry)[0])(make_params())
    assert_trees_close(grads, wanted, rtol=1e-5)
    assert_trees_equal(new, carry)


def test_noise_skipping_and_maxima():
    """Each needs the whole gradient of a micro-batch, or of a leaf; the same numbers as with replicated parameters."""
    mesh, axes, params, batch = place(AUTO, SPECS["one axis"])
    replicated = jax.device_put(make_params(), NamedSharding(mesh, P()))
    batch["y"] = batch["y"].at[7, 0].set(jnp.nan)  # one device drops a micro-batch

    def loss(params, batch):
        return loss_fn(params, batch)[0]["masked"]

    def reduction(path, leaf):
        return "max" if path[0].key == "table" else "mean"

    options = {
        "grad_reduction_fn": reduction,
        "track_noise_scale": True,
        "return_info": True,
        "skip_nonfinite": True,
    }
    fn = optaccum.value_and_grad(loss, num_microbatches=3, data_axes=axes, **options)
    wanted = fn(replicated, batch)
    assert int(wanted[2].num_skipped) == 1
    assert float(jnp.abs(wanted[1]["layers"]["w"]).max()) > 1e-3
    for shard_sums in (False, True):
        fn = optaccum.value_and_grad(loss, num_microbatches=3, data_axes=axes, shard_sums=shard_sums, **options)
        out = fn(params, batch)
        assert_trees_close(out, wanted, rtol=1e-4, atol=1e-6)
        assert_sharded_alike(out[1], params)


@pytest.mark.parametrize("form", [{}, {"shard_sums": True}], ids=str)
def test_differentiated(form):
    """A gradient of the gradient, through the gather and the reduce-scatter."""
    _, axes, params, batch = place(AUTO, SPECS["one axis"])

    def sq_norm(grads):
        return sum((g**2).sum() for g in jax.tree.leaves(grads))

    grad_fn = value_and_grad(axes, param_specs=ONE_AXIS, **form)
    out = jax.jit(jax.grad(lambda p: sq_norm(grad_fn(p, batch)[1])))(params)
    wanted = jax.grad(lambda p: sq_norm(jax.grad(lambda p: whole(p, make_batch())[0])(p)))(make_params())
    assert_trees_close(out, wanted, rtol=1e-4, atol=1e-3)


def test_layer_by_layer_under_a_bare_jit():
    """No `data_axes`: sums and gradients are sharded as the parameters, which nothing but the compiler knows."""
    _, _, params, batch = place(AUTO, SPECS["one axis"])
    out = jax.jit(value_and_grad(None))(params, batch)
    assert_trees_close(out, expected(), rtol=3e-6, atol=3e-6)
    assert_sharded_alike(out[1], params)
    params["layers"]["w"] = params["layers"]["w"].at[:].set(jnp.nan)
    grads = jax.jit(optaccum.grad(lambda p, b: p["table"].sum() * b["y"].mean(), num_microbatches=3))(params, batch)
    assert_trees_equal(grads["layers"]["w"], jnp.zeros((8, WIDTH, WIDTH)))  # no NaN comes of that


def test_replicas_over_one_axis_and_sharded_over_another():
    mesh = jax.make_mesh((2, 4), ("replica", "data"), axis_types=(AUTO,) * 2)
    params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), make_params(), ONE_AXIS)
    batch = jax.device_put(make_batch(), NamedSharding(mesh, P(("replica", "data"))))
    fn = value_and_grad("replica")
    for out in (fn(params, batch), jax.jit(fn)(params, batch)):
        assert_trees_close(out, expected(), rtol=3e-6, atol=3e-6)
        assert_sharded_alike(out[1], params)


def test_verify_takes_the_options():
    _, _, params, batch = place(AUTO, SPECS["one axis"])

    def loss(params, batch):
        return loss_fn(jax.tree.map(lambda x: x.astype(jnp.float32), params), batch)

    options = {"num_microbatches": 3, "has_aux": True, "data_axes": "data"}
    report = optaccum.verify(loss, params, batch, **options, shard_sums=True)
    assert report.ok, report
    report = optaccum.verify(loss, params, batch, **options, gather_dtype=jnp.bfloat16)
    assert report.ok, report


DATA = {"data_axes": "data"}
ERRORS = {
    "no data_axes": ({"param_specs": P("data")}, ValueError, "expected data_axes with param_specs; got None"),
    "sums in place": (
        {**DATA, "shard_sums": True, "in_place": True},
        ValueError,
        "no shard_sums with in_place=True",
    ),
    "no spec": (
        {**DATA, "param_specs": {"table": "data"}},
        TypeError,
        r"PartitionSpec.*got str at param_specs\['table'\]",
    ),
    "no dtype": ({**DATA, "gather_dtype": jnp.int8}, TypeError, "gather_dtype to be a floating dtype"),
    "no axis": ({**DATA, "grad_specs": P("rows")}, ValueError, r"grad_specs at .*\('data',\); got 'rows'"),
    "does not divide": (
        {**DATA, "grad_specs": {"table": P(), "layers": {"w": P(), "b": P(None, None, "data")}}},
        ValueError,
        r"\['layers'\]\['b'\] to have at most 2 entries",
    ),
    "another layout": (
        {**DATA, "param_specs": P()},
        ValueError,
        r"how the parameters are sharded.*\['w'\]",
    ),
    "another structure": (
        {**DATA, "param_specs": {"tables": P()}},
        ValueError,
        "prefix of what is differentiated",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    options, error, match = ERRORS[name]
    _, _, params, batch = place(AUTO, SPECS["one axis"])
    with pytest.raises(error, match=match):
        value_and_grad(options.pop("data_axes", None), **options)(params, batch)


def test_a_dimension_that_does_not_divide():
    mesh = jax.make_mesh((8,), ("data",))
    x = jax.device_put(jnp.ones(16), NamedSharding(mesh, P("data")))
    fn = optaccum.grad(lambda w, x: (w * x.sum()).mean(), num_microbatches=2, data_axes="data", grad_specs=P("data"))
    with pytest.raises(ValueError, match=r"float32\[6\].*dimension 0 does not divide over 8 devices"):
        fn(jnp.ones(6), x)
    assert fn(jnp.ones(8), x).sharding.spec == P("data")
