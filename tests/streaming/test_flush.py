"""Windows ended early: by `flush`, whatever the `accumulate` is inside of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal
from flax import nnx
from optax import contrib
from streaming_problem import GRADS, PARAMS, run

import optaccum

MASK = {"w": True, "b": False}
LABELS = {"w": "one", "b": "two"}
AROUND = {
    "chain": lambda tx: optax.chain(optax.scale(2.0), tx, optax.scale(0.5)),
    "named_chain": lambda tx: optax.named_chain(("window", tx), ("scale", optax.scale(1.0))),
    "masked": lambda tx: optax.chain(
        optax.masked(tx, MASK), optax.masked(optax.set_to_zero(), {"w": False, "b": True})
    ),
    "partition": lambda tx: optax.partition({"one": tx, "two": optaccum.accumulate(optax.sgd(1.0), 3)}, LABELS),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda learning_rate: optaccum.accumulate(optax.sgd(learning_rate), None)
    )(1.0),
    "flatten": optax.flatten,
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: True),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: True),
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask={"w": False, "b": True}),
    "jit": lambda tx: tx._replace(update=jax.jit(tx.update)),
}
"""What passes extra args on."""


def is_state(node):
    return isinstance(node, optaccum.AccumulateState)


@pytest.mark.parametrize("name", AROUND)
def test_emit_and_flush_end_the_window_inside(name):
    tx = AROUND[name](optaccum.accumulate(optax.sgd(1.0), None))
    updates, states = run(tx, GRADS[:3], weight=(1.0, 3.0, 1.0), emit=(False, True, False))
    expected = -(GRADS[0]["w"] + 3 * GRADS[1]["w"]) / 4
    assert_trees_equal(updates[1]["w"], expected)
    assert [bool(optaccum.has_updated(s)) for s in states] == [False, True, False]
    for flush in (functools.partial(optaccum.flush, tx), jax.jit(functools.partial(optaccum.flush, tx))):
        flushed, state = flush(states[2], PARAMS)
        assert_trees_equal(flushed["w"], -GRADS[2]["w"])  # what is in it alone
        assert optaccum.has_updated(state)
        again, same = flush(state, PARAMS)
        assert_trees_equal(again, jax.tree.map(jnp.zeros_like, PARAMS))
        assert not optaccum.has_updated(same)
        restored = jax.tree.map(  # and nothing else has changed
            lambda s: s._replace(has_updated=~s.has_updated) if is_state(s) else s, same, is_leaf=is_state
        )
        assert_trees_equal(restored, state)


def test_all_else_gets_a_call_with_zero_gradients_where_a_window_is_open_and_none_where_it_is_not():
    tx = optax.chain(optax.trace(0.5), optaccum.accumulate(optax.identity(), 3))
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    _, flushed = optaccum.flush(tx, state, PARAMS)
    assert_trees_equal(flushed[0].trace, jax.tree.map(lambda g: g / 2, GRADS[0]))
    _, again = optaccum.flush(tx, flushed, PARAMS)
    assert_trees_equal(again[0].trace, flushed[0].trace)


def test_a_partition_ends_what_is_open():
    """Of two windows one is between two of its own: it stays so."""
    txs = {"one": optaccum.accumulate(optax.sgd(1.0), 2), "two": optaccum.accumulate(optax.sgd(1.0), 3)}
    tx = optax.partition(txs, LABELS)
    _, states = run(tx, GRADS[:2])
    flushed, state = optaccum.flush(tx, states[-1], PARAMS)
    assert (flushed["w"] == 0).all()
    assert_trees_equal(flushed["b"], -(GRADS[0]["b"] + GRADS[1]["b"]) / 2)
    states = [s for s in jax.tree.leaves(state, is_leaf=is_state) if is_state(s)]
    assert [int(s.gradient_step) for s in states] == [1, 1]
    assert optaccum.weight_total(state) == 2.0


LOOKAHEAD = optax.lookahead(optaccum.accumulate(optax.sgd(1.0), 2), 2, 0.5)
SAM = contrib.sam(optaccum.accumulate(optax.sgd(1.0), 2), optax.sgd(0.1))
CHAIN = optax.chain(optaccum.accumulate(optax.sgd(1.0), 2))


@pytest.mark.parametrize(
    ("tx", "params"),
    [
        (LOOKAHEAD, optax.LookaheadParams.init_synced(PARAMS)),
        (SAM, PARAMS),
        (optax.GradientTransformation(CHAIN.init, lambda g, s, p=None: CHAIN.update(g, s, p)), PARAMS),
    ],
    ids=["lookahead", "sam", "one that says nothing"],
)
def test_what_emit_does_not_reach_is_refused(tx, params):
    with pytest.raises(TypeError, match=r"emit=True, and to hand them to the optaccum\.accumulate in it"):
        optaccum.flush(tx, tx.init(params), params)


def test_flush_of_a_state_without_a_window_raises():
    tx = optaccum.accumulate(optax.sgd(0.1), 2)
    with pytest.raises(TypeError, match=r"to be an optaccum\.AccumulateState"):
        optaccum.flush(optax.sgd(0.1), optax.sgd(0.1).init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="emit=True, and to hand them"):
        optaccum.flush(optax.sgd(0.1), tx.init(PARAMS), PARAMS)
    for name in ("weight", "denominator", "emit"):
        with pytest.raises(TypeError, match=f"expected no {name}; got one"):
            optaccum.flush(tx, tx.init(PARAMS), PARAMS, **{name: 1.0})


@pytest.mark.parametrize("around", [lambda tx: tx, AROUND["chain"]])
def test_the_state_of_an_nnx_optimizer(around):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, around(optaccum.accumulate(optax.sgd(1.0), 4)), wrt=nnx.Param)
    kernel = model.kernel[...]
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    assert_trees_equal(model.kernel[...], kernel)
    params = nnx.state(model, nnx.Param)
    updates, opt_state = optaccum.flush(optimizer.tx, optimizer.opt_state, params)
    nnx.update(model, optax.apply_updates(params, updates))
    nnx.update(optimizer.opt_state, nnx.state(opt_state))
    assert optaccum.has_updated(optimizer.opt_state)
    assert_trees_close(model.kernel[...], kernel - 1)


@pytest.mark.parametrize("jit", [True, False])
def test_flush_divides_by_what_is_in_the_window(jit):
    tx = optaccum.accumulate(optax.sgd(1.0, 0.5), 8, averaged_extra_args=("value",))
    flush = functools.partial(optaccum.flush, tx)
    flush = jax.jit(flush) if jit else flush
    state = tx.init(PARAMS)
    for g, weight in zip(GRADS[:2], (1.0, 3.0), strict=True):
        _, state = tx.update(g, state, PARAMS, weight=weight, value=0.0)
    updates, state = flush(state, PARAMS)
    expected = jax.tree.map(lambda a, b: -(a + 3 * b) / 4, *GRADS[:2])
    assert_trees_equal(updates, expected)
    assert state.has_updated
    assert (int(state.micro_step), int(state.gradient_step)) == (0, 1)
    assert optaccum.weight_total(state) == 4.0
    again, same = flush(state, PARAMS)
    assert_trees_equal(again, jax.tree.map(jnp.zeros_like, PARAMS))
    assert not same.has_updated
    assert_trees_equal(same.inner_state, state.inner_state)
    with pytest.raises(AssertionError):  # divided by k, as if the window were full
        assert_trees_equal(updates, jax.tree.map(lambda e: e / 2, expected))


def test_after_a_flush_the_next_window_starts_clean():
    tx = optaccum.accumulate(optax.identity(), 2)
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    _, state = optaccum.flush(tx, state, PARAMS)
    for g in GRADS[1:3]:
        updates, state = tx.update(g, state, PARAMS)
    assert_trees_equal(updates, jax.tree.map(lambda a, b: (a + b) / 2, *GRADS[1:3]))


def test_flush_of_a_window_without_weight_is_a_no_op_that_closes_it():
    inner = optax.adamw(0.1)
    tx = optaccum.accumulate(inner, 4)
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS, weight=0.0)
    updates, state = optaccum.flush(tx, state, PARAMS)
    assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_trees_equal(state.inner_state, inner.init(PARAMS))
    assert (int(state.micro_step), bool(state.has_updated)) == (0, False)


@pytest.mark.parametrize("around", [lambda tx: tx, optax.chain])
def test_flush_hands_over_the_windows_average_and_the_other_extra_args(around):
    def update(updates, state, params=None, *, value, other):
        return updates, jnp.stack([value, other]).astype(jnp.float32)

    inner = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(2), update)
    tx = around(optaccum.accumulate(inner, 8, averaged_extra_args=("value",)))
    state = tx.init(PARAMS)
    for value in (1.0, 5.0):
        _, state = tx.update(GRADS[0], state, PARAMS, value=value, other=0.0)
    _, state = optaccum.flush(tx, state, PARAMS, other=jnp.float32(7.0))
    assert optax.tree.get(state, "inner_state").tolist() == [3.0, 7.0]


def test_flushed_updates_have_the_dtypes_of_gradients_like_the_parameters():
    params = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.int32(3)}
    tx = optaccum.accumulate(optax.adamw(0.1, weight_decay=0.9), 4)
    grads = {"w": jnp.ones(2), "n": np.zeros([], jax.dtypes.float0)}
    _, state = tx.update(grads, tx.init(params), params)
    updates, _ = optaccum.flush(tx, state, params)
    assert updates["w"].dtype == jnp.bfloat16
    assert (updates["w"] != 0).all()
    assert int(updates["n"]) == 0


def test_flush_makes_no_gradient_to_learn_a_structure():
    """Seen in what is alive when the inner optimizer runs: parameters, sums, their mean, and the zero updates."""
    alive = []

    def update(updates, state, params=None):
        if not isinstance(updates["w"], jax.core.Tracer):
            alive.append(sum(x.shape == (101, 103) for x in jax.live_arrays()))
        return updates, state

    params = {"w": jnp.ones((101, 103))}
    tx = optaccum.accumulate(optax.GradientTransformation(lambda params: (), update), 4)
    state = tx.init(params)._replace(micro_step=jnp.int32(1), weight_sum=jnp.float32(1))
    optaccum.flush(tx, state, params)
    spare = jnp.zeros_like(params["w"])
    optaccum.flush(tx, state, params)
    assert alive == [4, 5]
    del spare
