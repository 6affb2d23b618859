"""`flax.nnx.value_and_grad` over micro-batches. The only module that imports Flax."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import optaccum
from optaccum._scanning.call import as_indices, check_function
from optaccum._scanning.data_axes import Replicated, as_axes

# How the state that is not differentiated divides: frozen parameters, what else is not of an Rngs, and that of Rngs.
_OTHERS = (nnx.Param, nnx.Not(nnx.RngState), ...)
_APPENDED = 2  # positional arguments that the pure form has after the user's: the graph and the carried state


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | nnx.DiffState = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    key_argnum: int | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """`flax.nnx.value_and_grad`, one micro-batch at a time.

    The state that is not differentiated (BatchNorm statistics, the keys and counts of Rngs, caches, metrics), of the
    model and of every other NNX object among the arguments, threads through the micro-batches in order, and the objects
    are updated with what the last one leaves, as NNX users expect of a call. Python attributes that the loss sets are
    not kept: keep what changes in an `nnx.Variable`. With `data_axes`, floating state is averaged over the devices, all
    but parameters, each device draws from its own keys, and counts advance as they would without.

    Args:
      loss_fn: (model, batch, ...) -> loss, or (loss, aux) with `has_aux`; losses and aux as for
        :func:`optaccum.value_and_grad`. An `nnx.Rngs`, metrics or a second model may be among the arguments.
      argnums: 0, to differentiate the model's `nnx.Param`, or `nnx.DiffState(0, filter)`. The model comes first.
      batch_argnums: the positional argument or arguments to split.
      has_aux: whether `loss_fn` returns (loss, aux).
      key_argnum: a JAX key, as for :func:`optaccum.value_and_grad`; an `nnx.Rngs` needs no mention.
      **options: the other options of :func:`optaccum.value_and_grad`, but `carry_argnum`: the model is the carry.

    Returns:
      A function of `loss_fn`'s arguments that returns what `nnx.value_and_grad` returns, gradients as an `nnx.State`,
      and updates the model and the other objects.

    Raises:
      TypeError, ValueError: as :func:`optaccum.value_and_grad`; TypeError for state that changes its structure, and for
        an NNX object to split or to fold a key from.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaccum.nnx
      >>> from flax import nnx
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> grad_fn = optaccum.nnx.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2), num_microbatches=4)
      >>> loss, grads = grad_fn(model, jnp.arange(24.0).reshape(8, 3))
      >>> sorted(grads), bool((model.mean[...] > 0).all())
      (['bias', 'scale'], True)
    """
    if "carry_argnum" in options:
        raise TypeError("expected no carry_argnum: the model's own state is what is carried.")
    argnum, wrt = (
        (argnums.argnum, argnums.filter) if isinstance(argnums, nnx.DiffState) else (argnums, nnx.Param)
    )
    if argnum != 0 or isinstance(argnum, bool):
        raise ValueError(
            f"expected the model to come first, argnums=0 or nnx.DiffState(0, ...); got {argnums!r}."
        )
    check_function(loss_fn, "loss_fn")
    data_axes = as_axes(options.get("data_axes"))
    differentiated = nnx.filterlib.to_predicate(wrt)

    def is_diff(path, x):
        return path[0] == 0 and differentiated(path[1:], x)

    def pure_loss_fn(params, *args, **kwargs):
        *args, graphdef, (state, same) = args
        frozen, rngs = same.value
        states = params, frozen, state, _on_this_device(rngs, data_axes)
        model, by_index, by_name = objects = nnx.merge(graphdef, *states, copy=True)
        out = loss_fn(model, *(by_index.get(i, arg) for i, arg in enumerate(args, 1)), **kwargs, **by_name)
        loss, aux = out if has_aux else (out, ())
        _, *new_states = nnx.split(objects, is_diff, *_OTHERS)
        _check_same_variables(states, new_states)
        _, frozen, state, new_rngs = new_states
        if data_axes:
            new_rngs = _keep_keys(rngs, new_rngs)
        return loss, ((state, Replicated((frozen, new_rngs))), aux)

    def from_the_front(argnums):
        indices = as_indices(argnums, "batch_argnums or key_argnum")
        return tuple(i - _APPENDED if i < 0 else i for i in indices)

    batch, key = from_the_front(batch_argnums), () if key_argnum is None else from_the_front(key_argnum)
    pure_grad_fn = optaccum.value_and_grad(
        pure_loss_fn,
        batch_argnums=batch,
        key_argnum=key[0] if key else None,
        carry_argnum=-1,
        has_aux=True,
        **options,
    )

    @functools.wraps(loss_fn, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def grad_fn(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        by_index = {i: arg for i, arg in enumerate(args, 1) if _has_objects(arg)}
        by_name = {name: arg for name, arg in kwargs.items() if _has_objects(arg)}
        if misplaced := by_index.keys() & {i % (1 + len(args) + _APPENDED) for i in (*batch, *key)}:
            raise TypeError(
                f"expected arrays at batch_argnums and JAX keys at key_argnum; argument {min(misplaced)} is an NNX "
                "object. NNX objects, nnx.Rngs too, thread through the micro-batches by themselves."
            )
        objects = (model, by_index, by_name)
        graphdef, params, frozen, state, rngs = nnx.split(objects, is_diff, *_OTHERS)
        args = tuple(None if i in by_index else arg for i, arg in enumerate(args, 1))
        kwargs = {name: arg for name, arg in kwargs.items() if name not in by_name}
        carry = (state, Replicated((frozen, rngs)))
        (loss, ((state, same), aux)), grads, *info = pure_grad_fn(params, *args, graphdef, carry, **kwargs)
        nnx.update(objects, state, *same.value)
        return ((loss, aux) if has_aux else loss, grads[0], *info)

    return grad_fn


def _has_objects(arg: Any) -> bool:
    """Whether a pytree holds NNX objects; a State, which nobody updates in place, is none."""

    def is_leaf(x):
        return isinstance(x, (nnx.Pytree, nnx.Variable, nnx.State))

    leaves = jax.tree.leaves(arg, is_leaf=is_leaf)
    return any(is_leaf(x) and not isinstance(x, nnx.State) for x in leaves)


def _check_same_variables(before: Sequence[nnx.State], after: Sequence[nnx.State]) -> None:
    """Raises, by name, for what the loss adds to the objects or takes away."""
    old, new = (
        {path[1:] for state in states for path, _ in nnx.to_flat_state(state)} for states in (before, after)
    )
    if changed := sorted("/".join(map(str, path)) for path in old ^ new):
        raise TypeError(
            f"expected the loss to leave the NNX objects with the Variables they came with; it adds or removes "
            f"{', '.join(changed)}. Make them before the call; return what is only to be read as aux."
        )


def _on_this_device(rngs: nnx.State, data_axes: tuple[str, ...]) -> nnx.State:
    """The state of the Rngs with keys that each device along the data axes has for itself."""

    def fold(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(x, jax.lax.axis_index(data_axes)) if is_key else x

    return jax.tree.map(fold, rngs) if data_axes else rngs


def _keep_keys(old: nnx.State, new: nnx.State) -> nnx.State:
    """The new counts with the old keys, which are the same on every device."""
    return jax.tree.map(lambda o, n: o if jnp.issubdtype(o.dtype, jax.dtypes.prng_key) else n, old, new)
