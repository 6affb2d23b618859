"""optaccum.linen.TrainState: Flax's, for micro-steps, and in place."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal
from flax import linen, serialization
from flax.linen import fp8_ops
from flax.training import train_state

import optaccum
from optaccum.linen import TrainState

X = jax.random.normal(jax.random.key(0), (16, 3))
N = 4
MODULE = linen.Dense(2)


def loss_fn(params, x):
    return jnp.mean((MODULE.apply({"params": params}, x) - 1) ** 2)


def make(tx, state_class=TrainState):
    params = MODULE.init(jax.random.key(1), X)["params"]
    return state_class.create(apply_fn=MODULE.apply, params=params, tx=tx)


def trained(state, batches, weights=None, loss_fn=loss_fn):
    @jax.jit
    def step(state, x, kwargs):
        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params, x), **kwargs)

    for i, x in enumerate(batches):
        state = step(state, x, {} if weights is None else {"weight": weights[i]})
    return state


def test_a_window_is_the_whole_batch():
    ragged = [X[:1], X[1:6], X[6:13], X[13:]]
    tx = optaccum.accumulate(optax.adam(1e-2), N)
    state = trained(make(tx), ragged, weights=[len(x) for x in ragged])
    whole = trained(make(optax.adam(1e-2), train_state.TrainState), [X])
    assert_trees_close(state.params, whole.params, rtol=1e-5)
    with pytest.raises(AssertionError):  # the mean of means
        assert_trees_close(trained(make(tx), ragged).params, whole.params, rtol=1e-5)


@pytest.mark.parametrize("accumulates", [True, False])
def test_gives_what_flaxs_own_gives_in_the_same_fields(accumulates):
    tx = optaccum.accumulate(optax.adam(1e-2), 3) if accumulates else optax.adam(1e-2)
    batches = [X[i::N] for i in range(N)]
    state = trained(make(tx), batches)
    flax_state = trained(make(tx, train_state.TrainState), batches)
    as_dict = serialization.to_state_dict
    assert_trees_close(as_dict(state), as_dict(flax_state))
    assert_trees_equal(as_dict(serialization.from_state_dict(make(tx), as_dict(flax_state))), as_dict(flax_state))
    with pytest.raises(AssertionError):
        assert_trees_close(as_dict(state), as_dict(trained(state, batches[:1])))


COUNTS = {  # calls -> updates, after six of them
    "accumulate": (lambda: optaccum.accumulate(optax.sgd(0.1), 2), 3),
    "no accumulate": (lambda: optax.sgd(0.1), 6),
    "window of windows": (lambda: optaccum.accumulate(optaccum.accumulate(optax.sgd(0.1), 2), 2), 1),
    "several": (
        lambda: optax.partition(
            {k: optaccum.accumulate(optax.sgd(0.1), n) for k, n in [("kernel", 2), ("bias", 3)]},
            {"kernel": "kernel", "bias": "bias"},
        ),
        2,
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_step_counts_calls_and_gradient_step_updates(name):
    make_tx, updates = COUNTS[name]
    state = make(make_tx())
    assert state.gradient_step.dtype == jnp.int32
    assert (int(state.step), int(state.gradient_step)) == (0, 0)
    state = trained(state, [X[:4]] * 6)
    assert (int(state.step), int(state.gradient_step)) == (6, updates)
    assert jax.jit(lambda state: state.gradient_step)(state).dtype == jnp.int32


def test_emit_ends_a_window_of_summed_losses():
    state = make(optaccum.accumulate(optax.sgd(0.1), None))
    grads, start = jax.grad(loss_fn)(state.params, X), state.params
    for emit, updates in ((False, 0), (True, 1)):
        state = state.apply_gradients(grads=grads, denominator=2.0, emit=emit)
        assert int(state.gradient_step) == updates
    assert_trees_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * 2 * g / 4, start, grads))


class WithStatistics(TrainState):
    batch_stats: dict[str, jax.Array]


def test_extra_arguments_go_to_the_optimizer_and_fields_are_replaced():
    seen = []

    def note(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), note)
    state = WithStatistics.create(apply_fn=None, params={"w": X}, tx=tx, batch_stats={"mean": jnp.zeros(3)})
    new = state.apply_gradients(grads={"w": X}, batch_stats={"mean": jnp.ones(3)}, extra_args={"value": 2.0})
    assert seen == [{"value": 2.0}]  # nothing that was not given
    assert isinstance(new, WithStatistics)
    assert new.batch_stats["mean"].tolist() == [1, 1, 1]
    with pytest.raises(TypeError, match="value"):  # not a field
        state.apply_gradients(grads={"w": X}, value=2.0)


@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp is deprecated:DeprecationWarning")
def test_state_that_gradients_carry_is_overwritten_at_every_call():
    module = linen.Dense(2, dot_general_cls=fp8_ops.Fp8DotGeneralOp)
    variables = module.init(jax.random.key(0), X)
    overwritten = fp8_ops.OVERWRITE_WITH_GRADIENT

    def fp8_loss_fn(variables, x):
        return jnp.mean((module.apply(variables, x) - 1) ** 2)

    def run(state_class, tx, calls):
        state = state_class.create(apply_fn=None, params=variables, tx=tx)
        return trained(state, [(i + 1) * X[i::N] for i in range(calls)], loss_fn=fp8_loss_fn)

    tx = optaccum.accumulate(optax.adam(1e-2), 2)
    for calls in (1, 2):
        state, flax_state = run(TrainState, tx, calls), run(train_state.TrainState, tx, calls)
        assert_trees_close(state.params, flax_state.params)
        assert state.params["params"]["kernel"].shape == state.opt_state.grad_sum["kernel"].shape
    with pytest.raises(AssertionError):  # in the middle of a window too
        assert_trees_close(run(TrainState, tx, 1).params[overwritten], variables[overwritten])
    assert_trees_equal(run(TrainState, tx, 1).params["params"], variables["params"])


def copies_of_the_parameters(state_class):
    """Scratch memory of a compiled step, in copies of the parameters."""
    params = [{"w": jnp.zeros((256, 256))} for _ in range(12)]
    state = state_class.create(apply_fn=None, params=params, tx=optaccum.accumulate(optax.adamw(1e-2), 4))

    def loss_fn(params, x):
        return jnp.mean(functools.reduce(lambda x, p: jnp.tanh(x @ p["w"]), params, x) ** 2)

    def step(state, x):
        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params, x))

    compiled = jax.jit(step, donate_argnums=0).lower(state, jnp.zeros((2, 256))).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (12 * 256 * 256 * 4)


def test_works_in_place():
    # The backward pass itself takes a layer's gradient, a twelfth.
    assert copies_of_the_parameters(TrainState) < 0.15
    assert copies_of_the_parameters(train_state.TrainState) > 1
