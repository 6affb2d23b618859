"""The losses that docs/losses.md shows, beside the whole batch in float64; and the mistakes that it warns of."""

import functools
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close
from test_docs import BLOCK, ROOT

import optaccum
from optaccum import WeightedMean

PAGE = ROOT / "docs" / "losses.md"


@pytest.fixture(scope="module")
def page():
    namespace: dict[str, Any] = {"__name__": "losses"}
    for block in BLOCK.finditer(PAGE.read_text()):
        exec(compile(block["code"], str(PAGE), "exec"), namespace)
    return namespace


class Row(NamedTuple):
    """One row of the table: its arguments, the whole batch's loss, and what people write instead."""

    args: Callable[[dict], tuple]  # of the page: what follows the parameters
    whole: Callable[..., jax.Array]  # (page, params, *args) -> the loss, with each row cut to its length
    mistakes: list[Callable[..., Any]]  # (page, params, *args) -> a loss of a micro-batch


def cut(rows, mask):
    """The rows that are not empty, each as long as it is."""
    return [row[:n] for row, n in zip(rows, np.asarray(mask).sum(-1).astype(int), strict=True) if n]


def kept(losses, mask):
    """Those that count, one after the other."""
    return losses[np.asarray(mask) > 0]


def divided(name):
    """The loss, divided before the window is complete."""

    def mistake(page, params, *args):
        loss = page[name](params, *args)
        terms = loss.values() if isinstance(loss, dict) else [loss]
        return sum(term.total / jnp.where(term.weight > 0, term.weight, 1) for term in terms)

    return mistake


def one_count(name):
    """Every term over the first one's count."""

    def mistake(page, params, *args):
        terms = list(page[name](params, *args).values())
        return WeightedMean(sum(term.total for term in terms), terms[0].weight)

    return mistake


def likelihood(page, params, batch):
    return kept(-page["token_log_probs"](params, batch["tokens"]), batch["mask"]).mean()


def sequence_means(page, params, batch):
    rows = cut(-page["token_log_probs"](params, batch["tokens"]), batch["mask"])
    return sum(row.mean() for row in rows) / len(rows)


def preference(page, params, pairs):
    ratios = {}
    for side, answers in pairs.items():
        rows = cut(page["token_log_probs"](params, answers["tokens"]), answers["mask"])
        ratios[side] = jnp.stack([row.sum() for row in rows]) - answers["reference"]
    return jnp.log1p(jnp.exp(-0.1 * (ratios["chosen"] - ratios["rejected"]))).mean()


def surrogate(page, params, batch, low=0.2, high=0.2):
    ratio = jnp.exp(page["token_log_probs"](params, batch["tokens"]) - batch["old_log_probs"])
    up, down = jnp.minimum(ratio, 1 + high), jnp.maximum(ratio, 1 - low)
    return -jnp.where(batch["advantages"] >= 0, up, down) * batch["advantages"]


def ppo(page, params, batch):
    log_p = page["log_probs"](params, batch["tokens"])
    policy = surrogate(page, params, batch) + 0.01 * jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    values = kept(page["value_losses"](params, batch), batch["value_mask"])
    return kept(policy, batch["mask"]).mean() + 0.1 * values.mean()


def whitened_inside(page, params, batch):
    return page["ppo"](params, batch | {"advantages": page["whiten"](5 * batch["advantages"], batch["mask"])})


def by_token(page, params, batch):
    return kept(surrogate(page, params, batch), batch["mask"]).mean()


def by_sequence(page, params, batch):
    rows = cut(surrogate(page, params, batch), batch["mask"])
    return sum(row.mean() for row in rows) / len(rows)


def by_group(page, params, batch):
    losses, mask = surrogate(page, params, batch), batch["mask"]
    groups = [kept(losses[i : i + 4], mask[i : i + 4]) for i in (0, 4, 8)]
    return sum(group.mean() for group in groups) / 3


def groups_of_the_micro_batch(page, params, batch):
    group = batch["group"]
    own = jax.ops.segment_sum(batch["mask"].sum(-1), group, 3)[group]
    return page["grpo_by_group"](params, batch | {"tokens_of_group": jnp.maximum(own, 1)})


def by_constant(page, params, batch):
    return kept(surrogate(page, params, batch), batch["mask"]).sum() / (12 * 8)


def summed_over_rows(page, params, batch):
    loss = page["grpo_by_constant"](params, batch)
    return loss.total / batch["mask"].shape[1]


def dapo(page, params, batch):
    whole = np.asarray(batch["truncated"]) == 0
    losses = surrogate(page, params, batch, 0.2, 0.28)
    return kept(losses[whole], batch["mask"][whole]).mean()


def truncated_counted(page, params, batch):
    return WeightedMean(page["dapo"](params, batch).total, batch["mask"].sum())


def router_z_loss(page, params, batch):
    z = jnp.log(jnp.exp(page["routing"](params, batch)).sum(-1)) ** 2
    return likelihood(page, params, batch) + 0.1 * kept(z, batch["routed"]).mean()


def load_balancing(page, params, batch, shares):
    del shares
    logits = kept(page["routing"](params, batch), batch["routed"])
    f = jax.nn.one_hot(logits.argmax(-1), 4).mean(0)
    return likelihood(page, params, batch) + 0.1 * 4 * (f * jax.nn.softmax(logits).mean(0)).sum()


def own_shares(page, params, batch, shares):
    count = page["tokens_of_experts"](params, batch).sum(0)
    return page["load_balancing"](params, batch, count / count.sum())


def contrastive(page, params, pairs):
    a, b = (page["hidden"](params, pairs[side]["tokens"]).mean(1) for side in ("chosen", "rejected"))
    return -jnp.diag(jax.nn.log_softmax(5 * a @ b.T)).mean()


def distillation(page, params, batch, teacher):
    p = jax.nn.softmax(page["log_probs"](teacher, batch["tokens"]) / 2)
    q = jax.nn.softmax(page["log_probs"](params, batch["tokens"]) / 2)
    kl = kept((p * jnp.log(p / q)).sum(-1), batch["routed"])
    return 0.5 * 4 * kl.mean() + 0.5 * likelihood(page, params, batch)


def batch_of(name):
    return lambda page: (page[name],)


ROWS = {
    "fine_tuning": Row(batch_of("batch"), likelihood, [divided("fine_tuning")]),
    "sequence_means": Row(batch_of("batch"), sequence_means, [divided("sequence_means")]),
    "preference": Row(batch_of("answers"), preference, []),
    "preference_and_likelihood": Row(
        batch_of("answers"),
        lambda page, params, pairs: preference(page, params, pairs) + 0.2 * likelihood(page, params, pairs["chosen"]),
        [one_count("preference_and_likelihood")],
    ),
    "ppo": Row(batch_of("rollouts"), ppo, [one_count("ppo"), whitened_inside]),
    "grpo_by_sequence": Row(batch_of("answers_in_groups"), by_sequence, [divided("grpo_by_sequence")]),
    "grpo_by_token": Row(batch_of("answers_in_groups"), by_token, [divided("grpo_by_token")]),
    "grpo_by_group": Row(batch_of("answers_in_groups"), by_group, [groups_of_the_micro_batch]),
    "grpo_by_constant": Row(batch_of("answers_in_groups"), by_constant, [summed_over_rows]),
    "dapo": Row(batch_of("answers_in_groups"), dapo, [truncated_counted]),
    "router_z_loss": Row(batch_of("batch"), router_z_loss, [one_count("router_z_loss")]),
    "load_balancing": Row(
        lambda page: (page["batch"], page["count"] / page["count"].sum()), load_balancing, [own_shares]
    ),
    "contrastive": Row(batch_of("answers"), contrastive, [contrastive]),
    "distillation": Row(lambda page: (page["batch"], page["teacher"]), distillation, [divided("distillation")]),
}


def distance(grads, expected):
    """The largest relative error of a leaf."""
    grads, expected = jax.tree.map(np.asarray, (grads, expected))
    norms = {name: np.linalg.norm(leaf) for name, leaf in expected.items()}
    return max(np.linalg.norm(grads[name] - expected[name]) / norm for name, norm in norms.items() if norm)


def in_float64(page, loss_fn, *args):
    """Value and gradient of a whole batch's loss, as float32."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) if leaf.dtype == np.float32 else leaf, args)
    wide = jax.tree.map(np.asarray, wide)
    with jax.enable_x64(True):
        results = jax.jit(jax.value_and_grad(lambda params: loss_fn(page, params, *wide[1:])))(wide[0])
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), results)


@pytest.mark.parametrize("name", ROWS)
def test_a_loss_by_name(page, name):
    row, params = ROWS[name], page["params"]
    args = row.args(page)
    expected = in_float64(page, row.whole, params, *args)
    if name == "contrastive":
        actual = jax.value_and_grad(page[name])(params, *args)
    else:  # 5 of 12 rows: a scalar also needs the number of each one's rows
        n = 5 if row.whole in (preference, by_constant) else 4
        actual = accumulated(page[name], num_microbatches=n)(params, *args)
    assert_trees_close(actual, expected, rtol=1e-5, atol=2e-6)
    for mistake in row.mistakes:
        _, wrong = accumulated(functools.partial(mistake, page), in_place=False)(params, *args)
        assert distance(wrong, expected[1]) > 0.03


def accumulated(loss_fn, num_microbatches=4, **options):
    return optaccum.value_and_grad(loss_fn, num_microbatches=num_microbatches, **options)


def test_the_table_has_these_rows():
    assert re.findall(r"^\| \[`(\w+)`\]", PAGE.read_text(), re.MULTILINE) == list(ROWS)


def test_a_pair_is_a_row(page):
    """Chosen and rejected in alternate rows: a micro-batch of every fourth row holds no pairs."""
    params, pairs = page["params"], page["answers"]
    alternate = jax.tree.map(lambda *sides: jnp.stack(sides, 1).reshape(24, *sides[0].shape[1:]), *pairs.values())

    def preference(params, rows):
        ratio = page["log_ratio"](params, rows).reshape(-1, 2)
        return -jax.nn.log_sigmoid(0.1 * (ratio[:, 0] - ratio[:, 1])).mean()

    expected = jax.jit(jax.grad(page["preference"]))(params, pairs)
    assert distance(jax.jit(jax.grad(preference))(params, alternate), expected) < 1e-5
    assert distance(optaccum.grad(preference, num_microbatches=4)(params, alternate), expected) > 0.03


def difference(a, b):
    return {name: np.asarray(a[name]) - np.asarray(b[name]) for name in a}


def test_rollouts_for_several_windows(page):
    params, rollouts = page["params"], page["answers_in_groups"]

    def updated(params, gradient_of):
        for i in range(2):
            grads = gradient_of(params, jax.tree.map(operator.itemgetter(slice(i, None, 2)), rollouts))
            params = jax.tree.map(lambda p, g: p - np.float32(0.1) * g, params, grads)
        return params

    expected = updated(params, lambda params, window: in_float64(page, by_token, params, window)[1])
    moved = difference(expected, params)
    for train in (page["train"], page["stream"]):
        trained = train(page["grpo_by_token"], params, rollouts, 2)
        assert distance(difference(trained, params), moved) < 1e-5

    def all_rollouts(params, window):  # the count of both windows for the sum of one
        return optaccum.WeightedMean(page["grpo_by_token"](params, window).total, window["mask"].shape[0] * tokens / 12)

    tokens = rollouts["mask"].sum()
    halved = page["train"](all_rollouts, params, rollouts, 2)
    assert distance(difference(halved, params), moved) > 0.03
