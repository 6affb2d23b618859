"""One call from gradients to parameters; and the end of a window before it is full."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaccum._dtypes import is_float0, is_numeric, keep_avals
from optaccum._run_if import run_if
from optaccum._streaming.accumulate import options_of
from optaccum._streaming.state import AccumulateState, check_gradients, check_is_state, is_state, states_in
from optaccum._streaming.window import Options, close, close_with_updates, enter, make_inner_update
from optaccum._trace import trace
from optaccum._varying import zeros_of

_NOT_REACHED = (
    "expected tx.update to take zero gradients, weight=0 and emit=True, and to hand them to the optaccum.accumulate in "
    "it; got one that does not. optax.lookahead and optax.contrib.sam, for two, pass nothing on: fill the window up."
)


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    *,
    weight: jax.typing.ArrayLike | None = None,
    denominator: jax.typing.ArrayLike | None = None,
    emit: jax.typing.ArrayLike | None = None,
    **extra_args: Any,
) -> tuple[optax.Params, optax.OptState]:
    """One micro-step, from gradients to parameters: `tx.update` and `optax.apply_updates` in one.

    The parameters are those the two calls give. For a `tx` that `optaccum.accumulate` made there are no zero
    updates in between: parameters and optimizer state are touched only by the call that ends a window, and
    then in place where they are donated (`jax.jit(step, donate_argnums=...)`) in the order in which they
    return, as below: JAX pairs buffers of one shape in order, and in another order two copies of the
    parameters are made. For any other transformation, such as a chain with an `accumulate` inside, it is the
    two calls.

    Args:
      tx: any Optax gradient transformation.
      grads: gradients of one micro-batch, shaped like `params`.
      state: `tx`'s state.
      params: the parameters.
      weight: scalar; see `optaccum.accumulate`. Handed to `tx.update` only if given.
      denominator: scalar; likewise.
      emit: bool scalar; likewise.
      **extra_args: as for `tx.update`.

    Returns:
      The new parameters and the new state.

    Raises:
      TypeError, ValueError: as the update of `optaccum.accumulate`; ValueError for no parameters; TypeError for a
        weight, denominator or emit where there is no `accumulate` in `tx` to take it.

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax, optaccum
      >>> tx = optaccum.accumulate(optax.sgd(1.0), 2)
      >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
      ... def step(params, state, grads):
      ...     return optaccum.apply_gradients(tx, grads, state, params)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for gradient in (1.0, 3.0):
      ...     params, state = step(params, state, jnp.full(2, gradient))
      >>> params.tolist()
      [-2.0, -2.0]
    """
    if params is None:
        raise ValueError("expected params to be the parameters that apply_gradients is to update; got None.")
    options = options_of(tx)
    if options is None or not isinstance(state, AccumulateState):
        given = {"weight": weight, "denominator": denominator, "emit": emit}  # for an `accumulate` inside
        given = {name: value for name, value in given.items() if value is not None}
        if given and not states_in(state):
            raise TypeError(
                f"expected tx to have an optaccum.accumulate inside, to take {min(given)}=; got a state of "
                f"{type(state).__name__} that holds none. Leave {min(given)}= out, or wrap the optimizer."
            )
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **given, **extra_args)
        return _apply(params, updates), state
    state, full = enter(options, grads, state, params, weight, denominator, emit, extra_args)
    return close_in_place(options, state, full, grads, params, extra_args)


def close_in_place(
    options: Options,
    state: AccumulateState,
    full: jax.Array,
    grads: optax.Updates,
    params: optax.Params,
    extra_args: dict[str, Any],
) -> tuple[optax.Params, AccumulateState]:
    """`close`, for the parameters; those whose gradient is None or float0 are handed back as they are."""
    inner_update, _ = make_inner_update(options, grads, state, params, extra_args)

    def moves(grad, param):
        return None if grad is None or is_float0(grad) else param

    moving = jax.tree.map(moves, grads, params, is_leaf=lambda g: g is None)

    def step_fn(moving, inner_state, gradient, averages):
        updates, inner_state = inner_update(gradient, inner_state, _join(moving, params), averages)
        return keep_avals(_apply(moving, updates), moving, "the parameters"), inner_state

    moved, state = close(options, state, full, moving, step_fn)
    return _join(moved, params), state


def _apply(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """`optax.apply_updates`, for which parameters without an update may be anything."""

    def apply(update, param):
        if update is None or param is None:
            return param
        return jnp.asarray(param + update).astype(jnp.asarray(param).dtype)

    return jax.tree.map(apply, updates, params, is_leaf=lambda u: u is None)


def _join(some: optax.Params, params: optax.Params) -> optax.Params:
    """`params` with those of `some` that are not None."""
    return jax.tree.map(lambda a, p: p if a is None else a, some, params, is_leaf=lambda a: a is None)


def flush(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params, **extra_args: Any
) -> tuple[optax.Updates, optax.OptState]:
    """Ends an open window now, with what is in it: for the last, shorter window of an epoch.

    It is a call of `tx.update` with `emit=True` and zero gradients of no weight, where a window is open: all else in
    `tx`, before, behind or beside the `accumulate`, gets that call too. Where none is open nothing is called.

    Args:
      tx: a transformation that `optaccum.accumulate` made, or one with some inside (`optax.chain`, `optax.partition`).
      state: its state; that of a `flax.nnx.Optimizer` too.
      params: the parameters.
      **extra_args: for `tx.update`. Those in `averaged_extra_args` need not be given: the window's averages
        count.

    Returns:
      The updates, of the dtypes that gradients of the parameters' dtypes give, and the state. The gradient
      sum is divided by the weight in the window. Where none is open, or its weight is zero, `accumulate`'s updates are
      exact zeros and `inner` does not run.

    Raises:
      TypeError: the state holds none of `optaccum.accumulate`; `emit` does not reach it, since something in `tx`
        passes no extra args on (`optax.lookahead`, `optax.contrib.sam`); a weight is given.

    Example:
      >>> import jax.numpy as jnp, optax, optaccum
      >>> tx = optaccum.accumulate(optax.sgd(1.0), 4)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for gradient in (1.0, 3.0):
      ...     _, state = tx.update(jnp.full(2, gradient), state, params)
      >>> updates, state = optaccum.flush(tx, state, params)
      >>> updates.tolist()
      [-2.0, -2.0]
    """
    if given := {"weight", "denominator", "emit"} & extra_args.keys():
        raise TypeError(
            f"expected no {min(given)}; got one. flush ends the window, and divides by what it holds."
        )
    options, states = options_of(tx), states_in(state)
    if not states or options is not None:
        check_is_state(state)
    leaves, structure = jax.tree.flatten(state)
    inside: Any = state
    if not isinstance(states[0].micro_step, (jax.Array, np.ndarray)):  # a flax.nnx.Optimizer wraps the leaves
        inside = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(tx.init, params)), leaves)
    unseen = {name: jnp.zeros([], jnp.float32) for s in states for name in dict(s.extra_sums)}
    extra_args = unseen | extra_args
    if options is not None:
        grads = gradients_like(params, inside.grad_sum)
        is_open = inside.micro_step > 0
        updates, inside = close_with_updates(options, inside, is_open, grads, params, extra_args)
    else:
        updates, inside = _flush_inside(tx, inside, params, extra_args)
    return updates, jax.tree.unflatten(structure, jax.tree.leaves(inside))


def _flush_inside(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params, extra_args: dict[str, Any]
) -> tuple[optax.Updates, optax.OptState]:
    """`flush` by a call with `emit`, where a window is open."""

    def end(emit, state):
        grads = jax.tree.map(_zero_gradient, params)
        weight = jnp.zeros([], jnp.float32)
        updates, state = optax.with_extra_args_support(tx).update(
            grads, state, params, weight=weight, emit=emit, **extra_args
        )
        return jax.tree.map(lambda u: lax.convert_element_type(u, jnp.result_type(u)), updates), state

    try:
        traced, _ = trace(end, True, state)
    except Exception as error:
        raise TypeError(f"{_NOT_REACHED} Its update says: {error}") from error
    flags = {id(s.has_updated) for s in states_in(traced.structs)}
    outputs = [i for i, leaf in enumerate(jax.tree.leaves(traced.structs)) if id(leaf) in flags]
    if not all(traced.depends_on(i)[0] for i in outputs):
        raise TypeError(_NOT_REACHED)

    def end_once(carry):
        updates, new_state = end(True, carry[1])
        return updates, keep_avals(new_state, carry[1], "the optimizer's state")

    def not_updated(node):
        return node._replace(has_updated=jnp.zeros_like(node.has_updated)) if is_state(node) else node

    is_open = functools.reduce(jnp.logical_or, [s.micro_step > 0 for s in states_in(state)])
    state = jax.tree.map(not_updated, state, is_leaf=is_state)
    return run_if(is_open, end_once, (zeros_of(traced.structs[0]), state))


def gradient_like(param: Any) -> Any:
    """What `jax.grad` gives for this parameter, as a `jax.ShapeDtypeStruct`; None for what is no array."""
    if not is_numeric(param):
        return None
    is_float = jnp.issubdtype(jnp.result_type(param), jnp.inexact)
    dtype = jnp.result_type(param) if is_float else jax.dtypes.float0
    return jax.ShapeDtypeStruct(jnp.shape(param), dtype)


def _zero_gradient(param: Any) -> Any:
    like = gradient_like(param)
    if like is None or is_float0(like):
        return None if like is None else np.zeros(like.shape, like.dtype)
    return jnp.zeros_like(param)


def gradients_like(params: optax.Params, grad_sum: optax.Updates) -> optax.Updates:
    """What `jax.grad` would give for the parameters that have a sum, as `jax.ShapeDtypeStruct`; None for the others."""

    def struct(total, param):
        return None if total is None else gradient_like(param)

    try:
        grads = jax.tree.map(struct, grad_sum, params, is_leaf=lambda x: x is None)
    except ValueError as error:
        error.add_note("The parameters are not those that init was given.")
        raise
    check_gradients(grads, grad_sum)
    return grads
