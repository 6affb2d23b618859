"""The end of a window before it is full."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaccum._dtypes import keep_avals
from optaccum._run_if import run_if
from optaccum._streaming.accumulate import options_of
from optaccum._streaming.gradients import gradient_like, gradients_like, moving, put_back
from optaccum._streaming.state import check_is_state, is_state, states_in
from optaccum._streaming.window import close
from optaccum._trace import trace
from optaccum._varying import zeros_of

_NOT_REACHED = (
    "expected tx.update to take zero gradients, weight=0 and emit=True, and to hand them to the optaccum.accumulate in "
    "it; got one that does not. optax.lookahead and optax.contrib.sam, for two, pass nothing on: fill the window up."
)


def flush(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params, **extra_args: Any
) -> tuple[optax.Updates, optax.OptState]:
    """Ends an open window now, with what is in it: for the last, shorter window of an epoch.

    It is a call of `tx.update` with `emit=True` and zero gradients of no weight, where a window is open: all else in
    `tx`, before, behind or beside the `accumulate`, gets that call too. Where none is open nothing is called, and the
    updates are exact zeros, as they are where the window's weight is zero.

    Args:
      tx: a transformation that `optaccum.accumulate` made, or one with some inside (`optax.chain`, `optax.partition`).
      state: its state; that of a `flax.nnx.Optimizer` too.
      params: the parameters.
      **extra_args: for `tx.update`. Those in `averaged_extra_args` need not be given: the window's averages count.

    Returns:
      The updates, of the dtypes that gradients of the parameters' dtypes give, and the state.

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
        raise TypeError(f"expected no {min(given)}; got one. flush ends the window, and divides by what it holds.")
    options, states = options_of(tx), states_in(state)
    if not states or options is not None:
        check_is_state(state)
    leaves, structure = jax.tree.flatten(state)
    inside: Any = state
    if not isinstance(states[0].micro_step, (jax.Array, np.ndarray)):  # a flax.nnx.Optimizer wraps the leaves
        inside = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(tx.init, params)), leaves)
    extra_args = {name: jnp.zeros([], jnp.float32) for s in states for name in dict(s.extra_sums)} | extra_args
    if options is None:
        updates, inside = _by_a_call(tx, inside, params, extra_args)
    else:
        grads = gradients_like(params, inside.grad_sum)
        is_open = inside.micro_step > 0
        updates, inside = close(options, inside, is_open, grads, params, extra_args, in_place=False)
    return updates, jax.tree.unflatten(structure, jax.tree.leaves(inside))


def _by_a_call(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params, extra_args: dict[str, Any]
) -> tuple[optax.Updates, optax.OptState]:
    """`flush` of what may be anywhere in `tx`: one copy of the parameters more, the zero gradients."""
    likes = jax.tree.map(gradient_like, params)

    def end(emit, state):
        grads = put_back(jax.tree.map(jnp.zeros_like, moving(likes, params)), likes)
        updates, state = optax.with_extra_args_support(tx).update(
            grads, state, params, weight=jnp.zeros([], jnp.float32), emit=emit, **extra_args
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
    return run_if(is_open, end_once, (zeros_of(traced.structs[0], params), state))
