"""From a micro-batch to parameters in one call: the numbers of two, without the gradient's buffer."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal

import optaccum

NUM_LAYERS, WIDTH = 3, 4
RNG = np.random.default_rng(0)
PARAMS = {
    "layers": jnp.asarray(RNG.normal(size=(NUM_LAYERS, WIDTH, WIDTH)), jnp.float32),
    "out": jnp.ones(WIDTH),
    "count": jnp.int32(3),  # whose gradient is float0
}
BATCHES = [
    (jnp.asarray(RNG.normal(size=(6, WIDTH)), jnp.float32), jnp.asarray(RNG.normal(size=6), jnp.float32))
    for _ in range(5)
]
WEIGHTS = (1.0, 3.0, 2.0, 0.0, 5.0)
TX = optaccum.accumulate(optax.adamw(0.1), 2)


def errors(params, x, y):
    x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, params["layers"])
    return (x @ params["out"] - y) ** 2


def mean_loss(params, x, y):
    return jnp.mean(errors(params, x, y))


def summed_loss(params, x, y):
    return jnp.sum(errors(params, x, y))


def weighted_loss(params, x, y):
    return optaccum.WeightedMean(summed_loss(params, x, y), y.size)


def by_two_calls(loss_fn, tx=TX, **options):
    def step(params, state, *args, **kwargs):
        out, grads = jax.value_and_grad(loss_fn, allow_int=True, **options)(params, *args)
        return out, *optaccum.apply_gradients(tx, grads, state, params, **kwargs)

    return step


@functools.cache
def jitted(loss_fn):
    return jax.jit(by_two_calls(loss_fn))


def train(step, tx=TX, params=PARAMS, batches=BATCHES, **per_call):
    """The losses, the parameters and the state at the end; `per_call` lists one keyword for each call."""
    state, losses = tx.init(params), []
    for i, batch in enumerate(batches):
        loss, params, state = step(params, state, *batch, **{name: given[i] for name, given in per_call.items()})
        losses.append(loss)
    return losses, params, state


CASES = {
    "alike": (mean_loss, {}),
    "weight": (mean_loss, {"weight": WEIGHTS}),
    "denominator": (summed_loss, {"denominator": WEIGHTS}),
    "emit": (mean_loss, {"weight": WEIGHTS, "emit": (True, False, False, False, True)}),
}


@pytest.mark.parametrize(("name", "in_place"), [*itertools.product(CASES, [True, False]), ("emit", "outside jit")])
def test_it_is_a_gradient_and_apply_gradients(name, in_place):
    loss_fn, per_call = CASES[name]
    expected = train(jitted(loss_fn), **per_call)
    step = optaccum.value_and_update(loss_fn, TX, in_place=None if in_place == "outside jit" else in_place)
    actual = train(step if in_place == "outside jit" else jax.jit(step), **per_call)
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-6)
    other = "denominator" if name == "weight" else "weight"
    wrong = train(jitted(loss_fn), **{other: (1.0, 1.0, 4.0, 2.0, 7.0)})
    with pytest.raises(AssertionError):
        assert_trees_close(actual, wrong, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_weighted_mean_brings_its_denominator(in_place):
    step = jax.jit(optaccum.value_and_update(weighted_loss, TX, in_place=in_place))
    batches = [(x[:rows], y[:rows]) for (x, y), rows in zip(BATCHES, (6, 6, 3, 6, 3), strict=True)]
    losses, params, state = train(step, batches=batches)
    sums, *expected = train(jitted(summed_loss), batches=batches, denominator=(6.0, 6.0, 3.0, 6.0, 3.0))
    assert_trees_close((params, state), tuple(expected), rtol=1e-4, atol=1e-6)
    assert_trees_close(losses, [s / y.size for s, (_, y) in zip(sums, batches, strict=True)])
    assert optaccum.weight_total(state) == 21.0
    _, means, _ = train(jitted(mean_loss), batches=batches)
    with pytest.raises(AssertionError):
        assert_trees_close(params, means, rtol=1e-4, atol=1e-6)


def test_a_weighted_mean_is_a_mean_to_an_optimizer_that_takes_no_denominator():
    tx, params = optax.sgd(0.1), {name: x for name, x in PARAMS.items() if name != "count"}
    trained = [
        optaccum.value_and_update(loss_fn, tx)(params, tx.init(params), *BATCHES[0])
        for loss_fn in (weighted_loss, mean_loss, summed_loss)
    ]
    assert_trees_close(trained[0], trained[1], rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_trees_close(trained[0][1], trained[2][1], rtol=1e-5)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("form", ["weight", "WeightedMean"])
def test_a_zero_weight_adds_nothing_of_a_nan(form, in_place):
    def masked_loss(params, x, y, weight):
        return optaccum.WeightedMean(mean_loss(params, x, y) * weight, weight)

    def batches_with(bad):
        return [(x * (bad if w == 0 else 1), y) for (x, y), w in zip(BATCHES, WEIGHTS, strict=True)]

    expected = train(jitted(mean_loss), weight=WEIGHTS)[1:]
    if form == "weight":
        step = jax.jit(optaccum.value_and_update(mean_loss, TX, in_place=in_place))
        losses, *actual = train(step, batches=batches_with(jnp.nan), weight=WEIGHTS)
        assert jnp.isnan(losses[3])
        _, *wrong = train(step, batches=batches_with(jnp.nan), weight=(1.0, 3.0, 2.0, 1.0, 5.0))
        assert jnp.isnan(wrong[0]["layers"]).all()
    else:
        step = jax.jit(optaccum.value_and_update(masked_loss, TX, in_place=in_place))
        batches = [(*batch, w) for batch, w in zip(batches_with(jnp.nan), WEIGHTS, strict=True)]
        _, *actual = train(step, batches=batches)
    assert_trees_close(tuple(actual), tuple(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_window_after_one_of_a_nan_weight_starts_clean_where_there_is_no_gradient_too(in_place):
    tx = optaccum.accumulate(optax.polyak_sgd(1.0), 1, averaged_extra_args=("value",))  # takes the norm of all
    step = jax.jit(optaccum.value_and_update(mean_loss, tx, in_place=in_place))
    start = tx.init(PARAMS)
    _, lost, state = step(PARAMS, start, *BATCHES[0], weight=jnp.nan)
    assert jnp.isnan(lost["out"]).all()
    assert jnp.isnan(state.grad_sum["count"])
    actual, expected = (step(PARAMS, before, *BATCHES[1], weight=2.0)[1] for before in (state, start))
    assert_trees_equal(actual, expected)
    assert (expected["out"] != PARAMS["out"]).all()


@pytest.mark.parametrize("tx", [TX, optax.chain(TX)])
def test_no_backward_pass_runs_where_the_weight_is_zero(tx):
    ran = []

    @jax.custom_vjp
    def noted(x):
        return x

    def backward(_, cotangent):
        jax.debug.callback(lambda: ran.append(1))
        return (cotangent,)

    noted.defvjp(lambda x: (x, ()), backward)
    step = jax.jit(optaccum.value_and_update(lambda params, x, y: noted(mean_loss(params, x, y)), tx))
    losses, *_ = train(step, tx=tx, weight=WEIGHTS)
    jax.block_until_ready(losses)
    jax.effects_barrier()
    assert len(ran) == 4


@pytest.mark.parametrize(
    "tx",
    [
        optaccum.accumulate(optax.adam(0.1), 2, should_skip_update_fn=optax.skip_not_finite),
        optaccum.accumulate(optax.adam(0.1), 2, track_noise_scale=True),
        optax.chain(optax.clip(0.1), TX),
        optax.adam(0.1),
    ],
    ids=["skip", "noise", "chain", "plain"],
)
def test_what_needs_the_gradient_gets_it(tx):
    params = {name: PARAMS[name] for name in ("layers", "out")}
    state = tx.init(params)
    has_window = bool(optax.tree_utils.tree_get_all_with_path(state, "micro_step"))
    per_call = {"weight": WEIGHTS} if has_window else {}
    bad = jnp.nan if optax.tree.get(state, "should_skip") is not None else 1.0
    batches = [(x * (bad if i == 1 else 1), y) for i, (x, y) in enumerate(BATCHES)]
    step = optaccum.value_and_update(mean_loss, tx)
    actual = train(jax.jit(step), tx, params, batches, **per_call)
    expected = train(jax.jit(by_two_calls(mean_loss, tx)), tx, params, batches, **per_call)
    assert_trees_close(actual[1:], expected[1:], rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        assert_trees_close(actual[1], params, rtol=1e-4)
    with pytest.raises(ValueError, match="in_place=True to be possible"):
        optaccum.value_and_update(mean_loss, tx, in_place=True)


def test_transformations_see_the_form_without_references():
    params = {name: PARAMS[name] for name in ("layers", "out")}
    tx = optaccum.accumulate(optax.sgd(0.1, momentum=0.9), 2)
    state = tx.init(params)

    def trained(step, scale):
        def body(carry, batch):
            loss, params, state = step(*carry, *batch, weight=scale)
            return (params, state), loss

        batches = jax.tree.map(lambda *x: jnp.stack(x), *BATCHES[:3])
        return scale * jax.lax.scan(body, (params, state), batches)[1].sum()

    ours, two = optaccum.value_and_update(mean_loss, tx, in_place=True), by_two_calls(mean_loss, tx)
    expected = jax.jit(jax.grad(functools.partial(trained, two)))(2.0)
    for derivative in (jax.grad, jax.jacfwd):
        assert_trees_close(jax.jit(derivative(functools.partial(trained, ours)))(2.0), expected, rtol=1e-4)

    def each(step):
        return jax.jit(jax.vmap(lambda x, y, w: step(params, state, x, y, weight=w)))(
            *jax.tree.map(lambda *x: jnp.stack(x), *BATCHES), jnp.array(WEIGHTS)
        )

    assert_trees_close(each(ours), each(two), rtol=1e-4, atol=1e-6)
    with pytest.raises(Exception, match=r"[Rr]ef|while|abstractification"):  # bare references do not
        jax.jit(jax.vmap(lambda w: bare_references(params, w * BATCHES[0][0], BATCHES[0][1])))(jnp.ones(2))


def bare_references(params, x, y):
    refs = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), params)
    loss, vjp = jax.vjp(lambda params: mean_loss(params, x, y), params)
    vjp.with_refs(refs)(jnp.ones_like(loss))
    return jax.tree.map(jax.freeze, refs)


@pytest.mark.parametrize("in_place", [True, False])
def test_bf16_parameters_add_into_float32_sums(in_place):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16) if p.dtype == jnp.float32 else p, PARAMS)
    tx = optaccum.accumulate(optax.sgd(0.1), 4)
    step = jax.jit(optaccum.value_and_update(mean_loss, tx, in_place=in_place))
    _, params_1, state = train(step, tx, params, BATCHES[:3])
    _, _, expected = train(jax.jit(by_two_calls(mean_loss, tx)), tx, params, BATCHES[:3])
    assert state.grad_sum["layers"].dtype == jnp.float32
    assert params_1["layers"].dtype == jnp.bfloat16
    assert_trees_close(state, expected, rtol=0.05, atol=0.05)
    narrow = optaccum.accumulate(optax.sgd(0.1), 4, accumulator_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="narrower than its"):
        optaccum.value_and_update(mean_loss, narrow, in_place=True)(PARAMS, narrow.init(PARAMS), *BATCHES[0])


def test_out_of_place_a_large_weight_does_not_overflow_in_float16():
    tx, w, x = optaccum.accumulate(optax.sgd(0.1), 2), jnp.ones(3), jnp.ones((4, 3), jnp.float16)

    def sum_of(in_place, weight):
        step = optaccum.value_and_update(lambda w, x: jnp.mean(w.astype(x.dtype) * x), tx, in_place=in_place)
        return step(w, tx.init(w), x, weight=weight)[2].grad_sum

    assert_trees_close(sum_of(True, 6e4), sum_of(False, 6e4), rtol=1e-2)
    assert_trees_close(sum_of(False, 6e6), jnp.full(3, 2e6), rtol=1e-2)
    assert jnp.isinf(sum_of(True, 6e6)).all()


@pytest.mark.parametrize("in_place", [None, True])
def test_aux_and_the_loss_as_an_averaged_extra_arg(in_place):
    tx = optaccum.accumulate(optax.polyak_sgd(1.0), 2, averaged_extra_args=("value",))

    def loss_fn(params, x, y):
        return mean_loss(params, x, y), {"rows": y.size, "errors": errors(params, x, y)}

    step = jax.jit(optaccum.value_and_update(loss_fn, tx, has_aux=True, in_place=in_place))
    params = {name: PARAMS[name] for name in ("layers", "out")}
    outs, *actual = train(step, tx, params, BATCHES[:2])
    assert int(outs[0][1]["rows"]) == 6
    assert_trees_close(outs[0][0], outs[0][1]["errors"].mean())
    values = [float(mean_loss(params, *batch)) for batch in BATCHES[:2]]
    _, *expected = train(jax.jit(by_two_calls(mean_loss, tx)), tx, params, BATCHES[:2], value=values)
    assert_trees_close(tuple(actual), tuple(expected), rtol=1e-4, atol=1e-6)
    _, *others = train(step, tx, params, BATCHES[:2], value=[1.0, 2.0])  # given, it is taken
    with pytest.raises(AssertionError):
        assert_trees_close(others[0], actual[0], rtol=1e-4)


def test_parameters_may_hold_functions():
    params = {"w": jnp.ones(WIDTH), "fn": jnp.tanh, "frozen": jnp.ones(WIDTH)}
    started = {"w": params["w"], "fn": None, "frozen": None}
    tx = optaccum.accumulate(optax.sgd(1.0), 1)

    def loss_fn(params, x):
        return jnp.mean(params["fn"](x @ (params["w"] * params["frozen"])))

    x = BATCHES[0][0]
    _, new, _ = optaccum.value_and_update(loss_fn, tx)(params, tx.init(started), x)
    grad = jax.grad(lambda w: loss_fn(params | {"w": w}, x))(params["w"])
    assert_trees_close(new["w"], params["w"] - grad)
    assert new["fn"] is jnp.tanh
    assert_trees_equal(new["frozen"], params["frozen"])


@pytest.mark.parametrize(
    ("loss_fn", "kwargs", "error", "match"),
    [
        (
            lambda p, x, y: {"a": weighted_loss(p, x, y), "b": weighted_loss(p, x, y)},
            {},
            TypeError,
            "of one term",
        ),
        (weighted_loss, {"weight": 1.0}, TypeError, "beside a loss that brings its own"),
        (weighted_loss, {"denominator": 1.0}, TypeError, "beside a loss that brings its own"),
        (mean_loss, {"weight": 1.0, "denominator": 1.0}, TypeError, "got both"),
        (mean_loss, {"emit": 1}, TypeError, "emit to be a bool scalar"),
        (errors, {}, TypeError, "scalar"),
    ],
)
def test_wrong_calls_raise(loss_fn, kwargs, error, match):
    for in_place in (None, True):
        with pytest.raises(error, match=match):
            optaccum.value_and_update(loss_fn, TX, in_place=in_place)(PARAMS, TX.init(PARAMS), *BATCHES[0], **kwargs)


def test_wrong_options_raise_where_they_are_made():
    with pytest.raises(TypeError, match="loss_fn to be a function"):
        optaccum.value_and_update(3, TX)
    with pytest.raises(TypeError, match="in_place to be True, False or None"):
        optaccum.value_and_update(mean_loss, TX, in_place="yes")
    with pytest.raises(TypeError, match=r"tx to be an optax\.GradientTransformation"):
        optaccum.value_and_update(mean_loss, optax.sgd)
    with pytest.raises(TypeError, match="has_aux to be True or False; got 'no'"):
        optaccum.value_and_update(mean_loss, TX, has_aux="no")
    plain = optax.sgd(0.1)
    with pytest.raises(TypeError, match="to take weight="):
        optaccum.value_and_update(mean_loss, plain)(PARAMS, plain.init(PARAMS), *BATCHES[0], weight=1.0)


@pytest.mark.parametrize("kwargs", [{}, {"weight": 2.0}])
def test_no_buffer_of_the_gradient(kwargs):
    """Temporary memory in copies of the parameters: none of the gradient, none of zero updates."""
    params = {"layers": jnp.ones((16, 128, 128)), "out": jnp.ones(128)}
    num_bytes = params["layers"].nbytes
    batch = (jnp.ones((2, 128)), jnp.ones(2))

    def temp_copies(step):
        jitted = jax.jit(step, donate_argnames=("params", "state"))
        memory = jitted.lower(params, TX.init(params), *batch, **kwargs).compile().memory_analysis()
        return memory.temp_size_in_bytes / num_bytes

    two = temp_copies(by_two_calls(mean_loss))
    assert temp_copies(optaccum.value_and_update(mean_loss, TX)) < min(0.4, two - 0.6)
    assert temp_copies(optaccum.value_and_update(mean_loss, TX, in_place=False)) > 0.9
