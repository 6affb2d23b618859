"""From a micro-batch to parameters: the backward pass adds into the window's sum itself."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaccum._dtypes import is_float0, keep_sharding
from optaccum._in_place import run_as, why_not_in_place
from optaccum._loss import EXAMPLES, loss_terms, loss_value
from optaccum._run_if import run_if
from optaccum._streaming.accumulate import options_of
from optaccum._streaming.apply_gradients import (
    apply_gradients,
    close_in_place,
    gradient_like,
    gradients_like,
)
from optaccum._streaming.state import AccumulateState, check_state, is_state
from optaccum._streaming.window import Options, add_count, added, weigh
from optaccum._trace import trace


class Rest(NamedTuple):
    """What a loss function gives beside the total that is differentiated."""

    weight: jax.Array | None  # shape=(): of a WeightedMean
    value: jax.Array  # shape=(): what the loss stands for
    aux: Any


class Given(NamedTuple):
    """The keywords of a step."""

    weight: Any
    denominator: Any
    emit: Any
    extra_args: dict[str, Any]

    def with_loss(self, options: Options | None, total: jax.Array, rest: Rest) -> "Given":
        """These, and what the loss itself says of them."""
        given = self if rest.weight is None else self._replace(denominator=rest.weight)
        if options is not None and "value" in options.averaged_extra_args:
            return given._replace(extra_args={"value": total} | self.extra_args)
        return given


class Leaves(NamedTuple):
    """Which leaves of a tree like the parameters have a gradient that is a number."""

    structure: Any
    likes: list[Any]  # of all leaves: the gradient, as a `jax.ShapeDtypeStruct`, or None

    def of(self, tree: Any) -> list[jax.Array]:
        """Those leaves."""
        leaves = zip(self.structure.flatten_up_to(tree), self.likes, strict=True)
        return [jnp.asarray(x) for x, like in leaves if _is_number(like)]

    def put(self, some: list[Any], tree: Any) -> Any:
        """`tree` with these in their place."""
        left, leaves = iter(some), zip(self.structure.flatten_up_to(tree), self.likes, strict=True)
        return self.structure.unflatten(next(left) if _is_number(like) else x for x, like in leaves)


class Operands(NamedTuple):
    """The arrays that one micro-step's gradient is added up from."""

    diff: list[jax.Array]  # what is differentiated
    sums: list[jax.Array]  # of its gradients
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
        need the gradient. Transformations of the step see the form without references. Default: None.

    Returns:
      `step(params, state, *args, weight=None, denominator=None, emit=None, **extra_args)` -> (loss, params, state), or
      ((loss, aux), params, state): `args` go to `loss_fn`, keywords to `tx`; `loss` is this micro-batch's value. If
      `averaged_extra_args` names "value" and none is given, it is the loss.

    Raises:
      TypeError: a loss with several denominators, or with one beside `weight` or `denominator`; as `apply_gradients`.
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
    if not callable(loss_fn):
        raise TypeError(f"expected loss_fn to be a function; got {loss_fn!r}.")
    if in_place is not None and not isinstance(in_place, (bool, np.bool_)):
        raise TypeError(f"expected in_place to be True, False or None; got {in_place!r}.")
    options = options_of(tx)
    obstacle = _why_gradient_is_needed(options)
    if obstacle and in_place:
        raise _not_in_place(obstacle)

    def step(params, state, *args, weight=None, denominator=None, emit=None, **extra_args):
        given = Given(weight, denominator, emit, extra_args)

        def total_and_rest(params):
            is_weighed = weight is not None or denominator is not None
            return _total_and_rest(loss_fn(params, *args), has_aux, is_weighed)

        if options is not None and not obstacle and is_state(state):
            params, state, rest = _into_the_sum(options, total_and_rest, params, state, given, in_place)
        else:
            params, state, rest = _by_a_gradient(tx, total_and_rest, params, state, given)
        return ((rest.value, rest.aux) if has_aux else rest.value), params, state

    return step


def _by_a_gradient(
    tx: optax.GradientTransformation,
    total_and_rest: Callable[..., Any],
    params: Any,
    state: Any,
    given: Given,
) -> tuple[Any, Any, Rest]:
    """`jax.value_and_grad`, then `apply_gradients`; without a backward pass where the weight is zero."""
    leaves = _leaves_like(jax.tree.map(gradient_like, params))
    diff = leaves.of(params)
    total, vjp, rest = jax.vjp(lambda diff: total_and_rest(leaves.put(diff, params)), diff, has_aux=True)
    given = given.with_loss(options_of(tx), total, rest)

    def backward(_):
        return vjp(jnp.ones_like(total))[0]

    weight = given.weight if given.weight is not None else given.denominator
    zeros = jax.tree.map(jnp.zeros_like, diff)
    grads = backward(()) if weight is None else run_if(jnp.asarray(weight) != 0, backward, zeros)
    grads = leaves.put(grads, leaves.structure.unflatten(map(_no_gradient, leaves.likes)))
    weighed = {"weight": given.weight, "denominator": given.denominator, "emit": given.emit}
    params, state = apply_gradients(tx, grads, state, params, **weighed, **given.extra_args)
    return params, state, rest


def _into_the_sum(
    options: Options,
    total_and_rest: Callable[..., Any],
    params: Any,
    state: AccumulateState,
    given: Given,
    in_place: bool | None,
) -> tuple[Any, AccumulateState, Rest]:
    """The same with the gradient added to the sums right away, in one of two forms."""
    check_state(state, options.accumulator_dtype, options.averaged_extra_args, options.track_noise_scale)
    likes = gradients_like(params, state.grad_sum)
    leaves = _leaves_like(likes)
    count = weigh(options._replace(averaged_extra_args=()), given.weight, given.denominator, {})
    weight = count.weight if count.is_given else None
    operands = Operands(leaves.of(params), leaves.of(state.grad_sum), state.micro_step == 0, weight, [])
    total, rest, sums = _add_in_some_form(
        lambda diff: total_and_rest(leaves.put(diff, params)), operands, count.scales, in_place
    )
    given = given.with_loss(options, total, rest)
    count = weigh(options, given.weight, given.denominator, given.extra_args)
    state, full = add_count(options, state, count, given.emit, None)
    state = state._replace(grad_sum=leaves.put(sums, state.grad_sum))
    return *close_in_place(options, state, full, likes, params, given.extra_args), rest


def _add_in_some_form(
    forward: Callable[..., Any], operands: Operands, scales: bool, in_place: bool | None
) -> tuple[jax.Array, Rest, list[jax.Array]]:
    """The micro-step's total and the sums with its gradient, added in place where that can be."""
    is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands))
    if in_place or (in_place is None and is_traced):  # an eager call donates nothing
        traced, consts = trace(forward, operands.diff)
        operands = operands._replace(consts=consts)
        fast, plain = (functools.partial(_add, traced.call, scales, in_place=form) for form in (True, False))
        if in_place or traced.has_scan:  # otherwise the compiler adds each gradient as it arises
            dtypes = [(x.dtype, total.dtype) for x, total in zip(operands.diff, operands.sums, strict=True)]
            obstacle, cause = why_not_in_place([traced], dtypes, lambda: fast(operands))
            if not obstacle:
                return run_as(fast, plain)(operands)
            if in_place:
                raise _not_in_place(obstacle) from cause
    return _add(lambda _, diff: forward(diff), scales, operands, in_place=False)


def _add(
    call: Callable[..., Any], scales: bool, operands: Operands, *, in_place: bool
) -> tuple[jax.Array, Rest, list[jax.Array]]:
    """Differentiates, and adds to the sums: by the backward pass itself, or after it."""
    diff, dtypes = operands.diff, [x.dtype for x in operands.diff]
    if in_place:  # a reference has its cotangent's dtype: for wider sums, wider parameters
        diff = [x.astype(total.dtype) for x, total in zip(diff, operands.sums, strict=True)]

    def forward(diff):
        return call(operands.consts, [x.astype(dtype) for x, dtype in zip(diff, dtypes, strict=True)])

    vjp: Any
    total, vjp, rest = jax.vjp(forward, diff, has_aux=True)
    weight = operands.weight if rest.weight is None else rest.weight
    cotangent = jnp.asarray(weight, total.dtype) if scales else jnp.ones_like(total)
    starts = [jnp.where(operands.first, jnp.zeros_like(x), x) for x in operands.sums]
    if not in_place:

        def add(sums, first: Any = False):
            pairs = zip(sums, vjp(cotangent)[0], strict=True)
            return [added(total, keep_sharding(grad, total), first) for total, grad in pairs]

        if weight is None:  # one pass over the sums
            return total, rest, add(operands.sums, operands.first)
        return total, rest, run_if(weight != 0, add, starts)
    refs = [jax.new_ref(x) for x in starts]
    backward = vjp.with_refs(refs)
    if weight is None:
        backward(cotangent)
    else:  # a cotangent of zero would still add a NaN
        once = lambda go: (backward(cotangent), jnp.zeros_like(go))[1]  # noqa: E731
        lax.while_loop(lambda go: go, once, weight != 0)
    return total, rest, [jax.freeze(ref) for ref in refs]


def _total_and_rest(out: Any, has_aux: bool, is_weighed: bool) -> tuple[jax.Array, Rest]:
    """What is differentiated, of what the loss function returned."""
    if has_aux and not (isinstance(out, tuple | list) and len(out) == 2):
        raise TypeError(
            f"expected the loss function to return (loss, aux), as has_aux=True says; got {type(out).__name__}."
        )
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


def _leaves_like(likes: Any) -> Leaves:
    """Those of gradients like these."""
    kinds, structure = jax.tree.flatten(likes, is_leaf=lambda x: x is None)
    return Leaves(structure, kinds)


def _is_number(like: Any) -> bool:
    return like is not None and not is_float0(like)


def _no_gradient(like: Any) -> Any:
    return None if like is None else np.zeros(like.shape, jax.dtypes.float0)


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
