"""What leaves a micro-batch comes back as the whole batch would give it."""

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_trees_close, assert_trees_equal

import optaccum

W = jnp.array([0.5, -1.0, 2.0])
X = jax.random.normal(jax.random.key(0), (11, 3))


def run(aux_fn, n=4, weighted=False, x=X, **options):
    def loss_fn(w, x):
        losses = jnp.tanh(x @ w)
        loss = optaccum.WeightedMean(losses.sum(), losses.size) if weighted else losses.mean()
        return loss, aux_fn(w, x)

    (_, aux), _ = optaccum.value_and_grad(loss_fn, num_microbatches=n, has_aux=True, **options)(W, x)
    return aux


@pytest.mark.parametrize("n", [1, 4, 11])
def test_wrappers_as_named(n):
    aux = run(
        lambda w, x: {
            "mean": optaccum.WeightedMean((x[:, 0] * x[:, 1] ** 2).sum(), (x[:, 1] ** 2).sum()),
            "sum": optaccum.Sum({"positive": (x[:, 0] > 0).sum(), "x": x.sum(0)}),
            "max": optaccum.Max(x.max(0)),
            "min": optaccum.Min(x.min(0)),
            "any": optaccum.Max((x[:, 0] > 2).any()),
            "all": optaccum.Min((x[:, 0] > -9).all()),
            "count": optaccum.Max(jnp.int32(x.shape[0])),
            "last": optaccum.Last(x[-1]),
            "stack": optaccum.Stack(x[0]),
            "none": None,
        },
        n,
    )
    weights = X[:, 1] ** 2
    assert_trees_close(aux["mean"], (X[:, 0] * weights).sum() / weights.sum(), rtol=1e-5)
    assert int(aux["sum"]["positive"]) == int((X[:, 0] > 0).sum())
    assert_trees_close(aux["sum"]["x"], X.sum(0), rtol=1e-5, atol=1e-6)
    assert_trees_equal((aux["max"], aux["min"]), (X.max(0), X.min(0)))
    assert (bool(aux["any"]), bool(aux["all"])) == (bool((X[:, 0] > 2).any()), True)
    assert int(aux["count"]) == -(-11 // n)
    assert_trees_equal(aux["last"], X[n - 1 :: n][-1])
    assert_trees_equal(aux["stack"], X[:n])
    assert aux["none"] is None
    mean_of_means = jnp.stack(
        [(X[i::n, 0] * weights[i::n]).sum() / weights[i::n].sum() for i in range(n)]
    ).mean()
    assert n == 1 or abs(mean_of_means - aux["mean"]) > 1e-3


@pytest.mark.parametrize("n", [1, 4, 11])
def test_bare_leaves_with_one_batch_axis_are_concatenated_in_order(n):
    aux = run(
        lambda w, x: (x * w, x.T, jnp.einsum("bi,bj->ibj", x, x), x[:, 0] > 0, jnp.zeros((2, x.shape[0]))), n
    )
    assert_trees_close(
        aux, (X * W, X.T, jnp.einsum("bi,bj->ibj", X, X), X[:, 0] > 0, jnp.zeros((2, 11))), rtol=1e-6
    )
    by_micro_batch = jnp.concatenate([X[i::n] for i in range(n)])
    assert n in (1, 11) or not (by_micro_batch == X).all()


def test_a_bare_float_is_the_mean_over_examples_however_uneven():
    aux = run(lambda w, x: {"m": (x**2).mean(), "half": x.mean().astype(jnp.bfloat16)})
    assert_trees_close(aux["m"], (X**2).mean(), rtol=1e-6)
    assert aux["half"].dtype == jnp.float32
    mean_of_means = jnp.stack([(X[i::4] ** 2).mean() for i in range(4)]).mean()
    assert abs(mean_of_means - aux["m"]) > 1e-4 * aux["m"]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(
    ("aux_fn", "weighted", "match"),
    [
        (lambda w, x: {"bad": x.mean()}, True, r"\['bad'\].*WeightedMean"),
        (lambda w, x: {"bad": jnp.int32(1)}, False, r"\['bad'\].*int32.*Sum"),
        (lambda w, x: {"bad": (x > 0).any()}, False, r"\['bad'\].*bool.*Max"),
        (lambda w, x: {"bad": x @ x.T}, False, r"\['bad'\].*one axis"),
        (lambda w, x: {"bad": x.reshape(-1)[1:]}, False, r"\['bad'\].*one axis"),
    ],
    ids=["float under weights", "int", "bool", "two batch axes", "not a multiple"],
)
def test_leaves_that_stand_for_nothing_are_refused_whatever_n(aux_fn, weighted, match, n):
    with pytest.raises(TypeError, match=match):
        run(aux_fn, n, weighted)


def test_sums_are_wide_and_extremes_keep_their_dtype():
    ones = jnp.ones((1024, 3), jnp.bfloat16)
    aux = run(
        lambda w, x: (
            optaccum.Sum(ones[0, 0] + 0 * x[0, 0].astype(jnp.bfloat16)),
            optaccum.Max(x[0, 0].astype(jnp.bfloat16)),
        ),
        n=512,
        x=ones.astype(jnp.float32),
    )
    assert float(aux[0]) == 512  # a bfloat16 sum stops at 256
    assert (aux[0].dtype, aux[1].dtype) == (jnp.float32, jnp.bfloat16)


def test_a_dropped_micro_batch_stays_out_of_reductions_but_keeps_its_rows():
    x = X.at[1].set(jnp.nan)  # micro-batch 1 of 4
    aux = run(
        lambda w, x: {
            "sum": optaccum.Sum(x.shape[0]),
            "max": optaccum.Max(x.max()),
            "mean": x.mean(),
            "stack": optaccum.Stack(x[0, 0]),
            "rows": x[:, 0],
        },
        x=x,
        skip_nonfinite=True,
    )
    kept = x[jnp.arange(11) % 4 != 1]
    assert int(aux["sum"]) == len(kept)
    assert_trees_close((aux["max"], aux["mean"]), (kept.max(), kept.mean()), rtol=1e-6)
    assert jnp.isnan(aux["stack"]).tolist() == [False, True, False, False]
    assert jnp.isnan(aux["rows"]).tolist() == [i == 1 for i in range(11)]


def test_wrappers_are_pytrees():
    for cls in (optaccum.Sum, optaccum.Max, optaccum.Min, optaccum.Last, optaccum.Stack):
        assert jax.tree.map(lambda x: x + 1, cls({"a": 1})) == cls({"a": 2})
    assert jax.tree.leaves(optaccum.WeightedMean(3, 4)) == [3, 4]


def test_complex_extremes_are_refused():
    with pytest.raises(TypeError, match="real"):
        run(lambda w, x: optaccum.Max(x[0, 0] * 1j))
