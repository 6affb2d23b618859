"""Why a loss does not accumulate, from its values on repeated, mixed and reordered batches.

Write L(a, b) for the loss on a copies of the examples A and b copies of the examples B. A mean over examples has
L(a, b) = (a L_A + b L_B) / (a + b), in whatever order; what departs from that tells what the loss is instead:

- another value for another order of the rows: rows that belong together;
- L(1, 0), L(2, 0), L(3, 0) grow in equal steps: a sum; differ in another way: it does not split;
- (a w_A L_A + b w_B L_B) / (a w_A + b w_B): a mean with a weight per example, or per token;
- anything else that repetition leaves alone: a function of batch statistics.

A constant beside the loss (a penalty on the parameters) changes none of this.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from optaccum._instruments.reference import Reference, is_beside, take_rows
from optaccum._scanning.split import batch_size_of

_MAX_PAIRS = 8  # of parts that are mixed

_SUM = (
    "the loss is a sum over the batch, or divided by a constant, where a mean over its examples is meant: accumulated "
    "it is divided by the micro-batches, {n} on each device. Return the mean over the examples that the loss function "
    "is given, or optaccum.WeightedMean(total=the sum, weight=what it is divided by)."
)
_WEIGHTS = (
    "unequal weights: the loss divides by a weight (tokens, a mask's sum) that differs between micro-batches. Return "
    "optaccum.WeightedMean(total, weight) instead of total / weight."
)
_STATISTICS = (
    "batch statistics: an example's loss depends on those beside it, as with BatchNorm in training or a product of "
    "batch means (a load-balancing loss). Accept each micro-batch's own (pass them on with carry_argnum), use a norm "
    "over each example, or compute the outputs with optaccum.chunked and the loss on the whole batch."
)
_TOGETHER = (
    "rows that belong together: the loss depends on their order, and micro-batch i is batch[i::{n}]. Give them an axis "
    "of their own, behind the batch's, or split the batch yourself and pass presplit=True. (A key that the loss closes "
    "over looks like this too: name it with key_argnum.)"
)
_DOES_NOT_SPLIT = (
    "the loss does not split: it is no mean over examples, as where they see each other (a contrastive loss), or where "
    "it is divided by the batch size twice. Compute the outputs with optaccum.chunked and the loss on the whole batch."
)
_KEY = (
    "a key that matters: the loss is random, and each micro-batch draws from its own key, so the numbers differ but "
    "are not wrong. Verify with dropout off, or with one key for each example, as a leaf of the batch."
)
_CARRY = (
    "a carry that matters: the loss depends on the state that the micro-batch before returned, and a whole batch has "
    "none before it. Verify in a mode that only writes the state."
)
_COMPILER = "the compiler is at fault: compare with jax.disable_jit(), with another backend and with in_place=False."
_GRADIENT = (
    "the loss splits and its value agrees, but its gradient does not: what stop_gradient or a custom gradient hides "
    f"depends on the batch (advantages: normalise them before splitting it), or {_COMPILER}"
)
_LOOP = (
    "{path} is not what the same micro-batches give in a Python loop: devices compute it from their own rows or keys "
    f"(count with optaccum.Sum in aux), or {_COMPILER}"
)
_AUX = (
    "{path} does not combine over micro-batches as it stands. A sum or a count is optaccum.Sum(x), a mean over "
    "examples a bare float, a ratio (an accuracy over tokens) optaccum.WeightedMean(total, weight); what depends on "
    "the whole batch in another way (a norm, a key) is each micro-batch's own: optaccum.Stack shows them."
)
_WHOLE_NOT_FINITE = "not finite: the whole batch's own value, gradient or aux is not. Verify where it is finite."
_PART_NOT_FINITE = (
    "not finite: a micro-batch's value, gradient or aux is infinite or NaN where the whole batch's is not, as 0 / 0 is "
    "without weight. Return optaccum.WeightedMean(total, weight) instead of total / weight."
)
_UNTRIED = "unknown: the loss raises on repeated and mixed parts of the batch, which would tell: {error}"


def explain(errors: dict[str, float], tolerance: float, reference: Reference, carry: Any, resolution: float) -> str:
    """The likely cause of relative errors of which one exceeds the tolerance, and the way out.

    The carry is as the last micro-batch left it; the resolution is what rounding may do to the loss, absolute.
    """
    if any(map(math.isnan, errors.values())):
        is_finite = all(np.isfinite(reference.expected[path]).all() for path in errors if math.isnan(errors[path]))
        return _PART_NOT_FINITE if is_finite else _WHOLE_NOT_FINITE
    of_loss = {path for path, error in errors.items() if error > tolerance and not is_beside(path)}
    if of_loss <= reference.in_loop:
        worst = max(errors, key=errors.__getitem__)
        return (_LOOP if worst in reference.in_loop else _AUX).format(path=worst or "the gradient")
    try:
        cause = _randomness(reference, carry) or _departure(reference, resolution)
    except Exception as error:  # whatever a loss raises on batches that were never meant for it
        return _UNTRIED.format(error=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
    cause = cause or (_DOES_NOT_SPLIT if "value" in of_loss else _GRADIENT)
    return cause.format(n=reference.n)


def _value(reference: Reference, **changed: Any) -> float:
    call = reference.call._replace(**changed)
    return float(reference.loop.results_of(call, [call.batch], with_grads=False)["value"])


def _randomness(reference: Reference, carry: Any) -> str:
    """Whether the key matters, or the carry; empty for neither."""
    key = jax.tree.map(lambda key: jax.random.fold_in(key, 1), reference.call.key)
    if jax.tree.leaves(key) and _value(reference, key=key) != _value(reference):
        return _KEY
    if jax.tree.leaves(carry) and _value(reference, carry=carry) != _value(reference):
        return _CARRY
    return ""


def _departure(reference: Reference, resolution: float) -> str:
    """What most pairs of parts of the batch say that the loss is; empty for a mean over examples."""
    batch, n, num_devices = reference.call.batch, reference.n, reference.loop.num_devices
    size = batch_size_of(batch)

    def loss(*parts):
        return _value(reference, batch=take_rows(batch, np.concatenate(parts)))

    by_device = np.arange(size).reshape(num_devices, -1)
    in_order, reordered = loss(*by_device), loss(*(rows[i::n] for rows in by_device for i in range(n)))
    if abs(reordered - in_order) > resolution:
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
    if abs(twice - once) > resolution:
        first, second = twice - once, thrice - twice
        return _SUM if abs(second - first) <= 0.05 * abs(first) else _DOES_NOT_SPLIT
    # How far the loss has gone from A to B at one third and two thirds of B; a mean goes as far.
    way = last - thrice
    third, two_thirds = loss(some, some, others) - thrice, loss(some, others, others) - thrice
    if max(abs(third - way / 3), abs(two_thirds - 2 * way / 3)) <= resolution:
        return ""
    share = third / way if way else math.inf
    of_weights = abs(two_thirds - way * 4 * share / (1 + 3 * share)) if 0 < share < 1 else math.inf
    of_product = abs(3 * third - 3 * two_thirds + way)  # of two batch means: of degree two in the share of B
    return _WEIGHTS if of_weights <= min(4 * resolution, of_product) else _STATISTICS
