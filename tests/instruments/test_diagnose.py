"""Each way in which a loss fails to split, on a small language model or on rows of numbers, and what its report says.

Beside some stands the loss put right, which has to pass; elsewhere the cause has to be none.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaccum
from optaccum._instruments.diagnose import explain
from optaccum._instruments.reference import Reference, make_loop
from optaccum._scanning.call import split_call

B, T, VOCAB, D, EXPERTS = 12, 6, 13, 8, 4


@pytest.fixture(scope="module")
def params():
    shapes = {"embed": (VOCAB, D), "w": (D, D), "b": (D,), "router": (D, EXPERTS), "out": (D, VOCAB)}
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(0.7 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (B, T))
    lengths = rng.integers(1, T + 1, (B, 1))
    return {
        "tokens": jnp.asarray(tokens),
        "targets": jnp.asarray((tokens * 3 + 1) % VOCAB),
        "mask": jnp.asarray(np.arange(T) < lengths, jnp.float32),
    }


def hidden(params, batch):
    return jnp.tanh(params["embed"][batch["tokens"]] @ params["w"] + params["b"])


def losses_of(params, h, batch):
    """Cross-entropy of each token; shape=(rows, T)."""
    log_probs = jax.nn.log_softmax(h @ params["out"])
    return -jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]


def losses(params, batch):
    return losses_of(params, hidden(params, batch), batch)


def mean_loss(params, batch):
    return losses(params, batch).mean()


def sum_loss(params, batch):
    return losses(params, batch).sum()


def sum_and_penalty(params, batch):
    return losses(params, batch).sum() / (B * T) + 0.1 * jnp.square(params["w"]).sum()


def twice_divided(params, batch):
    return mean_loss(params, batch) / len(batch["tokens"])


def masked(params, batch):
    return (losses(params, batch) * batch["mask"]).sum() / batch["mask"].sum()


def weighted(params, batch):
    return optaccum.WeightedMean((losses(params, batch) * batch["mask"]).sum(), batch["mask"].sum())


def normalised(params, batch, axis):
    h = hidden(params, batch)
    h = (h - h.mean(axis, keepdims=True)) / jnp.sqrt(h.var(axis, keepdims=True) + 1e-5)
    return losses_of(params, h, batch).mean()


def load_balanced(params, batch):
    """Switch Transformer: the experts' shares of tokens times their mean probabilities."""
    probs = jax.nn.softmax(hidden(params, batch) @ params["router"])
    share = jax.nn.one_hot(probs.argmax(-1), EXPERTS).mean((0, 1))
    return mean_loss(params, batch) + 0.1 * EXPERTS * (share * probs.mean((0, 1))).sum()


def contrastive(params, batch):
    """InfoNCE: each row's prefix against all rows' suffixes."""
    h = hidden(params, batch).reshape(-1, 2, T // 2 * D)
    return -jnp.diag(jax.nn.log_softmax(h[:, 0] @ h[:, 1].T / D)).mean()


def paired(params, batch):
    h = hidden(params, batch).reshape(-1, 2, T // 2 * D)
    return -jax.nn.log_sigmoid((h[:, 0] * h[:, 1]).sum(-1) / D).mean()


def preferred(params, batch):
    """Row 2i is preferred to row 2i + 1."""
    h = hidden(params, batch).sum((1, 2))
    return -jax.nn.log_sigmoid(h[0::2] - h[1::2]).mean()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def faulty_look_up(table, tokens, add):
    return table[tokens]


def _look_up_backward(add, residuals, g):
    shape, tokens = residuals
    zeros = jnp.zeros(shape, g.dtype)
    return (zeros.at[tokens].add(g) if add else zeros.at[tokens].set(g)), None


faulty_look_up.defvjp(lambda table, tokens, add: (table[tokens], (table.shape, tokens)), _look_up_backward)


def looked_up(params, batch, add):
    return jnp.square(faulty_look_up(params["embed"], batch["tokens"], add) @ params["w"]).mean()


CAUSES = {  # the wrong loss, the one put right, micro-batches, the cause, the way out
    "sum": (sum_loss, None, 5, "is a sum over the batch", "Return the mean"),
    "constant": (sum_and_penalty, None, 4, "divided by a constant", "Return the mean"),
    "twice": (twice_divided, None, 4, "divided by the batch size twice", "optaccum.chunked"),
    "weights": (masked, weighted, 12, "unequal weights", "optaccum.WeightedMean(total, weight)"),
    "BatchNorm": (
        functools.partial(normalised, axis=(0, 1)),
        functools.partial(normalised, axis=-1),
        4,
        "batch statistics",
        "carry_argnum",
    ),
    "load balancing": (load_balanced, None, 4, "product of batch means", "optaccum.chunked"),
    "contrastive": (contrastive, None, 4, "see each other", "optaccum.chunked"),
    "rows": (preferred, paired, 4, "rows that belong together", "presplit=True"),
}


def diagnosed(loss_fn, params, batch, n):
    """The cause of a wrong gradient, from the loss alone."""
    options = optaccum.value_and_grad(loss_fn, num_microbatches=n).options
    call, _ = split_call(options.roles, (params, batch), {})
    loop = make_loop(lambda call: (loss_fn(*call.diff, *call.batch), (), ()), options, None, ())
    value = loop.results_of(call, [call.batch], with_grads=False)["value"]
    reference = Reference(loop, call, n, jaxpr="", expected={}, in_loop=frozenset())
    return explain({"gradient": 1.0}, 0.0, reference, (), resolution=2e-5 * abs(value))


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_and_the_way_out_are_named_and_the_loss_put_right_passes(name, params, batch):
    loss_fn, put_right, n, cause, way_out = CAUSES[name]
    found = diagnosed(loss_fn, params, batch, n)
    assert cause in found
    assert way_out in found
    if put_right is not None:
        report = optaccum.verify(put_right, params, batch, num_microbatches=4)
        assert report.ok, str(report)
        assert not report.cause


@pytest.mark.parametrize("padded", [slice(B - 1, B), slice(1, B, 4)])
def test_padding_in_few_rows_is_found_wherever_it_is(padded, params, batch):
    mask = np.ones((B, T), np.float32)
    mask[padded, 1:] = 0
    assert "unequal weights" in diagnosed(masked, params, {**batch, "mask": jnp.asarray(mask)}, 4)


def test_nothing_departs_from_a_mean_where_all_weigh_alike(params, batch):
    batch = {**batch, "mask": jnp.ones((B, T)).at[:, 3:].set(0)}
    for loss_fn in (mean_loss, masked):
        assert "the loss splits" in diagnosed(loss_fn, params, batch, 4)


X = jnp.asarray(np.random.default_rng(2).normal(size=(B, D)), jnp.float32)
W = jnp.arange(1.0, D + 1) / D


def policy_gradient(w, x, normalise):
    """With advantages that are normalised over the rows it is given, the value is always zero."""
    log_probs, reward = x @ w, x.sum(-1)
    reward = reward - reward.mean() if normalise else reward
    return (jnp.exp(log_probs - jax.lax.stop_gradient(log_probs)) * reward).mean()


@pytest.mark.parametrize("normalise", [False, True])
def test_a_gradient_that_hides_what_it_depends_on(normalise):
    loss_fn = functools.partial(policy_gradient, normalise=normalise)
    report = optaccum.verify(loss_fn, W, X, num_microbatches=4)
    assert report.ok != normalise, str(report)
    assert ("normalise them before splitting" in report.cause) == normalise


def test_only_the_leaves_behind_a_faulty_gradient_are_off(params, batch):
    report = optaccum.verify(functools.partial(looked_up, add=False), params, batch, num_microbatches=4)
    assert [path for path, error in report.leaves.items() if error > report.rtol] == ["['embed']"]
    assert report.value_error <= report.rtol
    assert "the compiler is at fault: compare with jax.disable_jit()" in report.cause
    assert optaccum.verify(functools.partial(looked_up, add=True), params, batch, num_microbatches=4).ok


def dropout(w, x, keys):
    """One key for the micro-batch, or one for each of its rows."""
    if keys.ndim:
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (D,)))(keys)
    else:
        kept = jax.random.bernoulli(keys, 0.8, x.shape)
    return jnp.square(jnp.where(kept, x / 0.8, 0) @ w).mean()


def test_a_key_that_matters():
    key, options = jax.random.key(1), {"num_microbatches": 4}
    report = optaccum.verify(dropout, W, X, key, **options, key_argnum=2)
    assert "a key that matters" in report.cause
    # The way out that the report names.
    assert optaccum.verify(dropout, W, X, jax.random.split(key, B), **options, batch_argnums=(1, 2)).ok


@pytest.mark.parametrize(("moves", "cause"), [(True, "a carry that matters"), (False, "is a sum")])
def test_a_carry_that_matters(moves, cause):
    def loss_fn(w, x, mean):
        loss = jnp.square((x - mean) @ w)
        return (loss.mean(), (x.mean(0), {})) if moves else (loss.sum(), (mean, {}))

    options = {"num_microbatches": 4, "has_aux": True, "carry_argnum": 2}
    assert cause in optaccum.verify(loss_fn, W, X, jnp.ones(D), **options).cause


def test_a_loss_that_takes_no_other_size_still_gets_its_report():
    def loss_fn(w, x):
        if len(x) not in (B, B // 2, B // 4):
            raise ValueError("only whole batches and micro-batches")
        return (x @ w).sum()

    report = optaccum.verify(loss_fn, W, X, num_microbatches=2)
    assert report.value_error == pytest.approx(1 / 2)
    assert "ValueError: only whole batches" in report.cause
