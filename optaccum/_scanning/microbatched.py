"""The whole batch's loss in a micro-batch's memory, for the caller to differentiate."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from optaccum._dtypes import AccumulatorDType, accumulator_dtype_of
from optaccum._scanning import reductions
from optaccum._scanning.call import Call, Layout
from optaccum._scanning.data_axes import compile_call
from optaccum._scanning.loop import Loop, Operands, SumOf, choose_form, run_loop
from optaccum._scanning.micro_loss import MicroLoss, as_it_came, trace_loss
from optaccum._scanning.options import Options, make_options
from optaccum._scanning.split import Group
from optaccum._scanning.whole_batch import across, cotangents_of, divide_batch, finish, finish_aux

PyTree = Any

_NOT_TAKEN = {
    "argnums": None,
    "skip_nonfinite": False,
    "param_specs": None,
    "gather_dtype": None,
    "grad_specs": None,
    "shard_sums": False,
    "grad_reduction_fn": None,
    "return_info": False,
    "track_noise_scale": False,
}


def microbatched(
    loss_fn: Callable[..., Any],
    *,
    num_microbatches: int | None = None,
    microbatch_size: int | None = None,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    key_argnum: int | None = None,
    carry_argnum: int | None = None,
    accumulator_dtype: AccumulatorDType = jnp.float32,
    presplit: bool = False,
    count_argnum: int | None = None,
    data_axes: str | Sequence[str] | None = None,
    in_place: bool | None = None,
    unroll: int = 1,
) -> Callable[..., Any]:
    """The loss of the whole batch in the memory of a micro-batch, differentiable by whatever you use.

    By `jax.grad` with any argnums, `jax.value_and_grad`, `eqx.filter_value_and_grad`, or
    `optax.value_and_grad_from_state`: reverse mode, of any order. Differentiated once it costs what
    :func:`value_and_grad` costs: the gradient is made in the forward pass, micro-batch by micro-batch, and scaled by
    the cotangent in the backward pass. Not differentiated, it makes none. Sums are float32; gradients are rounded
    once, to the dtype of what they are of. For float32 gradients of 16-bit parameters, `skip_nonfinite` and the noise
    scale use :func:`value_and_grad`.

    A loss scale for 16-bit gradients stands inside `loss_fn`, as an argument: `scale * loss`. From outside, as Flax'
    `DynamicScale` applies it, it would come after the gradients underflowed.

    Args:
      loss_fn: as for :func:`value_and_grad`, and so are all options.
      num_microbatches: exactly one of this, the next and `presplit`.
      microbatch_size: at most this many examples at once.
      batch_argnums: the positional argument or arguments to split.
      has_aux: whether `loss_fn` returns (loss, aux). Aux is not differentiated.
      key_argnum: a PRNG key, or a pytree of them.
      carry_argnum: state threaded from each micro-batch to the next.
      accumulator_dtype: of the sums.
      presplit: the micro-batches are the caller's.
      count_argnum: with `presplit`, how many of them run.
      data_axes: mesh axes that the batch is sharded over. Arguments that are sharded over them too are gathered, and
        their gradients come back whole: :func:`value_and_grad` leaves those sharded.
      in_place: whether the backward pass adds into the one gradient buffer.
      unroll: of the scan.

    Returns:
      A function of `loss_fn`'s arguments that returns the scalar that the loss stands for on the whole batch, float32
      or wider, or (scalar, aux). Leaves of the arguments that are not arrays pass through.

    Raises:
      ValueError, TypeError: as :func:`value_and_grad`; TypeError for forward mode, and for aux that is differentiated.

    Example:
      >>> import jax, jax.numpy as jnp, optaccum
      >>> loss = optaccum.microbatched(lambda w, x: jnp.mean((w * x) ** 2), num_microbatches=3)
      >>> x = jnp.arange(6.0)
      >>> round(float(loss(2.0, x)), 3), round(float(jax.grad(loss)(2.0, x)), 3)
      (36.667, 36.667)
    """
    options = make_options(locals() | _NOT_TAKEN)
    compiled = compile_call(
        functools.partial(_whole_batch, loss_fn, options), options.roles, options.data_axes, presplit
    )

    @functools.wraps(loss_fn, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def loss(*args: Any, **kwargs: Any) -> Any:
        try:
            value, aux = compiled(args, kwargs)
        except TypeError as error:
            if "forward-mode" in str(error):
                error.add_note(
                    "optaccum.microbatched has reverse mode alone. Forward mode goes through the gradient that "
                    "optaccum.value_and_grad makes, or through the loss on one micro-batch at a time."
                )
            raise
        return (value, jax.tree.map(_refuse_derivative, aux)) if has_aux else value

    return loss


def _whole_batch(
    loss_fn: Callable[..., Any], options: Options, layout: Layout, mesh: Any, call: Call
) -> tuple[jax.Array, PyTree]:
    def one_device(groups, call):
        return _one_device(loss_fn, options, layout, groups, call)

    (value, aux), rows = divide_batch(one_device, options, mesh, call)
    return value, reductions.merge_aux(aux, rows)


def _one_device(
    loss_fn: Callable[..., Any], options: Options, layout: Layout, groups: list[Group], call: Call
) -> tuple[tuple[jax.Array, PyTree], PyTree]:
    """The value and aux from one device's rows; the aux that leads with rows comes separately."""
    rest = [jnp.asarray(x) for x in call.rest]
    places = [i for i, x in enumerate(rest) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def with_diff(diff):
        new = dict(enumerate(rest)) | dict(zip(places, diff, strict=True))
        return call._replace(rest=[new[i] for i in range(len(rest))])

    diff = [rest[i] for i in places]
    _, losses, consts = trace_loss(loss_fn, options, layout, groups, with_diff, diff)
    # What the loss closes over may be differentiated too, and is the same for micro-batches of each size.
    shared = list({id(x): x for x in [*diff, *(x for own in consts for x in own)]}.values())
    where = [[next(i for i, y in enumerate(shared) if y is x) for x in [*diff, *own]] for own in consts]
    losses = [_of_shared(loss, at, len(diff)) for loss, at in zip(losses, where, strict=True)]
    sum_dtypes = _sum_dtypes(options, layout, places, shared)
    limit = None if layout.roles.limit is None else jnp.clip(call.limit, 0, groups[0].count)

    def window(operands, chosen, of_rows):
        """The outputs, and the gradients of the leaves chosen among `shared` and among the rows; None for others."""
        shared, groups, key, carry, limit = operands
        some = [x for x, is_chosen in zip(shared, chosen, strict=True) if is_chosen]
        fixed = [None if is_chosen else x for x, is_chosen in zip(shared, chosen, strict=True)]
        sums_of = [SumOf(d) for d, is_chosen in zip(sum_dtypes, chosen, strict=True) if is_chosen]
        loop = Loop(losses, sums_of, False, False, options.unroll, of_rows)
        loop_operands = Operands(some, groups, key, carry, [fixed] * len(groups), limit, cotangents=None)
        in_place = bool(some) and choose_form(options.in_place, loop, loop_operands)
        if len(losses[0].structs[0]) > 1:
            loop_operands = loop_operands._replace(cotangents=cotangents_of(options, loop, loop_operands))
        sums, outputs = run_loop(loop, None, loop_operands, in_place)
        row_grads = [
            x.swapaxes(0, 1) if group.axis else x
            for group, output in zip(groups, outputs, strict=True)
            for x in output.row_grads
        ]
        own = [
            *sums.grads,
            *row_grads,
        ]  # they cross devices as cotangents: JAX sums those of what is replicated
        sums = sums._replace(grads=[])
        sums = (across(sums, [], options) if options.data_axes else sums)._replace(grads=own)
        sums_of = [*sums_of, *(SumOf(x.dtype) for x in row_grads)]
        value, own, _ = finish(sums, options, sums_of, in_place, max(group.size for group in groups))
        sums = sums._replace(carry=as_it_came(losses, carry, sums.carry))
        aux, rows = finish_aux(sums, outputs, options)
        grads = iter(own)
        return ((value, aux), rows), [next(grads) if c else None for c in (*chosen, *of_rows * len(groups))]

    @jax.custom_vjp
    def value_of(*operands):
        return window(operands, [False] * len(operands[0]), ())[0]

    def forward(*primals):
        operands = jax.tree.map(lambda x: x.value, primals)
        chosen, groups = jax.tree.map(lambda x: x.perturbed, primals[:2])
        of_rows = tuple(any(same) for same in zip(*map(jax.tree.leaves, groups), strict=True))
        return window(operands, chosen, of_rows)

    def backward(grads, cotangents):
        (scale, _), _ = cotangents
        if isinstance(scale, SymbolicZero):
            return (None,) * 5
        if options.data_axes:  # which `shard_map` has divided among the devices
            scale = scale * lax.axis_size(options.data_axes)
        of_all = zip(grads, dtypes, strict=True)
        scaled = [None if g is None else (g * scale).astype(dtype) for g, dtype in of_all]
        return scaled[:num_shared], jax.tree.unflatten(structure, scaled[num_shared:]), None, None, None

    structure, num_shared = jax.tree.structure(groups), len(shared)
    dtypes = [x.dtype for x in jax.tree.leaves((shared, groups))]
    value_of.defvjp(forward, backward, symbolic_zeros=True)
    return value_of(shared, groups, call.key, call.carry, limit)


def _of_shared(loss: MicroLoss, where: list[int], num_diff: int) -> MicroLoss:
    """The loss whose operands are chosen among shared leaves: (those that are not chosen, those that are, ...)."""

    def call(fixed, some, *args):
        chosen = iter(some)
        shared = [next(chosen) if x is None else x for x in fixed]
        own = [shared[i] for i in where]
        return loss.traced.call(own[num_diff:], own[:num_diff], *args)

    return loss._replace(traced=loss.traced._replace(call=call))


def _sum_dtypes(options: Options, layout: Layout, places: list[int], shared: list[jax.Array]) -> list[Any]:
    """The dtype that each leaf's gradient is summed in."""
    arguments = jax.tree.unflatten(layout.structure, range(len(layout.others)))
    paths = [path for path, i in jax.tree_util.tree_leaves_with_path(arguments) if layout.others[i] is None]
    paths = [paths[i][2:] for i in places] + [()] * (
        len(shared) - len(places)
    )  # in the argument; of a closure none
    return [accumulator_dtype_of(options.accumulator_dtype, p, x) for p, x in zip(paths, shared, strict=True)]


def _refuse_derivative(x: jax.Array) -> jax.Array:
    """x, which raises where somebody differentiates it: its derivative is not made, and zeros would be wrong."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return x

    def backward(_, cotangent):
        if not isinstance(cotangent, SymbolicZero):
            raise TypeError(
                "expected no derivative of the aux of optaccum.microbatched; got one. Make it a term of the loss, in a "
                "dict of optaccum.WeightedMean, or compute it with optaccum.chunked."
            )
        return (None,)

    same = jax.custom_vjp(lambda x: x)
    same.defvjp(lambda x: (x.value, None), backward, symbolic_zeros=True)
    return same(x)
