"""Why a loss does not accumulate, from its values on repeated, mixed and reordered batches.

Write L(a, b) for the loss on a copies of the examples A and b copies of the examples B. A mean over examples has
L(a, b) = (a L_A + b L_B) / (a + b), in whatever order; what departs from that tells what the loss is instead:

- another value for another order of the rows: rows that belong together;
- L(1, 0), L(2, 0), L(3, 0) grow in equal steps: a sum; differ in another way: it does not split;
- (a w_A L_A + b w_B L_B) / (a w_A + b w_B): a mean with a weight per example, or per token;
- anything else that repetition leaves alone: a function of batch statistics.

A constant beside the loss (a penalty on the parameters) changes none of this.
"""

from collections import Counter
from collections.abc import Callable

import jax
import numpy as np

from optaccum._instruments.references import Reference, take_micro_batch, take_rows
from optaccum._scanning.call import Call
from optaccum._scanning.split import batch_size_of

_MAX_PAIRS = 8  # of parts that are mixed
_EPS = float(np.finfo(np.float32).eps)

_SUM = (
    "the loss is a sum over the batch, or divided by a constant, where a mean over its examples is meant: "
    "the accumulated value is 1/{n} of the whole batch's. Return the mean over the examples that the loss "
    "function is given, or optaccum.WeightedMean(total=the sum, weight=what it is divided by)."
)
_WEIGHTS = (
    "unequal weights: the loss divides by a weight (tokens, a mask's sum) that differs between "
    "micro-batches. Return optaccum.WeightedMean(total, weight) instead of total / weight."
)
_STATISTICS = (
    "batch statistics: an example's loss depends on the statistics of the examples beside it, as with BatchNorm in "
    "training or a product of batch means (a load-balancing loss). Accept each micro-batch's own statistics (pass them "
    "on with carry_argnum), use a norm over each example, or, for statistics of the outputs, compute the outputs with "
    "optaccum.chunked and the loss on the whole batch."
)
_TOGETHER = (
    "rows that belong together: the loss depends on the order of the rows, and micro-batch i is batch[i::{n}]. Give "
    "rows that belong together an axis of their own, behind the batch's, or split the batch yourself and pass "
    "presplit=True. (A key that the loss closes over looks like this too: name it with key_argnum.)"
)
_DOES_NOT_SPLIT = (
    "the loss does not split: it is no mean over examples, as where the examples of a batch see each other (a "
    "contrastive loss), or where it is divided by the batch size twice. Compute the outputs with optaccum.chunked and "
    "the loss on the whole batch."
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
_GRADIENT = (
    "the loss splits and its value agrees, but its gradient does not: what stop_gradient or a custom gradient hides "
    "depends on the batch (advantages normalised over it), or the compiler is at fault. Normalise over the whole batch "
    "before splitting it; compare with jax.disable_jit(), with another backend and with in_place=False."
)
_UNTRIED = (
    "unknown: the loss cannot be evaluated on repeated and mixed parts of the batch, which would tell "
    "({error}). Usual ones are a sum, unequal weights, batch statistics, and a key or a carry that matters."
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
_AUX_SUM = (
    "{path} is a sum over the examples that the loss is given, and a bare float stands for a mean: it comes back {n} "
    "times too small. Wrap it in optaccum.Sum; what divides by it belongs into optaccum.WeightedMean(total, weight)."
)
_AUX_MEAN = (
    "{path} is a mean, and optaccum.Sum adds the micro-batches' up: it comes back {n} times too large. Leave it bare, "
    "or return optaccum.WeightedMean(total, weight)."
)
_AUX_WEIGHTS = (
    "{path} does not combine over micro-batches as {kind} does. A ratio (an accuracy over tokens) is "
    "optaccum.WeightedMean(total, weight), a count optaccum.Sum; what depends on the whole batch in another way (a "
    "norm, batch statistics, a key) is each micro-batch's own: optaccum.Stack shows them."
)
_LOOP = (
    "{path} is not what the same micro-batches give in a Python loop: devices compute it from their own rows or keys "
    "(count with optaccum.Sum in aux), or the compiler is at fault. Compare with jax.disable_jit(), with another "
    "backend and with in_place=False."
)


def explain_not_finite(expected_is_finite: bool) -> str:
    """The cause where numbers are infinite or NaN."""
    return _PART_NOT_FINITE if expected_is_finite else _WHOLE_NOT_FINITE


def explain_loop(path: str) -> str:
    """The cause where one differs from a Python loop over the same micro-batches."""
    return _LOOP.format(path=path)


def explain_aux(path: str, kind: str, ratio: float, n: int, batch_size: int) -> str:
    """The cause where a leaf of aux differs from the whole batch's.

    Args:
      path: the leaf's.
      kind: of wrapper; empty for a bare leaf.
      ratio: accumulated leaf / the whole batch's.
      n: micro-batches.
      batch_size: examples.
    """
    # Micro-batches of one and the next size average a sum to something between these shares of it.
    shares = (batch_size // n / batch_size, -(-batch_size // n) / batch_size)
    cause = _AUX_WEIGHTS
    if not kind and 0.99 * shares[0] <= ratio <= 1.01 * shares[1]:
        cause = _AUX_SUM
    elif kind == "Sum" and 0.8 * n <= ratio <= 1.2 * n:
        cause = _AUX_MEAN
    return cause.format(path=path, kind=kind or "a mean over examples", n=n)


def diagnose(reference: Reference, call: Call, n: int, *, resolution: float, value_agrees: bool) -> str:
    """The likely cause of a disagreement between finite values or gradients, and the way out.

    Args:
      reference: has the loss of any call.
      call: the whole batch's.
      n: micro-batches.
      resolution: rounding error of the loss, absolute.
      value_agrees: whether only gradients disagree.
    """
    try:
        cause = _randomness(reference, call, n) or _departure(reference, call, n, resolution)
    except Exception as error:  # whatever a loss raises on batches that were never meant for it
        return _UNTRIED.format(error=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
    return (cause or (_GRADIENT if value_agrees else _DOES_NOT_SPLIT)).format(n=n)


def _randomness(reference: Reference, call: Call, n: int) -> str:
    """Whether the key matters, or the carry; empty for neither."""

    def value(**changed):
        return float(reference.value_of(call._replace(**changed)).value)

    other_key = jax.tree.map(lambda key: jax.random.fold_in(key, 1), call.key)
    if jax.tree.leaves(other_key) and value(key=other_key) != value():
        return _KEY
    if jax.tree.leaves(call.carry):
        part = take_micro_batch(call, 0, n, reference.num_devices)
        if value(carry=reference.value_of(part).carry) != value():
            return _CARRY
    return ""


def _departure(reference: Reference, call: Call, n: int, resolution: float) -> str:
    """What most pairs of parts of the batch say that the loss is; empty for a mean over examples."""
    size, num_devices = batch_size_of(call.batch), reference.num_devices

    def loss(*parts):
        return float(reference.value_of(take_rows(call, np.concatenate(parts))).value)

    by_device = np.arange(size).reshape(num_devices, -1)
    in_order, reordered = loss(*by_device), loss(*(rows[i::n] for rows in by_device for i in range(n)))
    if abs(reordered - in_order) > 4 * max(resolution, _EPS * abs(in_order)):
        return _TOGETHER
    # Three parts together are no larger than the batch, which fits.
    rows = max(min(size // n, size // 3) // num_devices, 1) * num_devices
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
        return _SUM if abs(second - first) <= 0.05 * abs(first) else _DOES_NOT_SPLIT
    # How far the loss has gone from A to B at one third and two thirds of B; a mean goes as far.
    way = last - thrice
    at = loss(some, some, others) - thrice, loss(some, others, others) - thrice
    if abs(at[0] - way / 3) <= resolution and abs(at[1] - 2 * way / 3) <= resolution:
        return ""
    share = at[0] / way if way else np.inf
    misfit_of_product = abs(
        3 * at[0] - 3 * at[1] + way
    )  # of two batch means: of degree two in the share of B
    if 0 < share < 1 and abs(at[1] - way * 4 * share / (1 + 3 * share)) <= min(
        4 * resolution, misfit_of_product
    ):
        return _WEIGHTS  # 2 w_B / (w_A + 2 w_B), given w_B / (2 w_A + w_B)
    return _STATISTICS
