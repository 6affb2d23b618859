"""Streaming and scanning in JAX's modes and ways to compile: the same numbers in each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal
from jax.experimental.compilation_cache import compilation_cache
from small_problem import BATCH, CALLS, PARAMS, K, N, loss_fn, optimizer, weighted_loss_fn

import optaccum

STEP_TX = optaccum.accumulate(optimizer(0.1), K, should_skip_update_fn=optax.skip_not_finite)


def train_step(params, state, batch, *, loss=weighted_loss_fn, tx=STEP_TX, in_place=True):
    """Both ways at once, as a user writes it."""
    grad_fn = optaccum.value_and_grad(loss, num_microbatches=N, return_info=True, in_place=in_place)
    value, grads, info = grad_fn(params, batch)
    return value, *optaccum.apply_gradients(tx, grads, state, params, weight=info.weight)


def train(step=train_step, params=PARAMS, tx=STEP_TX, num_calls=4, calls=CALLS):
    state, values = tx.init(params), []
    for i in range(num_calls):
        value, params, state = step(params, state, jax.tree.map(lambda x, i=i: x[i], calls))
        values.append(value)
    return jnp.stack(values), params, state


EXPECTED = functools.cache(lambda: train(jax.jit(train_step)))


def test_disable_jit_gives_the_same_numbers():
    with jax.disable_jit():
        actual = train(functools.partial(train_step, in_place=False), num_calls=K)
    expected = train(jax.jit(train_step), num_calls=K)
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_trees_close(EXPECTED()[1:], expected[1:], rtol=1e-4, atol=1e-5)


def test_x64_keeps_float64_exact_and_float32_narrow():
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (PARAMS, CALLS))
        tx = optaccum.accumulate(optax.sgd(0.1), K)
        step = jax.jit(functools.partial(train_step, tx=tx))
        _, params, state = train(step, wide[0], tx, K, wide[1])
        both = jax.tree.map(lambda x: jnp.concatenate(x[:K]), wide[1])

        def mean(params):
            loss = weighted_loss_fn(params, both)
            return loss.total / loss.weight

        expected = jax.tree.map(lambda p, g: p - 0.1 * g, wide[0], jax.grad(mean)(wide[0]))
        # The weight is kept in float32; it is an integer here, and so exact.
        assert_trees_close(params, expected, rtol=1e-13)
        assert state.weight_sum.dtype == jnp.float32
        *narrow, state = train(jax.jit(train_step))  # its dtypes are compared too: nothing was widened
        *expected_narrow, expected_state = EXPECTED()
        assert_trees_close(narrow, expected_narrow, rtol=1e-4, atol=1e-5)
        # What optax.skip_not_finite counts in is its own affair.
        states = (s._replace(skip_state=()) for s in (state, expected_state))
        assert_trees_close(*states, rtol=1e-4, atol=1e-5)
        assert {x.dtype for x in jax.tree.leaves(state.grad_sum)} == {jnp.dtype(jnp.float32)}
        rounded = jax.tree.map(lambda p: p.astype(jnp.float32).astype(jnp.float64), params)
        with pytest.raises(AssertionError):
            assert_trees_close(rounded, expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"in_place": True},
        {"in_place": False},
        {"skip_nonfinite": True},
        {"track_noise_scale": True, "return_info": True},
    ],
    ids=["in place", "carry", "skip", "noise"],
)
def test_strict_promotion_finds_no_implicit_cast_in_the_scan(dtype, options):
    params, batch = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, BATCH))
    with jax.numpy_dtype_promotion("strict"):
        with pytest.raises(jax.dtypes.TypePromotionError):
            jnp.ones(2, jnp.bfloat16) + jnp.float32(1)
        grad_fn = optaccum.grad(loss_fn, num_microbatches=4, **options)  # 4 does not divide 6: two scans
        grads = jax.jit(grad_fn)(params, batch)
    grads = grads[0] if "return_info" in options else grads
    assert jax.tree.leaves(grads)[0].dtype == jnp.float32


def test_strict_promotion_finds_no_implicit_cast_in_a_window():
    params = {"h": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2, jnp.complex64), "n": jnp.int32(1)}
    grads = params | {"n": np.zeros([], jax.dtypes.float0)}
    with jax.numpy_dtype_promotion("strict"):
        with pytest.raises(jax.dtypes.TypePromotionError):
            params["h"] + jnp.float32(1)
        for dtype in (jnp.float32, None):
            tx = optaccum.accumulate(
                optax.identity(), 2, accumulator_dtype=dtype, averaged_extra_args=("value",),
                track_noise_scale=True, should_skip_update_fn=optax.skip_not_finite,
            )  # fmt: skip
            state = tx.init(params)
            for _ in range(2):
                updates, state = jax.jit(lambda s, tx=tx: tx.update(grads, s, params, weight=3, value=1))(state)
    assert_trees_equal(updates["c"], params["c"])


def mean_of_none(params, batch):
    return 0.0 * loss_fn(params, batch) / (batch["y"] > 9).sum()


@pytest.mark.parametrize("disable_jit", [False, True])
def test_a_short_micro_batch_weighs_what_it_holds(disable_jit):
    with jax.disable_jit(disable_jit):
        grads = optaccum.grad(loss_fn, num_microbatches=4, in_place=False)(PARAMS, BATCH)  # of 2, 2, 1 and 1
    assert_trees_close(grads, jax.grad(loss_fn)(PARAMS, BATCH), rtol=1e-5)
    parts = [jax.grad(loss_fn)(PARAMS, jax.tree.map(lambda x, i=i: x[i::4], BATCH)) for i in range(4)]
    with pytest.raises(AssertionError):
        assert_trees_close(grads, jax.tree.map(lambda *g: sum(g) / 4, *parts), rtol=1e-5)


def test_debug_nans_is_silent_unless_there_is_one():
    calls = CALLS | {"y": CALLS["y"].at[0].set(-1.0).at[1].set(-1.0).at[2, 1].set(-1.0)}  # nothing counts there
    with jax.debug_nans(True):
        values, params, state = train(jax.jit(train_step), calls=calls)
        assert values[0] == 0
        assert int(state.gradient_step) == 1
        with pytest.raises(FloatingPointError):
            jax.block_until_ready(optaccum.grad(mean_of_none, num_microbatches=N)(PARAMS, BATCH))
    assert all(map(jnp.isfinite, jax.tree.leaves(params["b"])))


def test_no_tracer_leaks():
    leaked, state = [], STEP_TX.init(PARAMS)
    with jax.checking_leaks():
        jax.block_until_ready(jax.jit(train_step)(PARAMS, state, BATCH))
        jax.block_until_ready(jax.jit(jax.grad(lambda params: train_step(params, state, BATCH)[0]))(PARAMS))
        with pytest.raises(Exception, match=r"[Ll]eaked"):
            jax.jit(lambda x: leaked.append(x) or x)(1.0)


# Ways to compile.


def test_the_persistent_compilation_cache_gives_the_program_back(tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    names += ("jax_persistent_cache_min_entry_size_bytes",)
    before = {name: getattr(jax.config, name) for name in names}

    def cached():
        return {path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")}

    def run(k):
        tx = optaccum.accumulate(optimizer(0.1), k)

        def cached_step(params, state, batch):
            return train_step(params, state, batch, tx=tx)

        return jax.jit(cached_step)(PARAMS, state_of[k], BATCH)

    state_of = {k: optaccum.accumulate(optimizer(0.1), k).init(PARAMS) for k in (2, 3)}
    try:
        compilation_cache.reset_cache()
        for name, value in zip(names, (str(tmp_path), 0.0, -1), strict=True):
            jax.config.update(name, value)
        first = run(2)
        programs = cached()
        assert programs
        assert_trees_equal(run(2), first)  # another jit of the same program
        assert cached() == programs
        run(3)
        assert len(cached()) > len(programs)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_compiled_ahead_of_time():
    args = (PARAMS, STEP_TX.init(PARAMS), BATCH)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    compiled = jax.jit(train_step).lower(*structs).compile()
    assert_trees_equal(train(compiled), EXPECTED())
    with pytest.raises(TypeError):
        compiled(*args[:2], jax.tree.map(lambda x: x[:3], BATCH))


def test_exported_and_read_back():
    state = STEP_TX.init(PARAMS)
    _, structure = jax.tree.flatten((PARAMS, state, BATCH))

    def flat_step(*leaves):  # of arrays alone: an export does not know NamedTuples that nobody registered
        return jax.tree.leaves(train_step(*structure.unflatten(leaves)))

    leaves = jax.tree.leaves((PARAMS, state, BATCH))
    data = jax.export.export(jax.jit(flat_step))(*leaves).serialize()
    call = jax.export.deserialize(data).call
    like = jax.tree.structure(jax.eval_shape(train_step, PARAMS, state, BATCH))
    actual = train(lambda *args: like.unflatten(call(*jax.tree.leaves(args))))
    assert_trees_close(actual, EXPECTED(), rtol=1e-4, atol=1e-5)
    other = train(lambda *args: like.unflatten(call(*jax.tree.leaves(args))), num_calls=3)
    with pytest.raises(AssertionError):
        assert_trees_close(other[1:], EXPECTED()[1:], rtol=1e-4, atol=1e-5)
