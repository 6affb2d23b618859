"""From a micro-batch to parameters: the backward pass adds into the window's sum itself."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax import lax

from optaccum._checks import check_flag, check_function, check_no_nnx_objects
from optaccum._dtypes import is_float0, keep_sharding
from optaccum._in_place import run_as, why_not_in_place
from optaccum._loss import EXAMPLES, loss_terms, loss_value, ratio
from optaccum._run_if import run_if
from optaccum._streaming.accumulate import check_transformation, options_of
from optaccum._streaming.apply_gradients import apply_gradients
from optaccum._streaming.gradients import gradient_like, gradients_like, moving, put_back
from optaccum._streaming.state import AccumulateState, is_state, states_in
from optaccum._streaming.window import Given, Options, add_count, added, check_state, close, weigh
from optaccum._trace import trace


class Rest(NamedTuple):
    """What a loss function gives beside the total that is differentiated."""

    weight: jax.Array | None  # shape=(): of a WeightedMean
    value: jax.Array  # shape=(): what the loss stands for
    aux: Any


class Operands(NamedTuple):
    """The arrays that one micro-step's gradient is added up from."""

    diff: Any  # what is differentiated, None for the rest of the parameters
    sums: Any  # of its gradients, likewise
    first: jax.Array  # shape=(), bool: whether the micro-step opens its window
    weight: jax.Array | None  # shape=(), float32; None: not given
    consts: list[Any]  # what the loss closes over


def value_and_update(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    in_place: bool | None = None,
) -> Callable[..., Any]:
    """One micro-step from a micro-batch to parameters, without a buffer for the micro-batch's gradient.

    The parameters are those of `jax.value_and_grad`, then :func:`optaccum.apply_gradients`. For a `tx` that
    `optaccum.accumulate` made, the backward pass adds each layer's gradient into `state.grad_sum` as it arises,
    wherever references can be used and layers are scanned. Jit the step, and donate parameters and state. Where the
    weight is zero no backward pass runs.

    Args:
      loss_fn: (params, *args) -> loss, or (loss, aux) with `has_aux`. The loss is a scalar, a mean over the
        micro-batch's examples if `weight` is given, a sum if `denominator` is; or an `optaccum.WeightedMean`,
        which brings its denominator with it.
      tx: any Optax gradient transformation.
      has_aux: whether `loss_fn` returns (loss, aux).
      in_place: None adds in place where that can be and is of use; True adds in place or raises; False makes the
        gradient first. It cannot be with a skip function, `track_noise_scale`, or a `tx` around an `accumulate`, which
        need the gradient. In place the backward pass starts from `weight`: what of it is computed in float16 may
        overflow; False multiplies afterwards, in the accumulator's dtype. Default: None.

    Returns:
      `step(params, state, *args, weight=None, denominator=None, emit=None, **extra_args)` -> (loss, params, state), or
      ((loss, aux), params, state): `args` go to `loss_fn`, keywords to `tx`; `loss` is this micro-batch's value. If
      `averaged_extra_args` names "value" and none is given, it is the loss.

    Raises:
      TypeError: an argument of the wrong type; a loss with several denominators, or with one beside `weight` or
        `denominator`; an NNX object, whose state would stay; as `apply_gradients`.
      ValueError: `in_place=True` where it cannot be.

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax, optaccum
      >>> tx = optaccum.accumulate(optax.sgd(1.0), 2)
      >>> step = optaccum.value_and_update(lambda w, x: jnp.mean(w * x), tx)
      >>> step = jax.jit(step, donate_argnums=(0, 1))
      >>> params = jnp.zeros(())
      >>> state = tx.init(params)
      >>> for micro_batch in (jnp.array([1.0, 3.0]), jnp.array([4.0])):
      ...     loss, params, state = step(params, state, micro_batch, weight=micro_batch.size)
      >>> round(float(params), 3)
      -2.667
    """
    check_function(loss_fn, "loss_fn")
    check_transformation(tx, "tx")
    check_flag(has_aux, "has_aux")
    check_flag(in_place, "in_place", or_none=True)
    options = options_of(tx)
    obstacle = _why_gradient_is_needed(options)
    if obstacle and in_place:
        raise _not_in_place(obstacle)

    def step(params, state, *args, weight=None, denominator=None, emit=None, **extra_args):
        check_no_nnx_objects((params, args))
        given = Given(weight, denominator, emit, extra_args)

        def total_and_rest(params):
            return _total_and_rest(loss_fn(params, *args), has_aux, weight is not None or denominator is not None)

        if options is not None and not obstacle and is_state(state):
            params, state, rest = _into_the_sum(options, total_and_rest, params, state, given, in_place)
        else:
            params, state, rest = _by_a_gradient(tx, total_and_rest, params, state, given)
        return ((rest.value, rest.aux) if has_aux else rest.value), params, state

    return step


def _by_a_gradient(
    tx: optax.GradientTransformation, total_and_rest: Callable[..., Any], params: Any, state: Any, given: Given
) -> tuple[Any, Any, Rest]:
    """`jax.value_and_grad`, then `apply_gradients`; without a backward pass where the weight is zero."""
    likes = jax.tree.map(gradient_like, params)
    diff = jax.tree.map(jnp.asarray, moving(likes, params))
    total, vjp, rest = jax.vjp(lambda diff: total_and_rest(put_back(diff, params)), diff, has_aux=True)
    weight, denominator, emit, extra_args = _with_loss(given, options_of(tx), total, rest)

    def backward(_):
        return vjp(jnp.ones_like(total))[0]

    counts = weight if weight is not None else denominator
    zeros = jax.tree.map(jnp.zeros_like, diff)
    grads = backward(()) if counts is None else run_if(jnp.asarray(counts) != 0, backward, zeros)
    if (own := rest.weight) is not None and not states_in(state):  # which nothing in `tx` takes
        grads, denominator = jax.tree.map(lambda g: ratio(g, own).astype(g.dtype), grads), None
    weighed: Any = {"weight": weight, "denominator": denominator, "emit": emit}
    return *apply_gradients(tx, put_back(grads, likes), state, params, **weighed, **extra_args), rest


def _into_the_sum(
    options: Options,
    total_and_rest: Callable[..., Any],
    params: Any,
    state: AccumulateState,
    given: Given,
    in_place: bool | None,
) -> tuple[Any, AccumulateState, Rest]:
    """The same with the gradient added to the sums right away, in one of two forms."""
    check_state(options, state)
    likes = gradients_like(params, state.grad_sum)
    diff = jax.tree.map(jnp.asarray, moving(likes, params))
    weight, scales = weigh(given)
    operands = Operands(diff, moving(likes, state.grad_sum), state.micro_step == 0, weight, [])
    total, rest, sums = _add_in_some_form(lambda x: total_and_rest(put_back(x, params)), operands, scales, in_place)
    given = _with_loss(given, options, total, rest)
    state, full = add_count(options, state, weigh(given), given, None)
    # Where there is no gradient, zeros: the last window's division by a NaN weight left a NaN.
    old = jax.tree.map(lambda like, x: jnp.zeros_like(x) if is_float0(like) else x, likes, state.grad_sum)
    state = state._replace(grad_sum=put_back(sums, old))
    return *close(options, state, full, likes, params, given.extra_args, in_place=True), rest


def _with_loss(given: Given, options: Options | None, total: jax.Array, rest: Rest) -> Given:
    """The keywords of a micro-step, and what the loss itself says of them."""
    given = given if rest.weight is None else given._replace(denominator=rest.weight)
    if options is not None and "value" in options.averaged_extra_args:
        return given._replace(extra_args={"value": total} | given.extra_args)
    return given


def _add_in_some_form(
    forward: Callable[..., Any], operands: Operands, scales: bool, in_place: bool | None
) -> tuple[jax.Array, Rest, Any]:
    """The micro-step's total and the sums with its gradient, added in place where that can be."""
    is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands))
    if in_place or (in_place is None and is_traced):  # an eager call donates nothing
        traced, consts = trace(forward, operands.diff)
        operands = operands._replace(consts=consts)
        if in_place or traced.has_scan:  # otherwise the compiler adds each gradient as it arises
            fast, plain = (functools.partial(form, traced.call, scales) for form in (_add_in_place, _add))
            pairs = zip(jax.tree.leaves(operands.diff), jax.tree.leaves(operands.sums), strict=True)
            dtypes = [(x.dtype, total.dtype) for x, total in pairs]
            obstacle, cause = why_not_in_place([traced], dtypes, fast, operands)
            if not obstacle:
                return run_as(fast, plain)(operands)
            if in_place:
                raise _not_in_place(obstacle) from cause
    return _add(lambda _, diff: forward(diff), scales, operands)


def _add(call: Callable[..., Any], scales: bool, operands: Operands) -> tuple[jax.Array, Rest, Any]:
    """Differentiates, then adds to the sums."""
    total, vjp, rest = jax.vjp(functools.partial(call, operands.consts), operands.diff, has_aux=True)
    weight = operands.weight if rest.weight is None else rest.weight

    def add(sums, first: Any = False):
        def add_gradient(total, grad):
            return added(total, keep_sharding(grad, total), first, weight if scales else None)

        return jax.tree.map(add_gradient, sums, vjp(jnp.ones_like(total))[0])

    if weight is None:  # one pass over the sums
        return total, rest, add(operands.sums, operands.first)
    return total, rest, run_if(weight != 0, add, _starts(operands))


def _add_in_place(call: Callable[..., Any], scales: bool, operands: Operands) -> tuple[jax.Array, Rest, Any]:
    """The same, the backward pass adding by itself: it starts from the weight."""

    def forward(wide):
        return call(operands.consts, jax.tree.map(lambda x, own: x.astype(own.dtype), wide, operands.diff))

    # A reference has its cotangent's dtype: for wider sums, wider parameters.
    wide = jax.tree.map(lambda x, total: x.astype(total.dtype), operands.diff, operands.sums)
    vjp: Any
    total, vjp, rest = jax.vjp(forward, wide, has_aux=True)
    weight = operands.weight if rest.weight is None else rest.weight
    cotangent = jnp.asarray(weight, total.dtype) if scales else jnp.ones_like(total)
    refs = jax.tree.map(jax.new_ref, _starts(operands))
    backward = vjp.with_refs(refs)
    if weight is None:
        backward(cotangent)
    else:  # a cotangent of zero would still add a NaN
        once = lambda go: (backward(cotangent), jnp.zeros_like(go))[1]  # noqa: E731
        lax.while_loop(lambda go: go, once, weight != 0)
    return total, rest, jax.tree.map(jax.freeze, refs)


def _starts(operands: Operands) -> Any:
    return jax.tree.map(lambda x: jnp.where(operands.first, jnp.zeros_like(x), x), operands.sums)


def _total_and_rest(out: Any, has_aux: bool, is_weighed: bool) -> tuple[jax.Array, Rest]:
    """What is differentiated, of what the loss function returned."""
    if has_aux and not (isinstance(out, tuple | list) and len(out) == 2):
        raise TypeError(f"expected the loss function to return (loss, aux), as has_aux says; got {type(out).__name__}.")
    loss, aux = out if has_aux else (out, ())
    terms = loss_terms(loss, 1.0)
    if len(terms) > 1:
        raise TypeError(
            f"expected a loss of one term, since a window has one weight; got {sorted(terms)}. Add the totals up over "
            "one denominator, or take optaccum.value_and_grad on the whole batch."
        )
    [(name, term)] = terms.items()
    if name == EXAMPLES:
        return term.total, Rest(None, term.total, aux)
    if is_weighed:
        raise TypeError(
            "expected no weight= or denominator= beside a loss that brings its own; got both. Leave it out, or return "
            "the total alone."
        )
    return term.total, Rest(term.weight, loss_value(terms), aux)


def _why_gradient_is_needed(options: Options | None) -> str:
    if options is None:
        return "tx is not one that optaccum.accumulate made, but one around it, or another"
    if options.should_skip_update_fn is not None:
        return "should_skip_update_fn looks at the gradient"
    return "track_noise_scale takes its norm" if options.track_noise_scale else ""


def _not_in_place(obstacle: str) -> ValueError:
    return ValueError(
        f"expected in_place=True to be possible; got an obstacle: {obstacle}. Leave in_place out, or pass False, to "
        "make the gradient first."
    )
