"""Scanning against a float64 model in plain NumPy: any batch, in any order, masked, with NaN anywhere."""

import functools
import pickle
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import optaccum

HYPOTHESIS = {"derandomize": True, "deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
SHAPES = [(1, 1), (5, 2), (7, 7), (9, 4)]  # examples and micro-batches: sizes even, odd, of one example
KEY = 7


class Batch(NamedTuple):
    """Example i has features x, a target y, and a weight (tokens) for each of two terms."""

    x: Any  # shape=(examples, 2)
    y: Any  # shape=(examples,)
    tokens: Any  # shape=(examples,)
    routed: Any  # shape=(examples,)


def params_of(dtype):
    return {"w": jnp.array([1, -2], dtype), "b": jnp.array(3, dtype)}


def residuals(params, batch):
    return batch.x @ params["w"].astype(jnp.float32) + params["b"].astype(jnp.float32) - batch.y


def plain(params, batch, key, carry):
    r = residuals(params, batch)
    aux = {"mean": jnp.mean(r), "rows": r, "sum": optaccum.Sum(jnp.sum(r)), "key": optaccum.Stack(draw(key))}
    return jnp.mean(r**2 / 2), (carry / 2 + jnp.mean(batch.y), aux)


def weighted(params, batch, key, carry):
    r = residuals(params, batch)
    tokens = jnp.sum(batch.tokens)
    aux = {
        "mean": optaccum.WeightedMean(jnp.sum(batch.tokens * r), tokens),
        "rows": r,
        "max": optaccum.Max(jnp.max(r)),
        "min": optaccum.Min(jnp.min(r)),
        "last": optaccum.Last(r[-1]),
        "key": optaccum.Stack(draw(key)),
    }
    loss = optaccum.WeightedMean(jnp.sum(batch.tokens * r**2 / 2), tokens)
    return loss, (carry / 2 + jnp.sum(batch.y), aux)


def terms(params, batch, key, carry):
    loss, (carry, aux) = weighted(params, batch, key, carry)
    routed = optaccum.WeightedMean(jnp.sum(batch.routed * 3 * residuals(params, batch)), jnp.sum(batch.routed))
    return {
        "tokens": loss,
        "routed": routed,
        "examples": optaccum.WeightedMean(jnp.sum(params["b"].astype(jnp.float32) * batch.y), len(batch.y)),
    }, (
        carry,
        aux,
    )


def draw(key):
    return jax.random.uniform(key)


class Setting(NamedTuple):
    loss_fn: Any
    skip_nonfinite: bool = False
    dtype: Any = jnp.float32
    in_place: bool | None = None


SETTINGS = {
    "plain": Setting(plain, in_place=True),
    "plain, skipping": Setting(plain, skip_nonfinite=True),
    "weighted": Setting(weighted, in_place=True),
    "weighted, skipping": Setting(weighted, skip_nonfinite=True),
    "weighted, bf16": Setting(weighted, dtype=jnp.bfloat16, in_place=False),
    "terms": Setting(terms, in_place=True),
}


# The library.

num_traces: dict[tuple[str, int], int] = {}


@functools.cache
def grad_fn_of(name, n):
    setting = SETTINGS[name]

    def loss_fn(*args):
        num_traces[name, n] = num_traces.get((name, n), 0) + 1
        return setting.loss_fn(*args)

    return optaccum.value_and_grad(
        loss_fn,
        num_microbatches=n,
        has_aux=True,
        key_argnum=2,
        carry_argnum=3,
        skip_nonfinite=setting.skip_nonfinite,
        in_place=setting.in_place,
        return_info=True,
    )


def run_library(name, n, batch):
    args = (
        params_of(SETTINGS[name].dtype),
        jax.tree.map(jnp.float32, batch),
        jax.random.key(KEY),
        jnp.float32(1),
    )
    (value, (carry, aux)), grads, info = grad_fn_of(name, n)(*args)
    assert {leaf.dtype for leaf in jax.tree.leaves((value, grads))} == {jnp.dtype(jnp.float32)}
    results = {
        "value": value,
        "carry": carry,
        "grads": grads,
        "weight": info.weight,
        "skipped": info.num_skipped,
    }
    return jax.tree.map(np.asarray, results | aux)


# The model.


@functools.cache
def draws(n):
    return np.array([draw(jax.random.fold_in(jax.random.key(KEY), i)) for i in range(n)])


def run_model(name, n, batch, wrong=""):
    """In float64; `wrong` names one way to get it wrong."""
    loss_fn, skip_nonfinite = SETTINGS[name][:2]
    x, y, tokens, routed = batch
    r, ones = x @ np.array([1.0, -2.0]) + 3.0 - y, np.ones(len(y))
    parts = [np.arange(i, len(r), n) for i in range(n)]
    if wrong == "contiguous":
        parts = np.array_split(np.arange(len(r)), n)
    kept = [part for part in parts if not skip_nonfinite or np.isfinite(r[part]).all()]
    if wrong == "drop examples":
        kept = [part[np.isfinite(r[part])] for part in parts]
    rows = np.concatenate([[], *kept]).astype(int)
    carry = 1.0
    for part in parts if wrong == "carry what is dropped" else kept:
        carry = carry / 2 + (y[part].mean() if loss_fn is plain else y[part].sum())

    def ratio(totals, weights):
        if wrong == "mean of means":
            return np.mean([totals[part].sum(0) / max(weights[part].sum(), 1) for part in kept], axis=0)
        weight = weights[rows].sum()
        return totals[rows].sum(0) / weight if weight else np.zeros(totals.shape[1:])

    weights = ones if loss_fn is plain else tokens
    counted = [(weights * r**2 / 2, weights * r, weights)]  # loss, its derivative by r, weight
    if loss_fn is terms:
        counted += [(routed * 3 * r, routed * 3, tokens if wrong == "one denominator" else routed)]
        counted += [(3 * y, 0 * y, ones)]
    grads = {
        "w": sum(ratio(slope[:, None] * x, weight) for _, slope, weight in counted),
        "b": sum(ratio(slope, weight) for _, slope, weight in counted),
    }
    if loss_fn is terms:
        grads["b"] += ratio(y, ones)
    results = {
        "value": sum(ratio(total, weight) for total, _, weight in counted) if kept else np.nan,
        "grads": grads,
        "carry": carry,
        "weight": weights[rows].sum() if loss_fn is weighted else len(rows),
        "skipped": n - len(kept),
        "rows": r,
        "key": draws(n),
    }
    if not kept:  # what a mean, or a maximum, over nothing is, is not said
        return results
    results["mean"] = ratio(weights * r, weights)
    if loss_fn is plain:
        return results | {"sum": r[rows].sum()}
    return results | {"max": r[rows].max(), "min": r[rows].min(), "last": r[kept[-1][-1]]}


def check(actual, expected):
    for key, want in expected.items():
        for a, e in zip(jax.tree.leaves(actual[key]), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5, err_msg=key)


# The properties.


def batch_of(seed, size, bad, token_counts=(0, 1, 2)):
    rng = np.random.default_rng(seed)
    batch = Batch(
        x=rng.integers(-1, 3, (size, 2)).astype(float),
        y=rng.integers(-3, 4, size).astype(float),
        tokens=rng.choice(token_counts, size).astype(float),
        routed=rng.integers(0, 3, size).astype(float),
    )
    for row in bad:
        if row % 2:
            batch.x[row % size, 0] = np.nan
        else:
            batch.y[row % size] = np.nan
    return batch


batches = st.builds(
    functools.partial(dict),
    seed=st.integers(0, 50),
    bad=st.one_of(st.just(()), st.sets(st.integers(0, 17), max_size=4)),
    token_counts=st.sampled_from([(0, 1, 2), (0,), (0, 0, 0, 2), (0.5, 1.5)]),
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_any_batch_gives_what_the_model_says(name, shape):
    size, n = shape
    traces = []

    @hypothesis.settings(max_examples=12, **HYPOTHESIS)
    @hypothesis.given(batches)
    def holds(drawn):
        batch = batch_of(size=size, **drawn)
        check(run_library(name, n, batch), run_model(name, n, batch))
        traces.append(num_traces[name, n])

    holds()
    assert len(set(traces)) == 1  # what the first call traced


@pytest.mark.parametrize(
    ("wrong", "name", "bad"),
    [
        ("contiguous", "weighted", ()),  # by its carry
        ("mean of means", "plain", ()),
        ("mean of means", "weighted", ()),
        ("one denominator", "terms", ()),
        ("drop examples", "plain, skipping", (3,)),
        ("carry what is dropped", "weighted, skipping", (3,)),
    ],
)
def test_the_model_tells_a_wrong_formula(wrong, name, bad):
    batch = batch_of(1, 9, bad)
    actual = run_library(name, 4, batch)
    check(actual, run_model(name, 4, batch))
    with pytest.raises(AssertionError):
        check(actual, run_model(name, 4, batch, wrong))


@hypothesis.settings(max_examples=15, **HYPOTHESIS)
@hypothesis.given(st.lists(batches, min_size=2, max_size=2), st.sampled_from([0, 1, 2]))
def test_a_window_of_windows_is_the_mean_over_all_tokens(drawn, restart_after):
    """Also with a restart between its two batches."""
    given = [batch_of(size=9, **one) for one in drawn]
    tx = optaccum.accumulate(optax.identity(), 2)
    state = tx.init(params_of(jnp.float32))
    for i, batch in enumerate(given):
        results = run_library("weighted, skipping", 4, batch)
        updates, state = tx.update(results["grads"], state, weight=results["weight"])
        if i < restart_after:
            state = pickle.loads(pickle.dumps(jax.device_get(state)))
    models = [run_model("weighted, skipping", 4, batch) for batch in given]
    weights = [model["weight"] for model in models]
    mean = jax.tree.map(
        lambda a, b: (weights[0] * a + weights[1] * b) / (sum(weights) or 1), *[m["grads"] for m in models]
    )
    check({"updates": updates}, {"updates": mean})
    assert bool(state.has_updated) == (sum(weights) > 0)
    assert optaccum.weight_total(state) == sum(weights)
    unequal = weights[0] * weights[1] > 0 and weights[0] != weights[1]
    different = abs(models[0]["grads"]["b"] - models[1]["grads"]["b"]) > 0.1
    if unequal and different:
        plain_mean = jax.tree.map(lambda a, b: (a + b) / 2, *[m["grads"] for m in models])
        with pytest.raises(AssertionError):
            check({"updates": updates}, {"updates": plain_mean})
