"""`verify`: what it compares, with which tolerance, on which dtypes and devices. Causes: test_diagnose.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaccum

B, D = 16, 4


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(D, 32)), "b": rng.normal(size=32), "out": rng.normal(size=32)}
    batch = {"x": rng.normal(size=(B, D)), "y": rng.normal(size=B)}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, batch))


def losses(params, batch):
    h = jnp.tanh(batch["x"] @ params["w"] + params["b"])
    return jnp.square(h @ params["out"] - batch["y"])


def mean_loss(params, batch):
    return losses(params, batch).mean()


def summed(params, batch):
    return losses(params, batch).sum()


def test_a_report_says_what_was_compared():
    params, batch = problem()
    report = optaccum.verify(mean_loss, params, batch, num_microbatches=4)
    assert report.ok
    assert set(report.leaves) == {"['w']", "['b']", "['out']"}
    assert report.max_relative_error == max(report.value_error, *report.leaves.values()) <= report.rtol
    assert 1e-4 < report.rtol < 1.1e-4
    assert report.num_microbatches == 4
    report.raise_if_failed()
    first, *lines = str(report).splitlines()
    assert first.startswith("4 micro-batches and the whole batch agree: largest relative error")
    assert lines[0].split()[0] == "value"
    assert len(lines) == 4


def test_a_failed_report_raises_itself_with_the_worst_leaves_first():
    params = [jnp.float32(i + 1) for i in range(12)]

    def loss_fn(params, x):
        return (sum(params) * x).mean() + params[7] * x.sum()

    report = optaccum.verify(loss_fn, params, jnp.ones(4), num_microbatches=2)
    first, _, worst, *_, others, cause = str(report).splitlines()
    assert "DISAGREE" in first
    assert worst.split()[0] == "[7]"
    assert others.strip() == "... and 4 leaves with smaller errors"
    assert cause == f"Likely cause: {report.cause}"
    assert len(report.leaves) == 12
    with pytest.raises(AssertionError) as info:
        report.raise_if_failed()
    assert str(info.value) == str(report)
    assert optaccum.verify(loss_fn, params, jnp.ones(4), num_microbatches=2, rtol=10).ok


def test_several_arguments_in_micro_batches_of_a_size():
    params, batch = problem()

    def loss_fn(w, b, rows, out):
        return mean_loss({"w": w, "b": b, "out": out}, rows)

    args = params["w"], params["b"], batch, params["out"]
    report = optaccum.verify(loss_fn, *args, microbatch_size=3, argnums=(0, -1), batch_argnums=-2)
    assert report.ok
    assert report.num_microbatches == 6
    assert set(report.leaves) == {"[0]", "[1]"}


def with_aux(params, batch, carry):
    """The loss, a carry, and aux of every kind, each as the whole batch would have it."""
    each = losses(params, batch)
    carry = {"count": carry["count"] + 1, "mean": 0.9 * carry["mean"] + 0.1 * batch["x"].mean(0)}
    aux = {
        "rows": each,
        "mean": each.mean(),
        "ratio": optaccum.WeightedMean(batch["x"].sum(), (batch["x"] > 0).sum()),
        "count": optaccum.Sum((batch["x"] > 0).sum(0)),
        "largest": optaccum.Max(each.max()),
        "least": optaccum.Min({"x": batch["x"].min(0)}),
        "last": optaccum.Last(batch["y"].sum()),
        "stack": optaccum.Stack(batch["y"].sum()),
    }
    return each.mean(), (carry, aux)


CARRY = {"count": 0, "mean": jnp.ones(D)}
BESIDE = {f"aux['{name}']" for name in ("rows", "mean", "ratio", "count", "largest", "last", "stack")}
BESIDE |= {"aux['least']['x']", "carry['count']", "carry['mean']"}


def test_aux_and_carry_are_compared():
    options = {"num_microbatches": 3, "has_aux": True, "carry_argnum": 2, "return_info": True}
    report = optaccum.verify(with_aux, *problem(), CARRY, **options, track_noise_scale=True)
    assert report.ok, str(report)
    assert {path for path in report.leaves if not path.startswith("[")} == BESIDE


def test_aux_that_does_not_combine_as_it_stands():
    def loss_fn(params, batch):
        x, y = batch["x"], batch["y"]
        count, mean = (x > 0).sum(), jnp.square(y).mean()
        wrong = {
            "a count": 1.0 * count,
            "a mean": optaccum.Sum(mean),
            "a ratio": x.sum() / count,
            "a norm": jnp.sqrt(jnp.square(y).sum()),
            "of sums": optaccum.Max(y.sum()),
        }
        right = [optaccum.Sum(count), mean, optaccum.WeightedMean(x.sum(), count)]
        return mean_loss(params, batch), {"wrong": wrong, "right": right}

    report = optaccum.verify(loss_fn, *problem(), num_microbatches=3, has_aux=True)
    wrong = {path: error for path, error in report.leaves.items() if error > report.rtol}
    assert set(wrong) == {path for path in report.leaves if "wrong" in path}
    assert len(wrong) == 5
    assert report.cause.startswith(f"{max(wrong, key=wrong.get)} does not combine over micro-batches")
    assert "optaccum.Sum(x)" in report.cause


def presplit(batch, n):
    """Contiguous micro-batches."""
    return jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)


def test_with_presplit_everything_is_compared_with_a_python_loop(monkeypatch):
    params, batch = problem()
    batch = presplit(batch, 4)
    options = {"presplit": True, "has_aux": True}
    report = optaccum.verify(with_aux, params, batch, CARRY, carry_argnum=2, **options)
    assert report.ok, str(report)
    assert str(report).startswith("4 micro-batches and the same in a Python loop agree")
    assert set(report.leaves) > BESIDE

    def terms(params, batch, key, carry, _):
        each = losses(params, batch) * jax.random.uniform(key, batch["y"].shape)
        loss = {
            "a": optaccum.WeightedMean(each.sum(), (batch["y"] > 0).sum()),
            "b": optaccum.WeightedMean(each[0], 1),
        }
        return loss, (carry + each.sum(), {"rows": each, "stack": optaccum.Stack(each.max())})

    args = params, batch, jax.random.key(0), jnp.float32(0), 3  # of 4
    options |= {"key_argnum": 2, "carry_argnum": 3, "count_argnum": 4}
    report = optaccum.verify(terms, *args, **options)
    assert report.ok, str(report)
    assert set(report.leaves) >= {"carry", "aux['rows']", "aux['stack']"}

    def wrong(*args, **options):  # as where a compiler errs: the accumulated carry comes back wrong
        grad_fn = optaccum.value_and_grad(*args, **options)

        def off(*args):
            (loss, (carry, aux)), grads = grad_fn(*args)
            return (loss, (1.01 * carry, aux)), grads

        off.options = grad_fn.options
        return off

    monkeypatch.setattr("optaccum._instruments.verify.value_and_grad", wrong)
    report = optaccum.verify(terms, *args, **options)
    assert not report.ok
    assert report.leaves["carry"] == pytest.approx(0.01, rel=0.01)
    assert report.cause.startswith("carry is not what the same micro-batches give in a Python loop")


def test_what_is_dropped_is_dropped_in_the_loop_too():
    params, batch = problem()
    batch = presplit(batch, 4)

    def loss_fn(params, batch, not_finite):
        loss = mean_loss(params, batch)
        return jnp.where(batch["y"][0] == not_finite, jnp.nan, loss), optaccum.Last(batch["y"])

    options = {"presplit": True, "has_aux": True, "skip_nonfinite": True}
    assert optaccum.verify(loss_fn, params, batch, batch["y"][3, 0], **options).ok


def with_largest(params, batch, _=None):
    return mean_loss(params, batch), {"largest": optaccum.Max(batch["y"].max()), "last": optaccum.Last(batch["y"])}


def test_a_whole_batch_that_is_dropped_says_so():
    params, batch = problem()
    options = {"num_microbatches": 4, "has_aux": True, "skip_nonfinite": True}
    assert optaccum.verify(with_largest, params, batch, **options).ok
    report = optaccum.verify(with_largest, params, {**batch, "y": batch["y"].at[3].set(jnp.nan)}, **options)
    assert report.cause.startswith("not finite: the whole batch's own")


def test_where_no_micro_batch_runs():
    params, batch = problem()
    options = {"presplit": True, "has_aux": True, "count_argnum": 2}
    report = optaccum.verify(with_largest, params, presplit(batch, 4), 0, **options)
    assert report.ok, str(report)
    assert "aux['largest']" not in report.leaves  # of nothing there is none
    assert "aux['largest']" in optaccum.verify(with_largest, params, presplit(batch, 4), 1, **options).leaves


def test_infinities_in_aux_are_compared():
    def loss_fn(params, batch, limit):
        masked = jnp.where(batch["y"] < limit, -jnp.inf, batch["y"])  # as logits are
        return mean_loss(params, batch), (optaccum.Min(masked.min()), masked)

    params, batch = problem()
    options = {"num_microbatches": 4, "has_aux": True}
    assert optaccum.verify(loss_fn, params, batch, batch["y"].mean(), **options).ok
    assert jnp.isinf(loss_fn(params, batch, batch["y"].mean())[1][0].value)

    def of_part(params, batch, limit):
        return loss_fn(params, batch, jnp.where(len(batch["y"]) < B, limit, -jnp.inf))

    report = optaccum.verify(of_part, params, batch, batch["y"].mean(), **options)
    assert np.isnan(report.leaves["aux[1]"])
    assert report.cause.startswith("not finite: a micro-batch's")


@jax.custom_vjp
def observed(x, largest):
    """x; the gradient of the second argument is the largest |x|."""
    return x


observed.defvjp(lambda x, largest: (x, jnp.abs(x).max()), lambda largest, g: (g, largest))


def test_gradients_that_are_reduced_to_their_maximum():
    def loss_fn(params, x):
        each = observed(x @ params["w"], params["largest"])
        return optaccum.WeightedMean(each.sum(), each.size)

    def reduction_of(path, leaf):
        return "max" if "largest" in jax.tree_util.keystr(path) else "mean"

    params, batch = problem()
    params = {"w": params["w"][:, 0], "largest": jnp.float32(0)}
    for x, options in [(batch["x"], {"num_microbatches": 4}), (presplit(batch["x"], 4), {"presplit": True})]:
        report = optaccum.verify(loss_fn, params, x, **options, grad_reduction_fn=reduction_of)
        assert report.ok, str(report)
    report = optaccum.verify(loss_fn, params, batch["x"], num_microbatches=4)
    assert [path for path, error in report.leaves.items() if error > report.rtol] == ["['largest']"]


def in_bf16(loss_fn):
    return lambda params, batch: loss_fn(*jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, batch)))


def test_bf16_models_pass_and_a_tenth_too_much_is_still_caught():
    report = optaccum.verify(in_bf16(mean_loss), *problem(jnp.bfloat16), num_microbatches=8)
    assert report.ok, str(report)
    assert report.max_relative_error > 0
    assert 5e-2 < report.rtol < 6e-2

    def too_much(params, batch):
        loss = in_bf16(lambda params, batch: jnp.square(batch["x"] @ params["w"]).mean())
        return loss(params, batch) * (1.1 if len(batch["x"]) < B else 1)

    report = optaccum.verify(too_much, *problem(), num_microbatches=8)
    assert not report.ok
    assert 5e-2 < report.rtol < 6e-2


def test_a_bf16_accumulator_widens_the_tolerance():
    params, batch = problem()
    report = optaccum.verify(mean_loss, params, batch, num_microbatches=8, accumulator_dtype=jnp.bfloat16)
    assert report.ok, str(report)
    assert report.max_relative_error > 1e-4
    assert report.rtol == pytest.approx(1e-4 + 8**0.5 / 128)


def test_f64_is_compared_as_f64():
    with jax.enable_x64(True):
        params, batch = problem(jnp.float64)
        report = optaccum.verify(mean_loss, params, batch, num_microbatches=4)
        assert report.ok
        assert report.rtol < 2e-9

        def rounded(params, batch):
            return mean_loss(params, batch).astype(jnp.float32).astype(jnp.float64)

        assert optaccum.verify(rounded, params, batch, num_microbatches=4).rtol > 1e-5


def test_complex_parameters():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, 3)), jnp.complex64)

    def loss_fn(w, x, times):
        return times(jnp.square(jnp.abs(x @ w - 1j)))

    w = jnp.array([1 + 2j, -1j, 0.5])
    verify = functools.partial(optaccum.verify, num_microbatches=4)
    assert verify(functools.partial(loss_fn, times=jnp.mean), w, x).ok
    report = verify(functools.partial(loss_fn, times=jnp.sum), w, x)
    assert not report.ok
    assert report.leaves[""] == pytest.approx(3 / 4, rel=1e-3)
    assert "gradient" in str(report)


def test_a_leaf_whose_gradient_cancels_is_no_alarm():
    params, batch = problem(jnp.bfloat16)

    def loss_fn(params, batch):  # a key's bias shifts all logits alike: softmax cancels it
        h = jnp.tanh(batch["x"] @ params["w"])
        weights = jax.nn.softmax(h * 3 + params["shift"], axis=-1)
        return jnp.square((weights * h) @ params["out"] - batch["y"]).mean()

    params["shift"] = jnp.bfloat16(5)
    report = optaccum.verify(loss_fn, params, batch, num_microbatches=8)
    assert report.ok, str(report)
    assert report.leaves["['shift']"] > 0


def test_a_whole_gradient_and_a_value_that_cancel_are_no_alarm():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, D)), jnp.float32) * 100
    x = jnp.concatenate([x, -x])[np.random.default_rng(1).permutation(128)]
    report = optaccum.verify(lambda w, x: (x @ w).mean(), jnp.ones(D), x, num_microbatches=8)
    assert report.ok, str(report)
    wrong = optaccum.verify(lambda w, x: (x @ w).mean() + x[0] @ w, jnp.ones(D), x, num_microbatches=8)
    assert not wrong.ok


def test_zero_gradients_agree_and_a_leaf_that_should_be_zero_does_not():
    def loss_fn(params, x):
        return (params["a"] * x).mean() + (params["unused"] * x.sum() if len(x) == 2 else 0)

    params = {"a": jnp.float32(1), "unused": jnp.float32(0)}
    x = jnp.arange(8.0)
    assert optaccum.verify(lambda p, x: 0 * p["a"] + x.mean(), params, x, num_microbatches=2).ok
    assert optaccum.verify(loss_fn, params, x, num_microbatches=4).leaves["['unused']"] > 1


def test_parameters_that_fit_the_data_are_no_alarm():
    """Then all that is left of the gradient is how the outputs were rounded, in one micro-batch so, in another so."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, D)), jnp.float32)
    w = jnp.arange(1.0, D + 1)
    y = x @ w

    def loss_fn(w, batch, total=jnp.mean):
        x, y = batch
        rounded = 3e-7 * jnp.abs(y).max() * (1 if len(y) == B else -1)
        return total(jnp.square(x @ w - y + rounded))

    accumulated = optaccum.grad(loss_fn, num_microbatches=4)(w, (x, y))
    assert jnp.linalg.norm(accumulated - jax.grad(loss_fn)(w, (x, y))) > 0.5 * jnp.linalg.norm(accumulated)
    report = optaccum.verify(loss_fn, w, (x, y), num_microbatches=4)
    assert report.ok, str(report)
    report = optaccum.verify(functools.partial(loss_fn, total=jnp.sum), 1.001 * w, (x, y), num_microbatches=4)
    assert not report.ok
    assert report.cause.startswith("the loss is a sum")


def test_what_is_not_finite_fails():
    params, batch = problem()
    batch["y"] = batch["y"].at[3].set(jnp.nan)
    report = optaccum.verify(mean_loss, params, batch, num_microbatches=4)
    assert not report.ok
    assert np.isnan(report.max_relative_error)
    assert "not finite: the whole batch's own" in report.cause
    assert "nan" in str(report)
    with pytest.raises(AssertionError):
        report.raise_if_failed()

    def infinite(params, batch):  # its gradients agree
        return mean_loss(params, batch) + (jnp.inf if len(batch["y"]) < B else 0)

    report = optaccum.verify(infinite, *problem(), num_microbatches=4)
    assert not report.ok
    assert "not finite: a micro-batch's" in report.cause


def test_bad_arguments_raise_as_they_do_in_value_and_grad():
    params, batch = problem()
    for kind, options, message in [
        (ValueError, {}, "exactly one of num_microbatches"),
        (ValueError, {"num_microbatches": 17}, "at most as many micro-batches as examples"),
        (ValueError, {"num_microbatches": 2, "rtol": -1e-3}, "rtol to be None or a number >= 0"),
        (ValueError, {"num_microbatches": 2, "rtol": float("nan")}, "rtol to be None or a number >= 0"),
        (ValueError, {"num_microbatches": 2, "batch_argnums": 0}, "one role"),
        (ValueError, {"num_microbatches": 2, "data_axes": "nowhere"}, "data_axes"),
        (TypeError, {"num_microbatches": 2, "microbatches": 2}, "microbatches"),
        (TypeError, {"num_microbatches": 2, "has_aux": True}, "has_aux"),
    ]:
        with pytest.raises(kind, match=message):
            optaccum.verify(mean_loss, params, batch, **options)


def test_a_typing_error_in_the_loss_is_not_taken_for_an_axis():
    with pytest.raises(NameError, match="undefined_name"):
        optaccum.verify(lambda w, x: undefined_name, 1.0, jnp.ones(4), num_microbatches=2)  # noqa: F821
