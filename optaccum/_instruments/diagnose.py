"""Why a loss does not accumulate, from its values on repeated and mixed batches.

Write L(a, b) for the loss on a copies of the examples A and b copies of the examples B. A mean over examples
has L(a, b) = (a L_A + b L_B) / (a + b); what departs from that tells what the loss is instead:

- L(1, 0), L(2, 0), L(3, 0) grow in equal steps: a sum; shrink as 1, 1/2, 1/3: divided by the batch size once
  too often; differ in another way: examples see each other;
- (a w_A L_A + b w_B L_B) / (a w_A + b w_B): a mean with a weight per example, or per token;
- a polynomial of degree two in a / (a + b): a product of two batch means;
- anything else that repetition leaves alone: a function of batch statistics.

A constant beside the loss (a penalty on the parameters) changes none of this.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from optaccum._scanning.call import Call
from optaccum._scanning.split import unshard_rows

PyTree = Any
LossOf = Callable[[Call], tuple[Any, PyTree]]  # -> value, the carry that comes back

_MAX_PAIRS = 8  # of parts that are mixed
_EPS = float(np.finfo(np.float32).eps)

_SUM = (
    "the loss is a sum over the batch, or divided by a constant, where a mean over its examples is meant: "
    "the accumulated value is 1/{n} of the whole batch's. Return the mean over the examples that the loss "
    "function is given, or optaccum.WeightedMean(total=the sum, weight=what it is divided by)."
)
_TWICE = (
    "the loss is divided by the batch size twice: the accumulated value is {n} times the whole batch's. "
    "Return the mean over the examples that the loss function is given, or the sum as a WeightedMean's total."
)
_WEIGHTS = (
    "unequal weights: the loss divides by a weight (tokens, a mask's sum) that differs between "
    "micro-batches. Return optaccum.WeightedMean(total, weight) instead of total / weight."
)
_PRODUCT = (
    "a product of batch means, such as a load-balancing loss, which does not split into micro-batches. "
    "Compute what it multiplies with optaccum.chunked and the product on the whole batch, or accept the loss"
    " of each micro-batch."
)
_STATISTICS = (
    "batch statistics: an example's loss depends on the statistics of the examples beside it, as with "
    "BatchNorm in training. Accept each micro-batch's own statistics (pass them on with carry_argnum), use a"
    " norm over each example, or, for statistics of the outputs, compute the outputs with optaccum.chunked "
    "and the loss on the whole batch."
)
_PAIRS = (
    "the examples of a batch see each other, as in a contrastive loss, which does not split into "
    "micro-batches. Compute the outputs with optaccum.chunked and the loss on the whole batch. (A random loss looks "
    "like this too, where its key is not named with key_argnum.)"
)
_KEY = (
    "a key that matters: the loss is random, and each micro-batch draws from its own key, so the numbers "
    "differ without being wrong. Verify with dropout off, or with one key for each example, as a leaf of the"
    " batch."
)
_CARRY = (
    "a carry that matters: the loss of a micro-batch depends on the state that the one before it returned, "
    "and a whole batch has none before it. Verify in a mode that only writes the state."
)
_SOME_LEAVES = (
    "the loss splits and its value agrees, but some gradient leaves do not: a custom gradient that mixes "
    "examples, or a fault of the compiler. Compare with jax.disable_jit(), with another backend and with "
    "in_place=False."
)
_ALL_LEAVES = (
    "the loss splits and its value agrees, but its gradient does not: what stop_gradient or a custom "
    "gradient hides depends on the batch (advantages normalised over it), or the compiler is at fault. "
    "Normalise over the whole batch before splitting it; compare with jax.disable_jit() and with "
    "in_place=False."
)
_UNKNOWN = (
    "none of the usual ones (a sum, unequal weights, batch statistics, a product of batch means, a key or a "
    "carry that matters): the loss does not split. Compute the outputs with optaccum.chunked and the loss on"
    " the whole batch."
)
_UNTRIED = (
    "unknown: the loss cannot be evaluated on repeated and mixed parts of the batch, which would tell "
    "({error}). Usual ones are a sum, unequal weights, batch statistics, a product of batch means, and a key"
    " or a carry that matters."
)
_WHOLE_NOT_FINITE = (
    "not finite: the whole batch's own value or gradient is infinite or NaN, so there is nothing to compare "
    "with. Verify at parameters and on a batch where the loss is finite."
)
_PART_NOT_FINITE = (
    "not finite: a micro-batch's value or gradient is infinite or NaN where the whole batch's is not, as 0 /"
    " 0 is for a micro-batch without weight. Return optaccum.WeightedMean(total, weight) instead of total / "
    "weight."
)


def explain_not_finite(whole_is_finite: bool) -> str:
    """The cause where numbers are infinite or NaN."""
    return _PART_NOT_FINITE if whole_is_finite else _WHOLE_NOT_FINITE


def take_rows(call: Call, rows: np.ndarray) -> Call:
    """A call with these rows of its batch, in this order."""
    return call._replace(batch=jax.tree.map(lambda x: unshard_rows(x)[rows], call.batch))


def diagnose(
    loss_of: LossOf,
    call: Call,
    n: int,
    *,
    num_devices: int,
    resolution: float,
    leaves_agree: list[bool] | None,
) -> str:
    """The likely cause of a disagreement between finite numbers, and the way out.

    Args:
      loss_of: the loss of a call, and the carry that it returns.
      call: the whole batch's.
      n: micro-batches.
      num_devices: the loss takes multiples of so many rows.
      resolution: rounding error of the loss, absolute.
      leaves_agree: of each gradient leaf, where the values agree; else None.
    """
    try:
        cause = _randomness(loss_of, call, n) or _departure(loss_of, call, n, num_devices, resolution)
    except Exception as error:  # the report matters more than its explanation
        return _UNTRIED.format(error=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
    if cause:
        return cause.format(n=n)
    if leaves_agree is None:
        return _UNKNOWN
    return _SOME_LEAVES if any(leaves_agree) else _ALL_LEAVES


def _randomness(loss_of: LossOf, call: Call, n: int) -> str:
    """Whether the key matters, or the carry; empty for neither."""
    if jax.tree.leaves(call.key):
        other = jax.tree.map(lambda key: jax.random.fold_in(key, 1), call.key)
        if float(loss_of(call._replace(key=other))[0]) != float(loss_of(call)[0]):
            return _KEY
    if jax.tree.leaves(call.carry):
        _, carry = loss_of(take_rows(call, np.arange(0, _size(call), n)))
        if float(loss_of(call._replace(carry=carry))[0]) != float(loss_of(call)[0]):
            return _CARRY
    return ""


def _size(call: Call) -> int:
    return jax.tree.leaves(call.batch)[0].shape[0]


def _departure(loss_of: LossOf, call: Call, n: int, num_devices: int, resolution: float) -> str:
    """What most pairs of parts of the batch say that the loss is; empty for a mean over examples."""
    size = _size(call)
    # Three parts together are no larger than the batch, which fits.
    rows = max(min(size // n, size // 3) // num_devices, 1) * num_devices

    def loss(*parts):
        return float(loss_of(take_rows(call, np.concatenate(parts)))[0])

    first, last, micro_batch = np.arange(rows), np.arange(size - rows, size), n * np.arange(rows)
    pairs = [(first, last), *((micro_batch, micro_batch + i) for i in range(1, min(n, _MAX_PAIRS)))]
    kinds = Counter(filter(None, [_kind(loss, *pair, resolution) for pair in pairs]))
    return kinds.most_common(1)[0][0] if kinds else ""


def _kind(loss: Callable[..., float], some: np.ndarray, others: np.ndarray, resolution: float) -> str:
    """Which of the losses in this module's docstring it is on one pair; empty for a mean over examples."""
    once, twice, thrice = loss(some), loss(some, some), loss(some, some, some)
    last = loss(others, others, others)
    if not np.isfinite([once, twice, thrice, last]).all():
        return ""
    resolution = 4 * max(resolution, _EPS * max(map(abs, (once, twice, thrice, last))))
    if abs(twice - once) > resolution:
        first, second = twice - once, thrice - twice
        if abs(second - first) <= 0.05 * abs(first):
            return _SUM
        return _TWICE if abs(3 * second - first) <= 0.05 * abs(first) else _PAIRS

    # How far the loss has gone from A to B at one third and two thirds of B; a mean goes as far.
    way = last - thrice
    at = loss(some, some, others) - thrice, loss(some, others, others) - thrice
    if abs(at[0] - way / 3) <= resolution and abs(at[1] - 2 * way / 3) <= resolution:
        return ""
    share = at[0] / way if way else np.inf
    misfits = {_PRODUCT: abs(3 * at[0] - 3 * at[1] + way)}
    if 0 < share < 1:  # 2 w_B / (w_A + 2 w_B), given w_B / (2 w_A + w_B)
        misfits[_WEIGHTS] = abs(at[1] - way * 4 * share / (1 + 3 * share))
    best = min(misfits, key=lambda kind: misfits[kind])
    return best if misfits[best] <= 4 * resolution else _STATISTICS
