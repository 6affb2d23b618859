"""`value_and_grad` over micro-batches."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from optaccum._dtypes import AccumulatorDType
from optaccum._scanning.data_axes import compile_call
from optaccum._scanning.options import make_options
from optaccum._scanning.sharded import leaves_of, place
from optaccum._scanning.whole_batch import whole_batch


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    num_microbatches: int | None = None,
    microbatch_size: int | None = None,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    key_argnum: int | None = None,
    carry_argnum: int | None = None,
    accumulator_dtype: AccumulatorDType = jnp.float32,
    skip_nonfinite: bool = False,
    presplit: bool = False,
    count_argnum: int | None = None,
    data_axes: str | Sequence[str] | None = None,
    param_specs: Any = None,
    gather_dtype: DTypeLike | None = None,
    grad_specs: Any = None,
    shard_sums: bool = False,
    in_place: bool | None = None,
    grad_reduction_fn: Callable[[tuple[Any, ...], Any], str] | None = None,
    return_info: bool = False,
    track_noise_scale: bool = False,
    unroll: int = 1,
) -> Callable[..., Any]:
    r"""`jax.value_and_grad`, one micro-batch at a time: the whole batch's numbers with one micro-batch's activations.

    A compiled `jax.lax.scan` over micro-batches `batch[i::n]`, whose sizes differ by at most one. For a loss that is
    a mean over examples, with :math:`m_i` of them in micro-batch i,

    .. math:: L = \frac{\sum_i m_i L_i}{\sum_i m_i}, \qquad \nabla L = \frac{\sum_i m_i \nabla L_i}{\sum_i m_i};

    for one of :class:`WeightedMean` terms, :math:`L = \sum_t \sum_i T_{t,i} / \sum_i W_{t,i}`.

    Args:
      loss_fn: returns a scalar, the mean over its examples; a :class:`WeightedMean`; or a dict of those, which add
        up, each with its own denominator (then a first pass sums the weights, free where they depend on the batch
        only); with `has_aux` a pair of that and any pytree.
      num_microbatches: n. Exactly one of this, the next and `presplit`.
      microbatch_size: at most this many examples at once, over all devices: n = ceil(batch size / microbatch_size).
      argnums: the positional argument or arguments to differentiate, as in `jax.value_and_grad`.
      batch_argnums: those to split; every leaf leads with the batch axis.
      has_aux: whether `loss_fn` returns (loss, aux). :class:`WeightedMean`, :class:`Sum`, :class:`Max`,
        :class:`Min`, :class:`Last` and :class:`Stack` say how a leaf combines. A bare leaf with one axis that is the
        batch's is concatenated in the batch's order; any other bare float is a mean over examples, under a loss
        that is one too.
      key_argnum: a PRNG key, or a pytree of them; micro-batch i gets `jax.random.fold_in(key, i)`.
      carry_argnum: state threaded from each micro-batch to the next, such as BatchNorm statistics; aux is then
        (new_carry, rest), and no gradient flows along the carry.
      accumulator_dtype: of the sums and of the gradients returned, as for :func:`accumulate`: float32 also for
        parameters in bf16. Initialise a bare optimizer on `optax.tree.cast(params, jnp.float32)` then, or let
        :func:`accumulate` wrap it.
      skip_nonfinite: drop a micro-batch whose loss or gradient is not finite, its weight and its carry with it. Its
        rows stay in concatenations and stacks. All dropped: the value is NaN and the gradients are zero.
      data_axes: mesh axes that the batch is sharded over. `loss_fn` then sees one device's rows of a micro-batch, keys
        are `fold_in(fold_in(key, i), device's index)`, and gradients cross devices once, after the loop. A carry's
        floating leaves are averaged; others must be computed alike on every device. Parameters sharded over these
        axes (FSDP) are gathered once, before the loop, and their gradients leave it reduce-scattered.

        Rarely needed:

      presplit: the micro-batches are the caller's: leaves of the batch have shape (n, size, ...), for rows that
        belong together or are packed. Bare arrays of aux then come back stacked, (n, ...).
      count_argnum: with `presplit`, an int scalar: only the first `count` micro-batches run, in time proportional to
        it, with one program for every count. The loss sees it clipped to [0, n].
      param_specs: `jax.sharding.PartitionSpec`s, a prefix of the differentiated arguments: how these are sharded over
        `data_axes`, and over other axes. None: as concrete arrays and Explicit meshes show; inside `jax.jit` on an
        Auto mesh nothing does, and parameters count as replicated.
      gather_dtype: in which floating parameters, sharded or not, cross and are handed to `loss_fn`, such as bf16.
        Gradients stay as `accumulator_dtype` says.
      grad_specs: how gradients leave; None: as `param_specs`. Given alone, parameters replicated: ZeRO-1.
      shard_sums: reduce each micro-batch's gradient into a sharded sum, where a whole one does not fit.
      in_place: whether the backward pass adds into the one gradient buffer, through `jax.vjp(...).with_refs`. None:
        where it can, and the loss has a `jax.lax.scan`; True: or raise; False: never. Which losses that is, and what
        it saves: the page on memory.
      grad_reduction_fn: (key path, leaf of the differentiated arguments) -> "mean", or "max" for state that its
        gradient carries (FP8 amax histories): the elementwise maximum, in the leaf's own dtype.
      return_info: return an :class:`Info` as one more result. For a window of windows, scanned batches streamed to
        :func:`accumulate`, hand its weight on: `tx.update(grads, state, params, weight=info.weight)`.
      track_noise_scale: fill `Info.noise`.
      unroll: of the scan.

    Returns:
      A function of `loss_fn`'s arguments that returns what `jax.value_and_grad(loss_fn, argnums, has_aux)` returns on
      the whole batch: (value, gradients) or ((value, aux), gradients), then Info if asked for. The value is float32
      or wider. A total weight of zero gives zero value and zero gradients. It is compiled: once for each set of
      shapes and each value of the arguments that are neither arrays nor floats, such as ints, bools and strings.

    Raises:
      ValueError, TypeError: here for options that contradict each other; at the first call for arguments, losses and
        auxiliary outputs that do not fit them. Nothing raises at run time.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaccum
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch["x"] * w - batch["y"]) ** 2)
      >>> batch = {"x": jnp.arange(10.0), "y": jnp.ones(10)}
      >>> loss, grads = optaccum.value_and_grad(loss_fn, num_microbatches=4)(1.0, batch)
      >>> round(float(loss), 4), round(float(grads), 4)
      (20.5, 48.0)
      >>> round(float(jnp.mean((batch["x"] - 1.0) ** 2)), 4)
      20.5
    """
    options = make_options(locals())
    fn = functools.partial(whole_batch, loss_fn, options)

    def where(mesh, _, call):
        diff = call.diff[0] if options.one_argnum else call.diff
        return place(mesh, options.data_axes, leaves_of(diff, param_specs, grad_specs))

    compiled = compile_call(fn, options.roles, options.data_axes, presplit, where)

    @functools.wraps(loss_fn, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def grad_fn(*args: Any, **kwargs: Any) -> Any:
        value, aux, grads, info = compiled(args, kwargs)
        results = ((value, aux) if has_aux else value, grads)
        return (*results, info) if return_info else results

    grad_fn.options = options  # pyright: ignore[reportAttributeAccessIssue]: for `verify`
    return grad_fn


def grad(loss_fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.grad`, one micro-batch at a time; takes the options of :func:`value_and_grad`.

    Args:
      loss_fn: as in :func:`value_and_grad`.
      **options: as there.

    Returns:
      A function of `loss_fn`'s arguments that returns the gradients; (gradients, aux) with `has_aux`; then an
      :class:`Info` with `return_info`.

    Raises:
      ValueError, TypeError: as :func:`value_and_grad`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaccum
      >>> grad_fn = optaccum.grad(lambda w, x: jnp.mean(w * x), microbatch_size=2)
      >>> float(grad_fn(1.0, jnp.arange(5.0)))
      2.0
    """
    grad_fn = value_and_grad(loss_fn, **options)
    has_aux = options.get("has_aux", False)

    @functools.wraps(grad_fn)
    def without_value(*args: Any, **kwargs: Any) -> Any:
        value, grads, *info = grad_fn(*args, **kwargs)
        results = (grads, *((value[1],) if has_aux else ()), *info)
        return results if len(results) > 1 else grads

    return without_value
