"""Why a loss does not accumulate, from its values on repeated and mixed batches.

Write L(a, b) for the loss on a copies of the examples A and b copies of the examples B. A mean over examples has
L(a, b) = (a L_A + b L_B) / (a + b); what departs from that tells what the loss is instead:

- L(2, 0) = 2 L(1, 0): a sum; half of it: divided by the batch size once too often; neither: examples see each other;
- (a w_A L_A + b w_B L_B) / (a w_A + b w_B): a mean with a weight per example, or per token;
- a polynomial of degree two in a / (a + b): a product of two batch means;
- anything else that repetition leaves alone: a function of batch statistics.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaccum._call import Call

_RTOL = 1e-3  # of differences between losses: far above their rounding, far below what a cause makes

_SUM = (
    "the loss is a sum over the batch, where a mean over its examples is meant: accumulated values are 1/{n} of the whole "
    "batch's. Return the mean, or optaccum.WeightedMean(total=the sum, weight=what it is divided by)."
)
_TWICE = (
    "the loss is divided by the batch size twice: accumulated values are {n} times the whole batch's. Return the mean over "
    "the examples that the loss function is given."
)
_WEIGHTS = (
    "unequal weights: the loss divides by a weight (tokens, a mask's sum) that differs between micro-batches. Return "
    "optaccum.WeightedMean(total, weight) instead of total / weight."
)
_PRODUCT = (
    "a product of batch means, such as a load-balancing loss, which does not split into micro-batches. Compute what it "
    "multiplies with optaccum.chunked and the product on the whole batch, or accept the loss of each micro-batch."
)
_STATISTICS = (
    "batch statistics: an example's loss depends on the statistics of the examples beside it, as with BatchNorm in training. "
    "Accept each micro-batch's own statistics (pass them on with carry_argnum), or use a norm over each example."
)
_PAIRS = (
    "the examples of a batch see each other, as in a contrastive loss, which does not split into micro-batches. Compute the "
    "outputs with optaccum.chunked and the loss on the whole batch."
)
_KEY = (
    "a key that matters: the loss is random, and each micro-batch draws from its own key, so the numbers differ without "
    "being wrong. Verify with dropout off."
)
_CARRY = (
    "the carry matters: the loss of a micro-batch depends on the state that the one before it returned, and a whole batch "
    "has none before it. Verify in a mode that only writes the state."
)
_COMPILER = (
    "the loss splits, and its value agrees, but the gradients at these leaves do not: a custom gradient that mixes examples, "
    "or a fault of the compiler. Compare with jax.disable_jit(), another backend, and in_place=False."
)
_UNKNOWN = (
    "none of the usual ones (a sum, unequal weights, batch statistics, a product of batch means, a key or a carry that matters): "
    "the loss does not split. Compute the outputs with optaccum.chunked and the loss on the whole batch."
)


def diagnose(loss_of: Callable[[Call], Any] | None, call: Call, n: int, value_agrees: bool) -> str:
    """The likely cause of a disagreement, and the way out.

    Args:
      loss_of: the loss of one call, a scalar; None where it cannot be called alone.
      call: the whole batch's.
      n: micro-batches.
      value_agrees: whether the values agree, and only gradients do not.
    """
    if loss_of is None:
        return _UNKNOWN

    def on_key(key):
        return float(loss_of(call._replace(key=key)))

    whole = float(loss_of(call))
    if jax.tree.leaves(call.key):
        other = on_key(jax.tree.map(lambda key: jax.random.fold_in(key, 1), call.key))
        if not _close(other, whole, abs(whole)):
            return _KEY
    if jax.tree.leaves(call.carry):
        moved = jax.tree.map(
            lambda x: x + jnp.ones_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, call.carry
        )
        if not _close(float(loss_of(call._replace(carry=moved))), whole, abs(whole)):
            return _CARRY

    kinds = [_kind(loss_of, call, *examples) for examples in _examples(call.batch, n)]
    for cause in (_SUM, _TWICE, _PAIRS, _STATISTICS, _PRODUCT, _WEIGHTS):
        if cause in kinds:
            return cause.format(n=n)
    return _COMPILER if value_agrees else _UNKNOWN


def _examples(batch: Any, n: int) -> list[tuple[Any, Any]]:
    """Pairs of equally many examples: the batch's two ends, and two micro-batches."""
    size = jax.tree.leaves(batch)[0].shape[0]
    third = max(size // 3, 1)
    rows = max(size // n, 1)
    ends = (slice(0, third), slice(size - third, size))
    micro_batches = (slice(0, rows * n, n), slice(n - 1, rows * n, n))
    return [
        (jax.tree.map(lambda x: x[a], batch), jax.tree.map(lambda x: x[b], batch)) for a, b in (ends, micro_batches)
    ]


def _kind(loss_of: Callable[[Call], Any], call: Call, some: Any, others: Any) -> str:
    """Which of the losses in this module's docstring it is; empty for a mean over examples."""

    def loss(*parts):
        batch = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
        return float(loss_of(call._replace(batch=batch)))

    once, twice = loss(some), loss(some, some)
    at = np.array([loss(some, some, some), loss(some, some, others), loss(some, others, others)])
    last = loss(others, others, others)
    spread = max(np.ptp([*at, last]), 1e-2 * abs(once))
    if not _close(twice, once, spread):
        if _close(twice, 2 * once, abs(once)):
            return _SUM
        return _TWICE if _close(2 * twice, once, abs(once)) else _PAIRS
    if _close(at[1], (2 * at[0] + last) / 3, spread) and _close(at[2], (at[0] + 2 * last) / 3, spread):
        return ""
    # w_B / w_A from the first mixture, tried on the second.
    relative = 2 * (at[0] - at[1]) / (at[1] - last) if at[1] != last else np.inf
    if relative >= 0 and _close(at[2] * (1 + 2 * relative), at[0] + 2 * relative * last, spread * (1 + 2 * relative)):
        return _WEIGHTS
    if _close(at[0] - 3 * at[1] + 3 * at[2] - last, 0.0, spread):
        return _PRODUCT
    return _STATISTICS


def _close(x: float, y: float, scale: float) -> bool:
    return abs(x - y) <= _RTOL * scale
