"""How many micro-steps a window takes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class ByWeight(NamedTuple):
    """A schedule of k over the weight emitted so far; `by_weight` makes it."""

    fn: Callable[[jax.Array], Any]


EveryK = int | Callable[[jax.Array], Any] | ByWeight
"""k, a function gradient_step -> k, or a function of the weight emitted so far."""


def by_weight(fn: Callable[[jax.Array], Any]) -> ByWeight:
    """A schedule of k over the weight emitted so far: batches that grow with tokens rather than with updates.

    Args:
      fn: a traceable function of one float32 scalar, all the weight (examples, tokens) that the windows
        before this one emitted, to the number of micro-steps k in this window. It is exact up to 2^24 and
        within half a unit in the last place beyond.

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
        raise TypeError(f"by_weight expects a function of the weight emitted so far, got {fn!r}.")
    return ByWeight(fn)


def check_every_k(every_k: Any) -> EveryK:
    """`every_k`, NumPy integers as Python's; raises for anything that is not a schedule of k."""
    if isinstance(every_k, ByWeight) or callable(every_k):
        return every_k
    if isinstance(every_k, (bool, np.bool_)) or not isinstance(every_k, (int, np.integer)):
        raise TypeError(
            "every_k_schedule expects an int >= 1, a function gradient_step -> k, or optaccum.by_weight(fn); "
            f"got {every_k!r} of type {type(every_k).__name__}."
        )
    if every_k < 1:
        raise ValueError(
            f"every_k_schedule expects an int >= 1, got {every_k}: a window takes at least one micro-step "
            "(1 updates at every call)."
        )
    return int(every_k)


def micro_steps_in_window(every_k: EveryK, gradient_step: jax.Array, weight_emitted: jax.Array) -> Any:
    """The k of the window that follows `gradient_step` updates and `weight_emitted` of weight; shape=()."""
    if isinstance(every_k, int):
        return every_k
    k = every_k.fn(weight_emitted) if isinstance(every_k, ByWeight) else every_k(gradient_step)
    if isinstance(k, (int, np.integer)):
        return check_every_k(k)
    if k is None or jnp.shape(k) != () or not jnp.issubdtype(jnp.result_type(k), jnp.number):
        raise TypeError(
            "every_k_schedule expects its function to return a number of micro-steps, a scalar; "
            f"got {'None' if k is None else f'shape {jnp.shape(k)}, dtype {jnp.result_type(k)}'}."
        )
    return k
