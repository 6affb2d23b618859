"""A state that is not this transformation's is refused by name, with the way out."""

import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from streaming_problem import GRADS, PARAMS

import optaccum

ADAM = optax.adam(0.1)
TX = optaccum.accumulate(ADAM, 2)
CHAIN = optax.chain(optax.clip(1.0), TX)


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (optax.MultiSteps(ADAM, 2).init(PARAMS), "optaccum.from_multi_steps"),
        (CHAIN.init(PARAMS), "holds one"),
        (ADAM.init(PARAMS), r"got tuple.*\(grads, state, params\)"),
        (PARAMS, "got dict"),
    ],
)
def test_another_kind_of_state(state, match):
    calls = (
        lambda: TX.update(GRADS[0], state, PARAMS),
        lambda: optaccum.apply_gradients(TX, GRADS[0], state, PARAMS),
        lambda: optaccum.flush(TX, state, PARAMS),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"expected an optaccum.AccumulateState.*" + match):
            call()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"averaged_extra_args": ("value",)}, "averaged_extra_args expects a state with sums"),
        (
            {"should_skip_update_fn": optax.skip_not_finite},
            r"should_skip_update_fn returns may not.*Restore it",
        ),
        ({"track_noise_scale": True}, "track_noise_scale expects a state"),
    ],
)
def test_a_state_of_other_options(options, match):
    other = optaccum.accumulate(ADAM, 2, **options)
    with pytest.raises((TypeError, ValueError), match=match):
        other.update(GRADS[0], TX.init(PARAMS), PARAMS, value=1.0)
    if "averaged_extra_args" in options:  # and switched off
        with pytest.raises(ValueError, match=match):
            TX.update(GRADS[0], other.init(PARAMS), PARAMS)


def test_parameters_that_are_missing_are_what_is_missed():
    tx = optaccum.accumulate(optax.adamw(0.1), 2)
    with pytest.raises(ValueError, match="not passing `params`"):  # Optax's own words
        tx.update(GRADS[0], tx.init(PARAMS))
    with pytest.raises(ValueError, match="expects the parameters"):
        optaccum.apply_gradients(tx, GRADS[0], tx.init(PARAMS), None)


def test_a_skip_function_returns_a_pair():
    with pytest.raises(TypeError, match="it returned bool"):
        optaccum.accumulate(ADAM, 2, should_skip_update_fn=lambda *_: True).init(PARAMS)


@pytest.mark.parametrize("accumulator_dtype", [jnp.float32, None])
def test_numpy_parameters_are_taken_without_a_warning(accumulator_dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = optaccum.accumulate(ADAM, 2, accumulator_dtype=accumulator_dtype).init({"w": np.ones(3)})
    assert state.grad_sum["w"].dtype == jnp.float32
