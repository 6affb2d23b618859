"""Streaming accumulation: an optimizer that runs once per window of micro-batches."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaccum._checks import check_flag
from optaccum._dtypes import AccumulatorDType, accumulator_dtype_of, check_accumulator_dtype, is_numeric
from optaccum._noise_scale import init_noise_state
from optaccum._streaming.schedule import ByWeight, UntilWeight, check_every_k
from optaccum._streaming.skip import call_skip_fn
from optaccum._streaming.state import AccumulateState
from optaccum._streaming.window import Given, Options, close, enter
from optaccum._varying import zeros_like

_CONSUMED = {"weight", "denominator", "emit"}


def accumulate(
    inner: optax.GradientTransformation,
    every_k_schedule: int | Callable[[jax.Array], Any] | ByWeight | UntilWeight | None,
    *,
    use_grad_mean: bool = True,
    accumulator_dtype: AccumulatorDType = jnp.float32,
    should_skip_update_fn: Callable[..., Any] | None = None,
    averaged_extra_args: tuple[str, ...] = (),
    track_noise_scale: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sums the gradients of k micro-batches, then runs `inner` once on their mean.

    With weights w_i (1 where none is given) and gradients g_i of the micro-batches' mean losses,

    .. math:: S = \sum_{i=1}^k w_i g_i, \qquad W = \sum_{i=1}^k w_i, \qquad u = \mathrm{inner}(S / W),

    which is the gradient of the mean over all the window's examples, or tokens, however they are spread over the
    micro-batches. The calls before the k-th return zeros and leave `inner`'s state as it is, without evaluating it.

    The transformation's update is `update(grads, state, params=None, *, weight=None, denominator=None, emit=None,
    **extra_args)`. `weight`: scalar, what the micro-batch counts in the mean (its examples, or tokens; global over
    devices), where `grads` is of its mean loss. `denominator`: likewise, where `grads` is of its *summed* loss: S = sum
    of g_i. `emit`: bool scalar, whether this micro-step ends its window, whatever k. A weight of zero adds nothing, not
    even a NaN, but counts as a micro-step; a window whose W is 0 ends without running `inner`. Other extra args reach
    `inner` as the emitting call brings them, unless `averaged_extra_args` names them: a function that `inner` evaluates
    itself (`value_fn` of `optax.lbfgs`) must describe the whole window.

    Updates have the structure and dtypes that `inner` itself gives for gradients of the incoming dtypes; it computes
    with the accumulator's. A parameter whose gradient is float0 (an integer) stays as it is. `optaccum.apply_gradients`
    works in place, for gradients that do not fit twice beside the parameters. On a mesh the sums are sharded as the
    parameters are; those of `inner`, as Optax makes them, where `init` is called outside jit or the axes are Explicit.

    Args:
      inner: any Optax gradient transformation; runs once per window, in place.
      every_k_schedule: k, the micro-steps in a window: an int >= 1; a traceable function of the updates so
        far (int32, shape=()) to a scalar k; `optaccum.by_weight` or `optaccum.until_weight`; None where `emit` alone
        ends a window. A window ends at the first micro-step that makes it k or longer: k may shrink in a restart.
      use_grad_mean: True hands S / W to `inner`, False hands S. Default: True.
      accumulator_dtype: of S. A dtype is taken exactly for real leaves, but float64 stays float64 and complex
        stays complex; None takes each parameter's own; a function (key path, parameter) -> dtype overrides
        all of this. Default: float32.
      should_skip_update_fn: (grads, gradient_step, params) -> (bool scalar, pytree), such as `optax.skip_not_finite`.
        True drops the micro-step and its weight as if it never came; the state counts them and keeps the pytree.
        Default: None, which lets non-finite gradients reach `inner` at the end of their own window.
      averaged_extra_args: names of scalar extra args, such as ("value",), that reach `inner` averaged over
        the window as the gradient is; float32. Default: none.
      track_noise_scale: keep what `optaccum.noise_scale` reads, at one squared norm per micro-step. Default: False.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is `optaccum.AccumulateState`. The last three
      options fill fields of it: switching one on or off changes the structure of a checkpoint.

    Raises:
      TypeError: an argument of the wrong type; both `weight` and `denominator`; an averaged extra arg not
        given, nor `emit` where nothing else ends a window.
      ValueError: k < 1; gradients (when updating) that do not match the parameters init was given.

    Example:
      >>> import jax.numpy as jnp, optax, optaccum
      >>> tx = optaccum.accumulate(optax.sgd(1.0), 2)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for grads, num_tokens in ((jnp.array([8.0, 0.0]), 1), (jnp.array([0.0, 4.0]), 3)):
      ...     updates, state = tx.update(grads, state, params, weight=num_tokens)
      ...     params = optax.apply_updates(params, updates)
      >>> params.tolist()
      [-2.0, -3.0]
    """
    check_transformation(inner, "inner")
    if should_skip_update_fn is not None and not callable(should_skip_update_fn):
        raise TypeError(
            "expected should_skip_update_fn to be a function such as optax.skip_not_finite, or None; got "
            f"{should_skip_update_fn!r}."
        )
    options = Options(
        inner=optax.with_extra_args_support(inner),
        every_k=check_every_k(every_k_schedule),
        use_grad_mean=check_flag(use_grad_mean, "use_grad_mean"),
        accumulator_dtype=check_accumulator_dtype(accumulator_dtype),
        should_skip_update_fn=should_skip_update_fn,
        averaged_extra_args=_checked_names(averaged_extra_args),
        track_noise_scale=check_flag(track_noise_scale, "track_noise_scale"),
    )
    return optax.GradientTransformationExtraArgs(functools.partial(_init, options), functools.partial(_update, options))


def options_of(tx: Any) -> Options | None:
    """The options of a transformation that `accumulate` made, its update jitted perhaps; None for any other."""
    update = getattr(tx, "update", None)
    while isinstance(update, jax.stages.Wrapped):
        update = getattr(update, "__wrapped__", None)
    return update.args[0] if isinstance(update, functools.partial) and update.func is _update else None


def start(options: Options, params: optax.Params, inner_state: optax.OptState) -> AccumulateState:
    """The state before the first micro-step."""

    def zero_sum(path, leaf):
        if not is_numeric(leaf):
            return None  # nor has it a gradient
        return zeros_like(leaf, accumulator_dtype_of(options.accumulator_dtype, path, leaf))

    grad_sum = jax.tree_util.tree_map_with_path(zero_sum, params)
    gradient_step = jnp.zeros([], jnp.int32)
    skip_state = ()
    if options.should_skip_update_fn is not None:
        _, skip_state = call_skip_fn(options.should_skip_update_fn, grad_sum, gradient_step, params)
        skip_state = jax.tree.map(jnp.copy, skip_state)  # a donated state may hold no buffer twice
    return AccumulateState(
        micro_step=jnp.zeros([], jnp.int32),
        gradient_step=gradient_step,
        has_updated=jnp.zeros([], jnp.bool_),
        num_skipped=jnp.zeros([], jnp.int32),
        grad_sum=grad_sum,
        weight_sum=jnp.zeros([], jnp.float32),
        inner_state=inner_state,
        weight_total=jnp.zeros([2], jnp.float32),
        extra_sums={name: jnp.zeros([], jnp.float32) for name in options.averaged_extra_args} or (),
        skip_state=skip_state,
        noise_state=init_noise_state() if options.track_noise_scale else (),
    )


def _init(options: Options, params: optax.Params) -> AccumulateState:
    return start(options, params, options.inner.init(params))


def _update(
    options: Options,
    /,
    updates: optax.Updates,
    state: Any,  # an AccumulateState; Optax's protocol says any
    params: optax.Params | None = None,
    *,
    weight: Any = None,
    denominator: Any = None,
    emit: Any = None,
    **extra_args: Any,
) -> tuple[optax.Updates, AccumulateState]:
    """One micro-step: zero updates, or the inner optimizer's at the end of the window."""
    state, full = enter(options, updates, state, params, Given(weight, denominator, emit, extra_args))
    return close(options, state, full, updates, params, extra_args, in_place=False)


def check_transformation(tx: Any, name: str) -> None:
    """Raises for what does not update as Optax's transformations do."""
    if not callable(getattr(tx, "init", None)) or not callable(getattr(tx, "update", None)):
        raise TypeError(f"expected {name} to be an optax.GradientTransformation such as optax.adamw(1e-3); got {tx!r}.")


def _checked_names(names: Any) -> tuple[str, ...]:
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f'expected averaged_extra_args to be a tuple of names, such as ("value",); got {names!r}.')
    if len(set(names)) < len(names) or not _CONSUMED.isdisjoint(names):
        raise ValueError(
            f"expected averaged_extra_args to name each extra arg once, and none of {sorted(_CONSUMED)}, which "
            f"accumulate consumes; got {names!r}."
        )
    return tuple(names)
