"""How large a batch is worth its cost: the gradient noise scale, from the window's own micro-steps."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optaccum._dtypes import at_least_float32

_DECAY = 0.99  # of the moving averages: they look back over about a hundred windows


class NoiseEstimates(NamedTuple):
    """One window's unbiased estimates. Each is noisy, and may be negative: average many before dividing."""

    gradient_sq_norm: jax.Array  # shape=(), float32: |G|^2, of the true gradient
    gradient_variance: jax.Array  # shape=(), float32: tr(Sigma), of one unit of weight's gradient


class NoiseScale(NamedTuple):
    """What `optaccum.noise_scale` returns."""

    noise_scale: jax.Array  # shape=(), float32: in units of weight, such as examples
    gradient_sq_norm: jax.Array  # shape=(), float32
    gradient_variance: jax.Array  # shape=(), float32


class NoiseScaleState(NamedTuple):
    """The open window's sums and the moving averages over the closed ones."""

    num_terms: jax.Array  # shape=(), int32: micro-steps of this window that have a weight
    sq_norm_sum: jax.Array  # shape=(), float32: sum of n_i |g_i|^2 over them
    averages: NoiseEstimates  # not yet bias-corrected
    averages_weight: jax.Array  # shape=(), float32: 1 - decay^windows, what corrects them


def estimate_noise(num_terms: Any, sq_norm_sum: Any, mean_sq_norm: Any, weight_sum: Any) -> NoiseEstimates:
    r"""The two estimates of one window; NaN for both where k < 2 or N = 0: one micro-step shows no spread.

    With k mean gradients g_i of n_i examples each (`sq_norm_sum`: the sum of n_i |g_i|^2), N their sum (`weight_sum`)
    and g the mean over all of them (`mean_sq_norm`: |g|^2),

    .. math::
      \widehat{\mathrm{tr}\,\Sigma} = \frac{\sum_i n_i |g_i|^2 - N |g|^2}{k - 1}, \qquad
      \widehat{|G|^2} = |g|^2 - \widehat{\mathrm{tr}\,\Sigma} / N,

    which for k = 2 and equal n_i is appendix A.1 of the paper that `noise_scale` names.
    """
    num_terms, *sums = (jnp.asarray(x, jnp.float32) for x in (num_terms, sq_norm_sum, mean_sq_norm, weight_sum))
    sq_norm_sum, mean_sq_norm, weight_sum = sums
    known = (num_terms > 1) & (weight_sum != 0)
    weight = jnp.where(known, weight_sum, 1)
    variance = (sq_norm_sum - weight_sum * mean_sq_norm) / jnp.where(known, num_terms - 1, 1)
    estimates = NoiseEstimates(mean_sq_norm - variance / weight, variance)
    return NoiseEstimates(*(jnp.where(known, x, jnp.nan) for x in estimates))


def squared_norm(tree: Any) -> jax.Array:
    """|tree|^2, summed in float32 at least; shape=(), float32."""
    total = jnp.zeros([], jnp.float32)
    for leaf in jax.tree.leaves(tree):
        for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
            wide = part.astype(at_least_float32(part.dtype))
            sharding = jax.typeof(wide).sharding
            everywhere = sharding.update(spec=PartitionSpec()) if any(sharding.spec) else None
            # A dot: squares XLA would share with an optimizer that has them too (Adam), and so keep a copy.
            dot = jnp.tensordot(wide, wide, axes=wide.ndim, out_sharding=everywhere)
            total = total + dot.astype(jnp.float32)
    return total


def init_noise_state() -> NoiseScaleState:
    """Nothing seen yet."""
    # A buffer each: a state that is donated may not hold one twice.
    sq_norm_sum, *averages, averages_weight = (jnp.zeros([], jnp.float32) for _ in range(4))
    return NoiseScaleState(jnp.zeros([], jnp.int32), sq_norm_sum, NoiseEstimates(*averages), averages_weight)


def add_term(state: NoiseScaleState, first: jax.Array, grads: Any, weight: jax.Array, is_mean: bool) -> NoiseScaleState:
    """The open window's sums with a micro-step's n |g|^2; that alone where it is the first.

    g is its mean gradient over a weight of n; `grads` is g, or n g where `is_mean` is False.
    """
    counts = weight != 0
    # Masking the scalar rather than the gradient lets XLA reduce what it reads, with no copy in between.
    sq_norm = jnp.where(counts, squared_norm(grads), 0)
    term = weight * sq_norm if is_mean else sq_norm / jnp.where(counts, weight, 1)
    return state._replace(
        num_terms=jnp.where(first, 0, state.num_terms) + counts.astype(jnp.int32),
        sq_norm_sum=jnp.where(first, 0, state.sq_norm_sum) + term,
    )


def close_terms(state: NoiseScaleState, grads: Any, weight_sum: jax.Array, is_mean: bool) -> NoiseScaleState:
    """The moving averages with the window that ends with this mean gradient, or sum where `is_mean` is False.

    A window that says nothing, or is not finite, leaves them as they are.
    """
    mean_sq_norm = squared_norm(grads)
    if not is_mean:
        mean_sq_norm = mean_sq_norm / jnp.square(weight_sum)
    estimates = estimate_noise(state.num_terms, state.sq_norm_sum, mean_sq_norm, weight_sum)
    known = jnp.isfinite(estimates.gradient_sq_norm) & jnp.isfinite(estimates.gradient_variance)

    def move(average, new):
        return jnp.where(known, _DECAY * average + (1 - _DECAY) * new, average)

    return state._replace(
        averages=jax.tree.map(move, state.averages, estimates),
        averages_weight=move(state.averages_weight, jnp.ones([], jnp.float32)),
    )


def noise_scale(opt_state: Any) -> NoiseScale:
    r"""The gradient noise scale, from the windows so far.

    .. math:: B_{\mathrm{noise}} = \mathrm{tr}\,\Sigma \,/\, |G|^2

    is the batch size, in units of weight (examples, or tokens), at which a gradient's noise is as large as
    the gradient: far below it a larger batch saves updates almost in proportion, far above it saves none. It
    is the ratio of two moving averages (decay 0.99, bias-corrected) over the windows of two micro-steps with
    a weight or more; what each window adds is unbiased, for unequal weights too.

    Args:
      opt_state: a state, or any pytree that holds one, of a transformation that `optaccum.accumulate` made
        with `track_noise_scale=True`. Of several (`optax.partition`) the two quantities add up.

    Returns:
      A NamedTuple of float32 scalars `noise_scale`, `gradient_sq_norm` (|G|^2) and `gradient_variance` (tr
      Sigma, of one unit of weight). NaN before the first window; early on, the noise scale may be negative.

    Raises:
      ValueError: no state in `opt_state` tracks the noise scale.

    References:
      McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.1,
      https://arxiv.org/abs/1812.06162

    Example:
      >>> import jax.numpy as jnp, optax, optaccum
      >>> tx = optaccum.accumulate(optax.sgd(0.1), 2, track_noise_scale=True)
      >>> params = jnp.zeros(1)
      >>> state = tx.init(params)
      >>> for gradient in (1.0, 3.0):
      ...     _, state = tx.update(jnp.full(1, gradient), state, params)
      >>> [round(float(x), 3) for x in optaccum.noise_scale(state)]  # |G|^2 = 2^2 - 2/2
      [0.667, 3.0, 2.0]
    """
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_noise_state) if _is_noise_state(s)]
    if not states:
        raise ValueError(
            "expected a state of a transformation made by optaccum.accumulate(..., track_noise_scale=True); got "
            f"{type(opt_state).__name__} without one."
        )
    corrected = [[jnp.divide(average, s.averages_weight) for average in s.averages] for s in states]
    sq_norm, variance = (functools.reduce(jnp.add, parts) for parts in zip(*corrected, strict=True))
    return NoiseScale(variance / sq_norm, sq_norm, variance)


def _is_noise_state(node: Any) -> bool:
    return isinstance(node, NoiseScaleState)
