"""value_and_grad over micro-batches is jax.value_and_grad on the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal
from optax import microbatching

import optaccum

B = 11
KEYS = jax.random.split(jax.random.key(0), 6)
PARAMS = {"w": jax.random.normal(KEYS[0], (3, 4)), "b": jnp.zeros(4), "none": None}
BATCH = {
    "x": jax.random.normal(KEYS[1], (B, 3)),
    "y": jax.random.normal(KEYS[2], (B, 4)),
    "mask": jnp.array([1.0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1]),
    "routed": jnp.array([0.0, 2, 0, 1, 3, 0, 0, 1, 0.5, 0, 1]),
}
NS = [1, 2, 4, B]


def losses(params, batch):
    return jnp.sum((jnp.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"]) ** 2, axis=-1)


def mean_loss(params, batch):
    return losses(params, batch).mean()


def masked(params, batch):
    return (losses(params, batch) * batch["mask"]).sum(), batch["mask"].sum()


def z_loss(params, batch):
    return (jnp.abs(batch["x"] @ params["w"]).sum(-1) * batch["routed"]).sum(), batch["routed"].sum()


def token_loss(params, batch):
    return optaccum.WeightedMean(*masked(params, batch))


def terms_loss(params, batch):
    return {
        "tokens": token_loss(params, batch),
        "z": optaccum.WeightedMean(*z_loss(params, batch)),
        "penalty": 0.1 * (batch["x"] @ params["w"]).mean(),
    }


def whole_value(loss):
    terms = loss.values() if isinstance(loss, dict) else [loss]
    return sum(t.total / t.weight if isinstance(t, optaccum.WeightedMean) else t for t in terms)


def whole(loss_fn):
    return jax.value_and_grad(lambda params, batch: whole_value(loss_fn(params, batch)))


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("loss_fn", [mean_loss, token_loss, terms_loss])
def test_value_and_gradients_are_the_whole_batchs(loss_fn, n):
    actual = optaccum.value_and_grad(loss_fn, num_microbatches=n)(PARAMS, BATCH)
    assert_trees_close(actual, whole(loss_fn)(PARAMS, BATCH), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("loss_fn", [mean_loss, token_loss, terms_loss])
def test_the_mean_of_means_is_something_else(loss_fn):
    parts = [whole(loss_fn)(PARAMS, jax.tree.map(lambda x, i=i: x[i::4], BATCH)) for i in range(4)]
    mean_of_means = jax.tree.map(lambda *xs: sum(xs) / 4, *parts)
    with pytest.raises(AssertionError):
        assert_trees_close(mean_of_means, whole(loss_fn)(PARAMS, BATCH), rtol=1e-3, atol=1e-4)


def test_against_a_float64_numpy_loop():
    x, y = np.asarray(BATCH["x"], np.float64), np.asarray(BATCH["y"], np.float64)
    w, mask = np.asarray(PARAMS["w"], np.float64), np.asarray(BATCH["mask"], np.float64)
    total, weight, grad = 0.0, 0.0, np.zeros_like(w)
    for i in range(B):
        h = np.tanh(x[i] @ w)
        total += mask[i] * ((h - y[i]) ** 2).sum()
        weight += mask[i]
        grad += mask[i] * np.outer(x[i], 2 * (h - y[i]) * (1 - h**2))
    loss, grads = optaccum.value_and_grad(token_loss, num_microbatches=4)(PARAMS, BATCH)
    np.testing.assert_allclose(loss, total / weight, rtol=1e-6)
    np.testing.assert_allclose(grads["w"], grad / weight, rtol=1e-5, atol=1e-6)
    assert abs(total / B - total / weight) > 0.1


def test_agrees_with_optax_microbatching_where_the_meanings_do():
    batch = jax.tree.map(lambda x: x[:8], BATCH)
    peer = microbatching.microbatch(
        jax.value_and_grad(mean_loss),
        argnums=1,
        microbatch_size=2,
        accumulator=microbatching.AccumulationType.MEAN,
    )
    params = {"w": PARAMS["w"], "b": PARAMS["b"]}
    actual = optaccum.value_and_grad(mean_loss, microbatch_size=2)(params, batch)
    assert_trees_close(actual, peer(params, batch), rtol=1e-6, atol=1e-7)
    by_default = microbatching.microbatch(jax.value_and_grad(mean_loss), argnums=1, microbatch_size=2)
    assert by_default(params, batch)[0] > 3.9 * actual[0]  # a sum: the difference in meaning


def test_fully_masked_micro_batches_and_windows():
    mask = jnp.arange(B) % 4 == 2  # all the weight in one micro-batch
    batch = BATCH | {"mask": mask.astype(jnp.float32)}
    actual = optaccum.value_and_grad(token_loss, num_microbatches=4)(PARAMS, batch)
    assert_trees_close(actual, whole(token_loss)(PARAMS, batch), rtol=2e-5, atol=1e-6)
    nothing = BATCH | {"mask": jnp.zeros(B)}
    loss, grads = optaccum.value_and_grad(token_loss, num_microbatches=4)(PARAMS, nothing)
    assert float(loss) == 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads))
    assert jnp.isnan(whole(token_loss)(PARAMS, nothing)[0])


def test_the_weight_is_a_constant_to_differentiation():
    def loss_fn(w, x):
        weight = jnp.exp(w) * x.size
        return optaccum.WeightedMean((w * x).sum(), weight)

    x = jnp.arange(1.0, 7)
    _, grad = optaccum.value_and_grad(loss_fn, num_microbatches=3)(0.5, x)
    assert_trees_close(grad, x.mean() / jnp.exp(0.5), rtol=1e-6)
    assert abs(jax.grad(lambda w: (w * x).mean() / jnp.exp(w))(0.5) - grad) > 0.5


def test_structures_are_those_of_jax_value_and_grad():
    def loss_fn(a, batch, b, *, scale):
        loss = mean_loss({"w": a, "b": b}, batch) * scale
        return loss, {"doubled": 2 * loss}

    args = (PARAMS["w"], BATCH, PARAMS["b"])
    for argnums in (0, 2, (2, 0), (-1,), (0, -1)):
        for has_aux in (False, True):
            fn = loss_fn if has_aux else lambda *args, **kwargs: loss_fn(*args, **kwargs)[0]
            options = {"argnums": argnums, "has_aux": has_aux}
            expected = jax.value_and_grad(fn, **options)(*args, scale=0.5)
            actual = optaccum.value_and_grad(fn, num_microbatches=4, **options)(*args, scale=0.5)
            assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)
            grads = optaccum.grad(fn, num_microbatches=4, **options)(*args, scale=0.5)
            expected = jax.grad(fn, **options)(*args, scale=0.5)
            assert_trees_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_several_batch_arguments_and_static_keyword_arguments():
    def loss_fn(x, w, mask, *, square, fn, table):
        assert square is True
        assert isinstance(table, list)
        return jnp.mean(fn(x @ w) ** 2 * mask[:, None])

    kwargs = {"square": True, "fn": jnp.tanh, "table": ["not", {"hashable"}]}
    args = (np.asarray(BATCH["x"]), PARAMS["w"], np.asarray(BATCH["mask"]))
    options = {"argnums": 1, "batch_argnums": (0, -1), "num_microbatches": 4}
    actual = optaccum.value_and_grad(loss_fn, **options)(*args, **kwargs)
    assert_trees_close(actual, jax.value_and_grad(loss_fn, 1)(*args, **kwargs), rtol=1e-5)


def test_equal_static_arguments_of_other_types_are_not_mixed_up():
    def loss_fn(w, x, kind):
        return w * x.mean() * {bool: 2.0, int: 3.0, float: 5.0}[type(kind)]

    grad_fn = optaccum.grad(loss_fn, num_microbatches=2)
    assert [float(grad_fn(1.0, jnp.ones(4), kind)) for kind in (True, 1, 1.0)] == [2.0, 3.0, 5.0]


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_each_micro_batch_gets_its_own_key(make_key):
    def loss_fn(w, x, keys):
        noise = jax.random.normal(keys["noise"], (3,))
        return (w * x).mean() * noise[0], optaccum.Stack(noise)

    keys = {"noise": make_key(7)}
    (_, noise), _ = optaccum.value_and_grad(loss_fn, num_microbatches=4, has_aux=True, key_argnum=2)(
        1.0, jnp.ones(B), keys
    )
    expected = jnp.stack([jax.random.normal(jax.random.fold_in(keys["noise"], i), (3,)) for i in range(4)])
    assert_trees_equal(noise, expected)
    assert len(np.unique(np.asarray(noise))) == 12


def test_the_carry_threads_and_takes_no_gradient():
    def loss_fn(w, x, carry):
        mean = carry["mean"] * 0.5 + (w * x).mean() * 0.5
        return (w * x).mean() + carry["mean"], (
            {"mean": mean, "count": carry["count"] + 1},
            optaccum.Stack(mean),
        )

    x, start = jnp.arange(1.0, 9), {"mean": jnp.float32(0), "count": 0}
    grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=4, has_aux=True, carry_argnum=-1)
    (_, (carry, means)), grad = grad_fn(2.0, x, start)
    expected = []
    for i in range(4):
        expected.append((expected[-1] if expected else 0.0) * 0.5 + float(2 * x[i::4].mean()) * 0.5)
    assert_trees_close(means, jnp.array(expected), rtol=1e-6)
    assert_trees_close(carry["mean"], means[-1])
    assert int(carry["count"]) == 4
    assert_trees_close(grad, x.mean(), rtol=1e-6)  # nothing through carry["mean"]


def test_skip_nonfinite_drops_micro_batches_with_their_weight():
    bad = BATCH | {"x": BATCH["x"].at[5].set(jnp.inf)}  # in micro-batch 1 of 4
    grad_fn = optaccum.value_and_grad(token_loss, num_microbatches=4, skip_nonfinite=True, return_info=True)
    loss, grads, info = grad_fn(PARAMS, bad)
    kept = jax.tree.map(lambda x: x[jnp.arange(B) % 4 != 1], bad)
    assert_trees_close((loss, grads), whole(token_loss)(PARAMS, kept), rtol=2e-5, atol=1e-6)
    assert (int(info.num_skipped), float(info.weight)) == (1, float(kept["mask"].sum()))
    loss, grads = optaccum.value_and_grad(token_loss, num_microbatches=4)(PARAMS, bad)
    assert not all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    loss, grads, info = grad_fn(PARAMS, BATCH | {"x": jnp.full((B, 3), jnp.nan)})
    assert jnp.isnan(loss)
    assert all((g == 0).all() for g in jax.tree.leaves(grads))
    assert (int(info.num_skipped), float(info.weight)) == (4, 0.0)


def test_skip_nonfinite_leaves_the_carry_and_sees_gradients_too():
    def loss_fn(w, x, carry):
        return jnp.sqrt(w * x).mean(), (carry + x.sum(), None)  # at x = 0 the loss is 0, its gradient NaN

    x = jnp.array([1.0, 0.0, 4.0, 0.0])
    (_, (carry, _)), grad, info = optaccum.value_and_grad(
        loss_fn, num_microbatches=2, has_aux=True, carry_argnum=2, skip_nonfinite=True, return_info=True
    )(1.0, x, 0.0)
    assert (int(info.num_skipped), float(carry)) == (1, 5.0)
    assert_trees_close(grad, jnp.float32(0.75), rtol=1e-6)


def test_sums_of_bfloat16_gradients_are_float32():
    def loss_fn(w, x):
        return (w * x).mean()

    x = jnp.ones(512, jnp.bfloat16)
    w = jnp.ones((), jnp.bfloat16)
    x = x.at[0].set(0.5)
    loss, grads = optaccum.value_and_grad(loss_fn, num_microbatches=512)(w, x)
    assert (loss.dtype, grads.dtype) == (jnp.float32, jnp.float32)
    assert float(grads) == 1 - 0.5 / 512
    narrow = optaccum.grad(loss_fn, num_microbatches=512, accumulator_dtype=jnp.bfloat16)(w, x)
    assert narrow.dtype == jnp.bfloat16
    assert float(narrow) <= 0.51  # 256 + 1 = 256
    loss, grads = optaccum.value_and_grad(loss_fn, num_microbatches=1)(w, x)
    assert (loss.dtype, grads.dtype) == (jnp.float32, jnp.float32)


def test_accumulator_dtypes_by_leaf():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3), "c": jnp.ones(3, jnp.complex64)}

    def loss_fn(p, x):
        return ((p["a"] + p["b"]).sum() * x).mean().astype(jnp.float32) + jnp.abs(p["c"]).sum()

    def dtypes(option):
        grads = optaccum.grad(loss_fn, num_microbatches=2, accumulator_dtype=option)(params, jnp.ones(4))
        return {name: g.dtype.name for name, g in grads.items()}

    assert dtypes(None) == {"a": "bfloat16", "b": "float32", "c": "complex64"}
    assert dtypes(jnp.bfloat16) == {"a": "bfloat16", "b": "bfloat16", "c": "complex64"}
    chosen = dtypes(lambda path, leaf: jnp.float16 if path[-1].key == "b" else leaf.dtype)
    assert chosen == {"a": "bfloat16", "b": "float16", "c": "complex64"}


def test_complex_parameters_and_float64():
    def loss_fn(z, x):
        return jnp.mean(jnp.abs(z * x) ** 2 + (z * x).real)

    z, x = jnp.array(1 + 2j), jnp.arange(5.0)
    assert_trees_close(
        optaccum.value_and_grad(loss_fn, num_microbatches=2)(z, x),
        jax.value_and_grad(loss_fn)(z, x),
        rtol=1e-6,
    )
    with jax.enable_x64(True):
        w, x = jnp.float64(1 / 3), jnp.arange(5.0, dtype=jnp.float64)
        loss, grads = optaccum.value_and_grad(lambda w, x: (w * x).mean(), num_microbatches=2)(w, x)
        assert (loss.dtype, grads.dtype) == (jnp.float64, jnp.float64)
        np.testing.assert_allclose(loss, 2 / 3, rtol=1e-15)


def test_info_weight_is_what_a_window_of_windows_needs():
    tx = optaccum.accumulate(optax.sgd(1.0), 2)
    grad_fn = optaccum.value_and_grad(token_loss, num_microbatches=2, return_info=True)
    params, state = PARAMS, tx.init(PARAMS)
    halves = [jax.tree.map(lambda x: x[:2], BATCH), jax.tree.map(lambda x: x[2:], BATCH)]
    for half in halves:
        _, grads, info = grad_fn(PARAMS, half)
        updates, state = tx.update(grads, state, params, weight=info.weight)
        params = optax.apply_updates(params, updates)
    expected = optax.apply_updates(PARAMS, jax.tree.map(lambda g: -g, whole(token_loss)(PARAMS, BATCH)[1]))
    assert_trees_close(params, expected, rtol=1e-5, atol=1e-6)
    assert optaccum.weight_total(state) == float(BATCH["mask"].sum())
    plain = [grad_fn(PARAMS, half)[1] for half in halves]
    unweighted = jax.tree.map(lambda a, b: (a + b) / 2, *plain)
    with pytest.raises(AssertionError):
        assert_trees_close(unweighted, whole(token_loss)(PARAMS, BATCH)[1], rtol=1e-3)


def test_max_reduction_for_state_that_gradients_carry():
    @jax.custom_vjp
    def observe(amax, x):
        return x

    observe.defvjp(lambda amax, x: (x, jnp.abs(x).max()), lambda seen, g: (seen, g))

    def loss_fn(p, x):
        return jnp.mean(observe(p["amax"], x * p["w"]))

    params, x = {"w": jnp.float32(2), "amax": jnp.float32(0)}, jnp.arange(1.0, 7)

    def reduce(path, leaf):
        return "max" if path[-1].key == "amax" else "mean"

    for in_place in (True, False):
        grads = optaccum.grad(loss_fn, num_microbatches=3, grad_reduction_fn=reduce, in_place=in_place)(
            params, x
        )
        assert {name: float(g) for name, g in grads.items()} == {"w": 3.5, "amax": 12.0}
    assert float(optaccum.grad(loss_fn, num_microbatches=3)(params, x)["amax"]) != 12.0


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: optaccum.value_and_grad(mean_loss), ValueError, "exactly one"),
        (
            lambda: optaccum.value_and_grad(mean_loss, num_microbatches=2, microbatch_size=2),
            ValueError,
            "exactly one",
        ),
        (lambda: optaccum.grad(mean_loss, num_microbatches=2, carry_argnum=2), ValueError, "has_aux=True"),
        (
            lambda: optaccum.grad(mean_loss, num_microbatches=2, track_noise_scale=True),
            ValueError,
            "return_info",
        ),
        (
            lambda: optaccum.grad(mean_loss, num_microbatches=2, in_place=True, skip_nonfinite=True),
            ValueError,
            "in_place=True rules out skip_nonfinite",
        ),
    ],
)
def test_options_that_contradict_each_other(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("loss_fn", "options", "error", "match"),
    [
        (losses, {}, TypeError, r"shape \(6,\).*mean over the examples"),
        (lambda p, b: jnp.int32(1), {}, TypeError, "dtype int32"),
        (lambda p, b: mean_loss(p, b) + 0j, {}, TypeError, "dtype complex64"),
        (lambda p, b: {}, {}, ValueError, "at least one term"),
        (lambda p, b: {"a": optaccum.WeightedMean(losses(p, b), 1.0)}, {}, TypeError, r"loss\['a'\].total"),
        (lambda p, b: (mean_loss(p, b), 1.0), {}, TypeError, "has_aux=True"),
        (mean_loss, {"has_aux": True}, TypeError, r"return \(loss, aux\)"),
        (mean_loss, {"argnums": 5}, ValueError, "2 positional arguments; got 5"),
        (mean_loss, {"num_microbatches": 12}, ValueError, "12 micro-batches for 11 examples"),
        (terms_loss, {"skip_nonfinite": True}, ValueError, "share one weight"),
        (mean_loss, {"grad_reduction_fn": lambda path, leaf: "sum"}, ValueError, '"mean" or "max"'),
        (
            mean_loss,
            {"accumulator_dtype": jnp.bfloat16, "in_place": True},
            ValueError,
            "bfloat16 sum",
        ),
    ],
)
def test_mistakes_are_named_at_the_first_call(loss_fn, options, error, match):
    grad_fn = optaccum.value_and_grad(loss_fn, **({"num_microbatches": 2} | options))
    with pytest.raises(error, match=match):
        jax.eval_shape(grad_fn, PARAMS, BATCH)


def test_integer_parameters_and_changing_carries_are_refused_by_name():
    with pytest.raises(TypeError, match=r"int32 at argument\['n'\]"):
        optaccum.grad(lambda p, x: x.mean(), num_microbatches=2)({"n": jnp.int32(1)}, jnp.ones(4))

    def loss_fn(w, x, carry):
        return (w * x).mean(), ({"s": carry["s"].astype(jnp.float16)}, None)

    with pytest.raises(TypeError, match=r"carry\['s'\].*float32.*float16"):
        optaccum.grad(loss_fn, num_microbatches=2, has_aux=True, carry_argnum=2)(
            1.0, jnp.ones(4), {"s": jnp.float32(0)}
        )


def test_weights_in_a_first_pass_cost_no_forward_where_they_depend_on_the_batch_only():
    def flops(weight_of):
        def loss_fn(w, x):
            h = jnp.tanh(x @ w)
            return {
                "a": optaccum.WeightedMean(h.sum(), x.shape[0]),
                "b": optaccum.WeightedMean((h**2).sum(), weight_of(h, x)),
            }

        grad_fn = functools.partial(optaccum.value_and_grad(loss_fn, num_microbatches=4))
        compiled = jax.jit(grad_fn).lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile()
        return compiled.as_text().count(" dot(")

    of_the_batch = flops(lambda h, x: (x[:, 0] > 0).sum())
    of_the_forward = flops(lambda h, x: (h[:, 0] > 0).sum())
    assert of_the_forward == of_the_batch + 1
