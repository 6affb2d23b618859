"""Long runs: counters, weights and memory after 10^5 micro-steps are what integers and formulas say."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_equal

import optaccum

NUM_STEPS = 100_000
TOP = 2**31 - 1


def tokens_of(i):
    """Odd counts, whose sum passes 2^24 early on."""
    return 4097 + 2 * (i % 50)


def skips(i):
    return i % 97 == 5


def train(tx, num_steps, keep=lambda state: ()):
    """A function of (params, state): the micro-steps in one scan, how many emitted, what to keep of each."""

    def step(carry, _):
        params, state, i, num_emits = carry
        grads = jax.tree.map(lambda p: jnp.where(skips(i), jnp.nan, jnp.ones_like(p)), params)
        params, state = optaccum.apply_gradients(tx, grads, state, params, weight=tokens_of(i))
        return (params, state, i + 1, num_emits + state.has_updated), keep(state)

    def run(params, state):
        (params, state, _, num_emits), kept = jax.lax.scan(
            step, (params, state, jnp.int32(0), jnp.int32(0)), length=num_steps
        )
        return params, state, num_emits, kept

    return jax.jit(run, donate_argnums=(0, 1))


def test_counters_and_weights_stay_exact_in_one_scan():
    tx = optaccum.accumulate(optax.sgd(1.0), lambda step: 1 + step % 3, should_skip_update_fn=optax.skip_not_finite)
    params = jnp.zeros(3)
    params, state, num_emits, _ = train(tx, NUM_STEPS)(params, tx.init(params))

    ks, kept = itertools.cycle((1, 2, 3)), [i for i in range(NUM_STEPS) if not skips(i)]
    num_windows, used = 0, 0
    for k in ks:
        if used + k > len(kept):
            break
        num_windows, used = num_windows + 1, used + k
    total = sum(tokens_of(i) for i in kept[:used])
    assert total > 2**28
    assert (int(state.gradient_step), int(num_emits)) == (num_windows, num_windows)
    assert int(state.micro_step) == len(kept) - used
    assert int(state.num_skipped) == NUM_STEPS - len(kept)
    assert optaccum.weight_total(state) == total
    assert_trees_equal(params, jnp.full(3, -float(num_windows)))
    lost = np.cumsum([tokens_of(i) for i in kept[:used]], dtype=np.float32)[-1]
    assert lost != total  # what one float32 would hold


def test_memory_does_not_grow_with_the_number_of_micro_steps():
    tx = optaccum.accumulate(optax.adam(1e-3), 8)
    params = jax.ShapeDtypeStruct((1000,), jnp.float32)
    state = jax.eval_shape(tx.init, params)

    def bytes_of(*args):
        memory = train(tx, *args).lower(params, state).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

    assert abs(bytes_of(NUM_STEPS) - bytes_of(100)) <= 64
    assert bytes_of(NUM_STEPS, lambda state: state.has_updated) >= NUM_STEPS


def test_counters_saturate_while_training_goes_on():
    tx = optaccum.accumulate(optax.sgd(1.0), 1, should_skip_update_fn=optax.skip_not_finite)
    start = TOP - 2
    params = jnp.zeros(3)
    state = tx.init(params)._replace(gradient_step=jnp.int32(start), num_skipped=jnp.int32(start))
    params, state, num_emits, _ = train(tx, 205)(params, state)
    assert int(num_emits) == 202  # of 205, the 6th, 103rd and 200th are not finite
    assert (int(state.gradient_step), int(state.num_skipped)) == (TOP, TOP)
    assert_trees_equal(params, jnp.full(3, -202.0))
    assert int(jnp.int32(start) + jnp.int32(202)) < 0  # what plain addition makes of it

    tx = optaccum.accumulate(optax.sgd(1.0), lambda step: jnp.int32(TOP))
    state = tx.init(params)._replace(micro_step=jnp.int32(start))
    states = []
    for _ in range(3):
        _, state = tx.update(jnp.ones(3), state, params)
        states.append((int(state.micro_step), bool(state.has_updated)))
    assert states == [(TOP - 1, False), (0, True), (1, False)]


@pytest.mark.parametrize("tokens", [1, 2**20 + 1, 2**24 - 1])
def test_tokens_past_2_24_are_not_lost(tokens):
    tx = optaccum.accumulate(optax.identity(), 1)
    start = jnp.array([2.0**40, 0.0], jnp.float32)

    def step(state, _):
        return tx.update(jnp.ones(2), state, weight=tokens)[1], ()

    state = tx.init(jnp.zeros(2))._replace(weight_total=start)
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=1001))(state)
    assert optaccum.weight_total(state) == 2**40 + 1001 * tokens
    assert float(state.weight_total[0]) != 2**40 + 1001 * tokens  # the high word alone


def test_a_window_past_2_24_tokens_loses_none():
    tokens, k = 5_000_001, 8
    tx = optaccum.accumulate(optax.identity(), k)
    state = tx.init(jnp.zeros(2))
    for i in range(2 * k):
        updates, state = tx.update(jnp.full(2, float(i)), state, weight=tokens)
    np.testing.assert_allclose(updates, 11.5, rtol=1e-6)
    assert optaccum.weight_total(state) == 2 * k * tokens
    assert float(state.weight_sum) != k * tokens  # one float32 word


@pytest.mark.parametrize("int_type", [int, np.int64, np.uint32])
def test_a_weight_past_int32_does_not_wrap(int_type):
    tx = optaccum.accumulate(optax.identity(), 2)
    _, state = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)), weight=int_type(3_000_000_000))
    updates, state = tx.update(jnp.full(2, 5.0), state, weight=int_type(1_000_000_000))
    assert updates.tolist() == [2, 2]
    assert optaccum.weight_total(state) == 4e9
    assert jnp.asarray(np.int64(3_000_000_000)) < 0  # what JAX makes of it first


def test_as_many_micro_batches_as_micro_steps():
    rows = (np.arange(2 * NUM_STEPS) % 17 - 8).astype(np.float32)

    def loss_fn(w, x):
        return optaccum.WeightedMean(jnp.sum(w * x), 65 * x.size)

    def compiled(n):
        grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=n, return_info=True)
        return jax.jit(grad_fn).lower(1.0, rows).compile()

    for n in (NUM_STEPS, NUM_STEPS // 100):
        program = compiled(n)
        value, grads, info = program(1.0, rows)
        total, weight = float(rows.astype(np.float64).sum()), 65 * rows.size
        np.testing.assert_allclose([value, grads], total / weight, rtol=1e-6)
        assert info.weight == weight
        micro_batch = rows.nbytes / n
        assert program.memory_analysis().temp_size_in_bytes <= 4 * micro_batch + 1024
    means = rows[::NUM_STEPS] / 65  # of the first micro-batch alone
    assert abs(means.mean() / (total / weight) - 1) > 0.1
