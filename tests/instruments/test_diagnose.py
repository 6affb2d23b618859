"""Each way in which a loss fails to split, on a small language model, and what its report says.

Beside each stands the loss put right, which has to pass: who always says "sum" is right about sums.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaccum
from optaccum._instruments.diagnose import diagnose
from optaccum._instruments.references import Reference, Results
from optaccum._scanning.call import Call

pytestmark = pytest.mark.usefixtures("fast_compilation")
B, T, VOCAB, D, EXPERTS = 12, 6, 13, 8, 4


@pytest.fixture(scope="module")
def params():
    shapes = {"embed": (VOCAB, D), "w": (D, D), "b": (D,), "router": (D, EXPERTS), "out": (D, VOCAB)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: 0.7 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


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


def look_up(table, tokens):
    return table[tokens]


def hidden(params, batch, look_up=look_up):
    return jnp.tanh(look_up(params["embed"], batch["tokens"]) @ params["w"] + params["b"])


def losses_of(params, h, batch):
    """Cross-entropy of each token; shape=(rows, T)."""
    log_probs = jax.nn.log_softmax(h @ params["out"])
    return -jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]


def losses(params, batch, **options):
    return losses_of(params, hidden(params, batch, **options), batch)


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


def router_penalty(params, batch):
    z = jax.nn.logsumexp(hidden(params, batch) @ params["router"], axis=-1)
    each = losses(params, batch)
    router = optaccum.WeightedMean(0.1 * jnp.square(z).sum(), z.size)
    return {"tokens": optaccum.WeightedMean(each.sum(), each.size), "router": router}


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


def policy_gradient(params, batch, normalise=False):
    """With advantages that are normalised over the rows it is given, the value is always zero."""
    log_probs = -losses(params, batch).sum(-1)
    reward = batch["tokens"].sum(-1).astype(jnp.float32)
    reward = reward - reward.mean() if normalise else reward
    return (jnp.exp(log_probs - jax.lax.stop_gradient(log_probs)) * reward).mean()


advantage = functools.partial(policy_gradient, normalise=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def faulty_look_up(table, tokens, add):
    return table[tokens]


def _look_up_backward(add, residuals, g):
    shape, tokens = residuals
    zeros = jnp.zeros(shape, g.dtype)
    return (zeros.at[tokens].add(g) if add else zeros.at[tokens].set(g)), None


faulty_look_up.defvjp(lambda table, tokens, add: (table[tokens], (table.shape, tokens)), _look_up_backward)


def looked_up(params, batch, add):
    return losses(params, batch, look_up=lambda table, tokens: faulty_look_up(table, tokens, add)).mean()


CAUSES = {
    "sum": (sum_loss, mean_loss, "is a sum over the batch", "Return the mean"),
    "constant": (sum_and_penalty, mean_loss, "divided by a constant", "Return the mean"),
    "twice": (twice_divided, mean_loss, "divided by the batch size twice", "optaccum.chunked"),
    "weights": (masked, weighted, "unequal weights", "optaccum.WeightedMean(total, weight)"),
    "BatchNorm": (
        functools.partial(normalised, axis=(0, 1)),
        functools.partial(normalised, axis=-1),
        "batch statistics",
        "carry_argnum",
    ),
    "load balancing": (load_balanced, router_penalty, "product of batch means", "optaccum.chunked"),
    "contrastive": (contrastive, paired, "see each other", "optaccum.chunked"),
    "rows": (preferred, paired, "rows that belong together", "presplit=True"),
    "hidden by stop_gradient": (advantage, policy_gradient, "advantages normalised", "before splitting"),
    "compiler": (
        functools.partial(looked_up, add=False),
        functools.partial(looked_up, add=True),
        "the compiler is at fault",
        "jax.disable_jit()",
    ),
}


IN_WHOLE_REPORTS = ["sum", "weights", "rows", "hidden by stop_gradient", "compiler"]


def diagnosed(loss_fn, params, batch, n):
    """The cause from the loss alone, without gradients."""
    value_of = jax.jit(lambda call: Results(loss_fn(*call.diff, *call.batch), (), (), ()))
    call = Call((params,), (batch,), (), (), (), [])
    return diagnose(
        Reference({}, value_of, value_of, num_devices=1), call, n, resolution=1e-6, value_agrees=False
    )


@pytest.mark.parametrize("name", CAUSES)
def test_the_report_names_the_cause_and_the_way_out_and_the_loss_put_right_passes(name, params, batch):
    loss_fn, put_right, cause, way_out = CAUSES[name]
    if name in IN_WHOLE_REPORTS:
        report = optaccum.verify(loss_fn, params, batch, num_microbatches=4)
        assert not report.ok
        assert f"Likely cause: {report.cause}" in str(report)
        if name == "sum":
            assert report.value_ratio == pytest.approx(1 / 4)
        found = report.cause
    else:
        found = diagnosed(loss_fn, params, batch, 4)
    assert cause in found
    assert way_out in found

    if put_right is not mean_loss or name == "sum":  # once will do
        report = optaccum.verify(put_right, params, batch, num_microbatches=4)
        assert report.ok, str(report)
        assert not report.cause


def test_the_cause_does_not_hang_on_an_even_split(params, batch):
    for name, n in [("sum", 5), ("weights", 12)]:
        loss_fn, _, cause, _ = CAUSES[name]
        assert cause in diagnosed(loss_fn, params, batch, n)


@pytest.mark.parametrize("padded", [slice(B - 1, B), slice(0, 1), slice(1, B, 4)])
def test_padding_in_few_rows_is_found_wherever_it_is(padded, params, batch):
    mask = np.ones((B, T), np.float32)
    mask[padded, 1:] = 0
    assert "unequal weights" in diagnosed(masked, params, {**batch, "mask": jnp.asarray(mask)}, 4)


def test_where_nothing_departs_from_a_mean_it_does_not_split(params, batch):
    batch = {**batch, "mask": jnp.ones((B, T)).at[:, 3:].set(0)}
    for loss_fn in (mean_loss, masked):
        assert "does not split" in diagnosed(loss_fn, params, batch, 4)


def test_only_the_leaves_behind_a_faulty_gradient_are_off(params, batch):
    report = optaccum.verify(functools.partial(looked_up, add=False), params, batch, num_microbatches=4)
    assert [path for path, error in report.leaves.items() if error > report.rtol] == ["['embed']"]
    assert report.value_error <= report.rtol


def dropout(params, batch, keys):
    """One key for the micro-batch, or one for each of its rows."""
    h = hidden(params, batch)
    if keys.ndim:
        kept = jax.vmap(lambda key, row: jax.random.bernoulli(key, 0.8, row.shape))(keys, h)
    else:
        kept = jax.random.bernoulli(keys, 0.8, h.shape)
    return losses_of(params, jnp.where(kept, h / 0.8, 0), batch).mean()


def test_a_key_that_matters(params, batch):
    key = jax.random.key(1)
    report = optaccum.verify(dropout, params, batch, key, num_microbatches=4, key_argnum=2)
    assert "a key that matters" in report.cause

    ignored = optaccum.verify(
        lambda p, b, key: mean_loss(p, b), params, batch, key, num_microbatches=4, key_argnum=2
    )
    assert ignored.ok
    each = optaccum.verify(
        dropout, params, batch, jax.random.split(key, B), num_microbatches=4, batch_argnums=(1, 2)
    )
    assert each.ok  # the way out that the report names


def with_running_mean(params, batch, mean, read):
    h = hidden(params, batch)
    loss = losses_of(params, h - mean if read else h, batch).mean()
    return loss, (0.5 * mean + 0.5 * h.mean((0, 1)), {})


def test_a_carry_that_matters(params, batch):
    options = {"num_microbatches": 4, "has_aux": True, "carry_argnum": 2}
    for read in (True, False):
        loss_fn = functools.partial(with_running_mean, read=read)
        report = optaccum.verify(loss_fn, params, batch, jnp.zeros(D), **options)
        assert report.ok != read
        assert ("a carry that matters" in report.cause) == read

    def summed(params, batch, mean):  # a carry that is read, but never moves, is no reason
        return losses_of(params, hidden(params, batch) - mean, batch).sum(), (mean, {})

    assert "is a sum" in optaccum.verify(summed, params, batch, jnp.ones(D), **options).cause


def test_a_weightless_micro_batch_is_not_finite(params, batch):
    batch = {**batch, "mask": jnp.ones((B, T)).at[::4].set(0)}
    report = optaccum.verify(masked, params, batch, num_microbatches=4)
    assert not report.ok
    assert "not finite: a micro-batch's" in report.cause
    assert "optaccum.WeightedMean" in report.cause
    assert optaccum.verify(weighted, params, batch, num_microbatches=4).ok


def test_a_loss_that_takes_no_other_size_still_gets_its_report(params, batch):
    def loss_fn(params, batch):
        if len(batch["tokens"]) not in (B, B // 2, B // 4):
            raise ValueError("only whole batches and micro-batches")
        return sum_loss(params, batch)

    report = optaccum.verify(loss_fn, params, batch, num_microbatches=2)
    assert report.value_ratio == pytest.approx(1 / 2)
    assert "ValueError: only whole batches" in report.cause
