"""`flax.nnx.value_and_grad` over micro-batches. The only module that imports Flax."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import optaccum
from optaccum._call import as_indices
from optaccum._data_axes import Replicated, device_index

_OTHERS = (nnx.Not(nnx.RngState), ...)  # how the state that is not differentiated divides
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

    The state of the model that is not differentiated (BatchNorm statistics, the keys and counts of its Rngs, caches)
    threads through the micro-batches in order, and the model is updated with what the last one leaves, as NNX users
    expect of a call. With `data_axes`, floating state is averaged over the devices, each device draws from its own
    keys, and counts advance as they would without.

    Args:
      loss_fn: (model, batch, ...) -> loss, or (loss, aux) with `has_aux`; losses and aux as for
        :func:`optaccum.value_and_grad`.
      argnums: 0, to differentiate the model's `nnx.Param`, or `nnx.DiffState(0, filter)`. The model comes first.
      batch_argnums: the positional argument or arguments to split.
      has_aux: whether `loss_fn` returns (loss, aux).
      key_argnum: as for :func:`optaccum.value_and_grad`.
      **options: the other options of :func:`optaccum.value_and_grad`, but `carry_argnum`: the model is the carry.

    Returns:
      A function of `loss_fn`'s arguments that returns what `nnx.value_and_grad` returns, gradients as an `nnx.State`,
      and updates the model.

    Raises:
      TypeError, ValueError: as :func:`optaccum.value_and_grad`; TypeError for state that changes its structure.

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
    data_axes = options.get("data_axes") or ()
    data_axes = (data_axes,) if isinstance(data_axes, str) else tuple(data_axes)

    def pure_loss_fn(params, *args, **kwargs):
        *args, graphdef, (state, rngs) = args
        model = nnx.merge(graphdef, params, state, _on_this_device(rngs.value, data_axes), copy=True)
        out = loss_fn(model, *args, **kwargs)
        loss, aux = out if has_aux else (out, ())
        _, _, state, new_rngs = nnx.split(model, wrt, *_OTHERS)
        if data_axes:
            new_rngs = _keep_keys(rngs.value, new_rngs)
        return loss, ((state, Replicated(new_rngs)), aux)

    def from_the_front(argnums):
        indices = as_indices(argnums, "batch_argnums or key_argnum")
        return tuple(i - _APPENDED if i < 0 else i for i in indices)

    pure_grad_fn = optaccum.value_and_grad(
        pure_loss_fn,
        batch_argnums=from_the_front(batch_argnums),
        key_argnum=None if key_argnum is None else from_the_front(key_argnum)[0],
        carry_argnum=-1,
        has_aux=True,
        **options,
    )

    @functools.wraps(loss_fn, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def grad_fn(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        graphdef, params, state, rngs = nnx.split(model, wrt, *_OTHERS)
        carry = (state, Replicated(rngs))
        (loss, ((state, rngs), aux)), grads, *info = pure_grad_fn(params, *args, graphdef, carry, **kwargs)
        nnx.update(model, state, rngs.value)
        return ((loss, aux) if has_aux else loss, grads, *info)

    return grad_fn


def _on_this_device(rngs: nnx.State, data_axes: tuple[str, ...]) -> nnx.State:
    """The state of the Rngs with keys that each device along the data axes has for itself."""

    def fold(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(x, device_index(data_axes)) if is_key else x

    return jax.tree.map(fold, rngs) if data_axes else rngs


def _keep_keys(old: nnx.State, new: nnx.State) -> nnx.State:
    """The new counts with the old keys, which are the same on every device."""
    return jax.tree.map(lambda o, n: o if jnp.issubdtype(o.dtype, jax.dtypes.prng_key) else n, old, new)
