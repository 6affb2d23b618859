"""The state of streaming accumulation, and what can be asked of it."""

import functools
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaccum._noise_scale import NoiseScaleState

ADVICE = "Restore it with the options that it was saved with, or start from init."


class AccumulateState(NamedTuple):
    """The state of the transformation that `optaccum.accumulate` returns.

    The fields after `weight_total` hold `()` unless the option named beside them is used.

    Attributes:
      micro_step: micro-steps in the open window.
      gradient_step: updates emitted so far.
      has_updated: whether the last call emitted.
      num_skipped: micro-steps dropped so far by `should_skip_update_fn`.
      grad_sum: weighted sum of the window's gradients. Where no window is open it holds what the last one
        emitted: a window starts by overwriting it.
      weight_sum: weight in the window, kept likewise.
      inner_state: the wrapped optimizer's state.
      weight_total: all the weight emitted so far, as an unevaluated sum of two float32 words; the low one also
        takes what `weight_sum` of the open window loses to rounding.
      extra_sums: of `averaged_extra_args`: name -> weighted sum over the window.
      skip_state: of `should_skip_update_fn`: what it last returned.
      noise_state: of `track_noise_scale`.
    """

    micro_step: jax.Array  # shape=(), int32
    gradient_step: jax.Array  # shape=(), int32
    has_updated: jax.Array  # shape=(), bool
    num_skipped: jax.Array  # shape=(), int32
    grad_sum: optax.Updates  # shapes of the parameters, accumulator dtypes
    weight_sum: jax.Array  # shape=(), float32
    inner_state: optax.OptState
    weight_total: jax.Array  # shape=(2,), float32: high word, low word
    extra_sums: dict[str, jax.Array] | tuple[()] = ()  # each shape=(), float32
    skip_state: Any = ()
    noise_state: NoiseScaleState | tuple[()] = ()


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`a + b`, rounded, and what the rounding lost (Knuth)."""
    rounded = a + b
    added = rounded - a
    return rounded, (a - (rounded - added)) + (b - added)


def add_to_total(total: jax.Array, weight: jax.Array) -> jax.Array:
    """`total + weight`, the total in two float32 words, shape=(2,), renormalised; exact to 2^48."""
    high, low = total
    rounded, lost = two_sum(high, weight)
    return jnp.stack(two_sum(rounded, low + lost))


def has_updated(opt_state: Any) -> jax.Array:
    """Whether the last call emitted: whether the parameters have just been updated.

    Args:
      opt_state: a state of `optaccum.accumulate`, or any pytree that holds some (those of `optax.chain`,
        `optax.partition`, a whole `TrainState`).

    Returns:
      True exactly if the last call emitted an update, as a bool array of shape (); of several states, if all have.

    Raises:
      ValueError: `opt_state` holds no `AccumulateState`.

    Example:
      >>> import jax.numpy as jnp, optax, optaccum
      >>> tx = optax.chain(optax.clip(1.0), optaccum.accumulate(optax.sgd(0.1), 2))
      >>> params = jnp.zeros(3)
      >>> state, emitted = tx.init(params), []
      >>> for _ in range(4):
      ...     _, state = tx.update(jnp.ones(3), state, params)
      ...     emitted.append(bool(optaccum.has_updated(state)))
      >>> emitted
      [False, True, False, True]
    """
    flags = [jnp.asarray(s.has_updated) for s in with_nested(find_states(opt_state))]
    return functools.reduce(jnp.logical_and, flags)  # without a constant, which eager calls transfer


def weight_total(opt_state: Any) -> float:
    """All the weight emitted so far: the examples, or tokens, that the parameters have been trained on.

    Args:
      opt_state: a state of `optaccum.accumulate`, or any pytree that holds some. Concrete: not inside jit.

    Returns:
      A float on the host, exact up to 2^48 for integer weights of 2^24 at most each (in the middle of a window of
      more than 2^24, to float32 of that window); of several states, and of a vmapped one's members, the least.

    Raises:
      ValueError: `opt_state` holds no `AccumulateState`.

    Example:
      >>> import jax.numpy as jnp, optax, optaccum
      >>> tx = optaccum.accumulate(optax.sgd(0.1), 2)
      >>> params = jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for tokens in (500, 300, 200):  # the third is in a window still open
      ...     _, state = tx.update(jnp.ones(3), state, params, weight=tokens)
      >>> int(optaccum.weight_total(state))
      800
    """
    return min(float(np.asarray(s.weight_total, np.float64).sum(-1).min()) for s in find_states(opt_state))


def find_states(opt_state: Any) -> list[AccumulateState]:
    """As `states_in`; one at least."""
    states = states_in(opt_state)
    if not states:
        raise ValueError(
            "expected an optimizer state that holds an optaccum.AccumulateState; got one that does not, "
            f"{type(opt_state).__name__}. {_way_out(opt_state)}"
        )
    return states


def states_in(tree: Any) -> list[AccumulateState]:
    """Every `AccumulateState` in a pytree, except those inside another."""
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_state) if is_state(leaf)]


def with_nested(states: list[AccumulateState]) -> list[AccumulateState]:
    """These and those inside them: windows of windows."""
    return states + [inner for s in states for inner in with_nested(states_in(s.inner_state))]


def is_state(node: Any) -> TypeGuard[AccumulateState]:
    """Whether it is a state of `optaccum.accumulate`."""
    return isinstance(node, AccumulateState)


def check_is_state(state: Any) -> None:
    """Raises, with the way out, for what is no state of `optaccum.accumulate`."""
    if not is_state(state):
        raise TypeError(
            f"expected the state to be an optaccum.AccumulateState; got {type(state).__name__}. {_way_out(state)}"
        )


def _way_out(state: Any) -> str:
    if isinstance(state, optax.MultiStepsState):
        return "optaccum.from_multi_steps goes on from it."
    if states_in(state):
        return "It holds one: update, or flush, the whole transformation that it belongs to, or that one alone."
    if optax.tree_utils.tree_get_all_with_path(state, "grad_sum"):
        return "It was restored without its types: give the checkpointer tx.init(params) as the template to restore."
    return "Pass what this transformation's init, or its last call, returned; (grads, state, params) is the order."
