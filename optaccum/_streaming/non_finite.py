"""`optax.skip_not_finite` at the cost of reading the gradients once."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax


def cheaper(should_skip_update_fn: Any, skip_state: Any) -> Any:
    """`should_skip_update_fn`, or, for Optax's own check, one that answers the same in less time and memory.

    XLA materialises the int32 mask that Optax sums: on CPU a second copy of the gradients, and eight times
    the time (16 M float32 on 2 cores: 80 ms; this way 9 ms).
    """
    if should_skip_update_fn is not optax.skip_not_finite:
        return should_skip_update_fn
    known = isinstance(skip_state, dict) and skip_state.keys() == {"should_skip", "num_not_finite"}
    return _skip_not_finite if known else should_skip_update_fn


def _skip_not_finite(updates: optax.Updates, gradient_step: Any, params: Any) -> tuple[jax.Array, Any]:
    del gradient_step, params
    num_not_finite = jnp.zeros([], jnp.int32)
    for leaf in jax.tree.leaves(updates):
        num_not_finite = num_not_finite + count_not_finite(leaf)
    should_skip = num_not_finite > 0
    return should_skip, {"should_skip": should_skip, "num_not_finite": num_not_finite}


def count_not_finite(x: jax.Array) -> jax.Array:
    """How many elements are infinite or NaN; shape=(), int32.

    A pair (x, n) stands for n, and one more where x is not finite. Reducing such pairs keeps the test inside
    the reduction, where XLA does not materialise its result.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros([], jnp.int32)

    def combine(a, b):
        return jnp.zeros_like(a[0]), _count(*a) + _count(*b)

    operands = (lax.stop_gradient(x), jnp.zeros_like(x, dtype=jnp.int32))
    zeros = (jnp.zeros([], x.dtype), jnp.zeros([], jnp.int32))
    return _count(*lax.reduce(operands, zeros, combine, tuple(range(x.ndim))))


def _count(x: jax.Array, n: jax.Array) -> jax.Array:
    return n + (~jnp.isfinite(x)).astype(jnp.int32)
