"""When a window is full."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaccum._dtypes import is_numeric
from optaccum._streaming.state import AccumulateState


class ByWeight(NamedTuple):
    """A schedule of k over the weight emitted so far; `by_weight` makes it."""

    fn: Callable[[jax.Array], Any]


class UntilWeight(NamedTuple):
    """The weight that ends a window; `until_weight` makes it."""

    weight: float | Callable[[jax.Array], Any]


EveryK = int | Callable[[jax.Array], Any] | ByWeight | UntilWeight
"""k, a function gradient_step -> k, a function of the weight emitted so far, or the weight that ends a window."""


def by_weight(fn: Callable[[jax.Array], Any]) -> ByWeight:
    """A schedule of k over the weight emitted so far: batches that grow with tokens rather than with updates.

    Args:
      fn: a traceable function of one float32 scalar, all the weight (examples, tokens) that the windows
        before this one emitted, rounded to float32, to the number of micro-steps k in this window.

    Returns:
      What `every_k_schedule` of `optaccum.accumulate` takes.

    Raises:
      TypeError: `fn` is not callable.

    Example:
      >>> import jax.numpy as jnp, optax, optaccum
      >>> tx = optaccum.accumulate(
      ...     optax.sgd(1.0), optaccum.by_weight(lambda tokens: jnp.where(tokens < 100, 1, 2)))
      >>> params = jnp.zeros(2)
      >>> state, emitted = tx.init(params), []
      >>> for _ in range(6):
      ...     _, state = tx.update(jnp.ones(2), state, params, weight=60)
      ...     emitted.append(bool(optaccum.has_updated(state)))
      >>> emitted
      [True, True, False, True, False, True]
    """
    if not callable(fn):
        raise TypeError(f"expected fn to be a function of the weight emitted so far; got {fn!r}.")
    return ByWeight(fn)


def until_weight(weight: float | Callable[[jax.Array], Any]) -> UntilWeight:
    """Windows that a weight ends: batches of so many tokens, however many micro-batches and devices they take.

    A window ends with the first micro-step that brings its weight to `weight` or more. What it holds beyond counts
    in it, and is not carried over. It ends too where its weight is NaN.

    Args:
      weight: a number above 0, or a traceable function of the updates so far (int32, shape=()) to one; in the unit
        of the `weight=` or `denominator=` given with each micro-step.

    Returns:
      What `every_k_schedule` of `optaccum.accumulate` takes.

    Raises:
      TypeError: `weight` is neither a number nor a function.
      ValueError: it is not above 0.

    Example:
      >>> import jax.numpy as jnp, optax, optaccum
      >>> tx = optaccum.accumulate(optax.sgd(1.0), optaccum.until_weight(1000))
      >>> params = jnp.zeros(2)
      >>> state, emitted = tx.init(params), []
      >>> for num_tokens in (400, 500, 300, 1200, 900):
      ...     _, state = tx.update(jnp.ones(2), state, params, weight=num_tokens)
      ...     emitted.append(bool(optaccum.has_updated(state)))
      >>> emitted
      [False, False, True, True, False]
    """
    if callable(weight):
        return UntilWeight(weight)
    if isinstance(weight, (bool, np.bool_)) or not isinstance(weight, (int, float, np.integer, np.floating)):
        raise TypeError(f"expected weight to be a number or a function gradient_step -> weight; got {weight!r}.")
    if not weight > 0:
        raise ValueError(f"expected weight to be above 0; got {weight}. Leave micro-steps out to end sooner.")
    return UntilWeight(float(weight))


def check_every_k(every_k: Any) -> EveryK | None:
    """`every_k`, NumPy integers as Python's; raises for anything that is not a schedule of k."""
    if every_k is None or isinstance(every_k, (ByWeight, UntilWeight)) or callable(every_k):
        return every_k
    if isinstance(every_k, (bool, np.bool_)) or not isinstance(every_k, (int, np.integer)):
        raise TypeError(
            "expected every_k_schedule to be an int >= 1, a function gradient_step -> k, optaccum.by_weight(fn), "
            f"optaccum.until_weight(W), or None; got {every_k!r} of type {type(every_k).__name__}."
        )
    if every_k < 1:
        raise ValueError(
            f"expected every_k_schedule to be an int >= 1; got {every_k}. A window takes at least one micro-step "
            "(1 updates at every call)."
        )
    return int(every_k)


def is_full(every_k: EveryK | None, micro_step: jax.Array, weight_sum: jax.Array, state: AccumulateState) -> jax.Array:
    """Whether the schedule ends a window of so many micro-steps, and of such a weight; shape=(), bool.

    `state` is the one before the last of them.
    """
    if every_k is None:
        return jnp.zeros([], jnp.bool_)
    if isinstance(every_k, int):
        return micro_step >= every_k
    if isinstance(every_k, UntilWeight):
        weight = every_k.weight
        enough = _number(weight(state.gradient_step), "weight") if callable(weight) else weight
        return ~(weight_sum < jnp.asarray(enough, jnp.float32))  # so that a NaN ends the window, too
    by_weight = isinstance(every_k, ByWeight)
    k = _number(every_k.fn(state.weight_total[0]) if by_weight else every_k(state.gradient_step), "k")
    if isinstance(k, (int, np.integer)):
        check_every_k(k)
    if jnp.issubdtype(jnp.result_type(k), jnp.floating):
        return ~(micro_step.astype(jnp.float32) < jnp.asarray(k, jnp.float32))
    return ~(micro_step < k)


def _number(value: Any, name: str) -> Any:
    """What a schedule's function returned; raises where it can be seen to be no real number."""
    is_number = is_numeric(value) and jnp.shape(value) == ()
    dtype = jnp.result_type(value) if is_number else jnp.complex64
    is_real = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
    if not is_real or (isinstance(value, float) and np.isnan(value)):
        raise TypeError(f"expected every_k_schedule's function to return {name}, a real scalar; got {value!r}.")
    return value
