"""The whole batch's loss in a micro-batch's memory, for the caller to differentiate."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType
from jax.typing import DTypeLike

from optaccum._dtypes import AccumulatorDType, keep_sharding
from optaccum._scanning import reductions
from optaccum._scanning.call import Call, Layout
from optaccum._scanning.data_axes import compile_call
from optaccum._scanning.loop import Loop, Operands
from optaccum._scanning.micro_loss import MicroLoss, trace_loss
from optaccum._scanning.options import Options, make_options
from optaccum._scanning.sharded import Leaf, Placement, gather, leaves_of, place
from optaccum._scanning.whole_batch import differ, divide_batch, make_sums_of, run_window
from optaccum._varying import lead

PyTree = Any

_NOT_TAKEN = {
    "argnums": ...,
    "skip_nonfinite": False,
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
    param_specs: Any = None,
    gather_dtype: DTypeLike | None = None,
    grad_specs: Any = None,
    shard_sums: bool = False,
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
      data_axes: mesh axes that the batch is sharded over. Arguments that are sharded over them too, as types on
        Explicit meshes show and `param_specs` say, are gathered once, and their gradients come back so.
      param_specs: a prefix of the parameters, the first positional argument that has no role above. On an Auto mesh
        they are needed: arrays do not show their sharding where they are differentiated.
      gather_dtype: in which floating parameters cross and are handed to `loss_fn`.
      grad_specs: how the parameters' gradients come back; a prefix like `param_specs`.
      shard_sums: reduce each micro-batch's gradient into a sharded sum.
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

    def where(mesh, layout, call):
        placement = place(mesh, options.data_axes, _leaves(options, layout, call)[0])
        if placement.params != placement.grads and AxisType.Explicit in mesh.axis_types:
            raise ValueError(
                "expected no grad_specs on a mesh with Explicit axes, where JAX gives a gradient the sharding of its "
                "argument; got some that differ. Use optaccum.value_and_grad, or an Auto mesh."
            )
        return placement

    fn = functools.partial(_whole_batch, loss_fn, options)
    compiled = compile_call(fn, options.roles, options.data_axes, presplit, where)

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


def _leaves(options: Options, layout: Layout, call: Call) -> tuple[list[Leaf], list[Any]]:
    """The arrays of `call.rest`, and the dtype in which each crosses.

    What the options say is meant for the parameters: the first positional argument with an array.
    """
    arrays = iter(call.rest)
    values = [jnp.asarray(next(arrays)) if other is None else other[1] for other in layout.others]
    tree = jax.tree.unflatten(layout.structure, values)

    def leaves(param_specs, grad_specs):
        found = leaves_of(tree, param_specs, grad_specs)
        return [leaf for leaf, other in zip(found, layout.others, strict=True) if other is None]

    first = next((leaf.path[1].idx for leaf in leaves(None, None) if leaf.path[0].idx == 0), None)

    def prefix(specs):
        return [specs if i == first else None for i in range(layout.num_args)], None

    found = leaves(prefix(options.param_specs), prefix(options.grad_specs))
    is_param = [leaf.path[0].idx == 0 and leaf.path[1].idx == first for leaf in found]
    return found, [options.gather_dtype if own else None for own in is_param]


def _whole_batch(
    loss_fn: Callable[..., Any], options: Options, layout: Layout, placement: Placement | None, call: Call
) -> tuple[jax.Array, PyTree]:
    """The value and aux; where somebody differentiates them, the gradients are made in the forward pass."""
    leaves, dtypes = _leaves(options, layout, call)
    # JAX adds up what differs between devices, in someone's own `shard_map`, where it becomes so: once, here.
    call = call._replace(diff=differ([leaf.value for leaf in leaves], call), rest=[])
    losses, closed = _look(loss_fn, options, layout, placement, dtypes, call)
    closed = differ(closed, call)
    paths = [leaf.path[2:] for leaf in leaves] + [()] * len(closed)  # in the argument; of a closure none
    dtypes = dtypes + [None] * len(closed)
    if placement is not None:
        placement = placement.beside(closed)

    def window(call, chosen, of_rows):
        """(value, aux), and the gradients of those chosen in `call.diff`, then in its batch; False for the others."""

        def some(xs):
            return [x for x, is_chosen in zip(xs, chosen, strict=True) if is_chosen]

        own = placement and placement.of_gradients(chosen)
        sums_of = make_sums_of(options, some(zip(paths, call.diff, strict=True)), own)

        def one_device(groups, call):
            shared = call.diff if own is None else gather(call.diff, own, dtypes)
            fixed = [None if is_chosen else x for x, is_chosen in zip(shared, chosen, strict=True)]
            loop = Loop(losses, sums_of, False, False, options.unroll, of_rows)
            consts = [fixed] * len(groups)
            operands = Operands(some(shared), groups, call.key, call.carry, consts, call.limit, None)
            return run_window(options, loop, operands, operands.diff)

        (value, aux, grads, _), (rows, row_grads) = divide_batch(one_device, options, own, call)
        if options.presplit:
            row_grads = [x.swapaxes(0, 1) for x in row_grads]
        grads = iter([*grads, *row_grads])
        # Not None, and batched as the value is: JAX would take one call's residuals by the structure or the batch axes
        # of another, where what is chosen differs (of the kind of https://github.com/jax-ml/jax/issues/16614).
        grads = [next(grads) if c else jnp.bool_(False) for c in (*chosen, *of_rows)]
        grads = [lax.select(value == value, g, g) for g in grads]
        return lead(((value, reductions.merge_aux(aux, rows)), grads))

    @jax.custom_vjp
    def value_of(shared, batch, others):
        return window(others._replace(diff=shared, batch=batch), [False] * len(shared), ())[0]

    def forward(*operands):
        shared, batch, others = jax.tree.map(lambda x: x.value, operands)
        chosen, of_rows = ([x.perturbed for x in jax.tree.leaves(tree)] for tree in operands[:2])
        return window(others._replace(diff=shared, batch=batch), chosen, tuple(of_rows))

    def backward(grads, cotangents):
        scale, _ = cotangents
        if isinstance(scale, SymbolicZero):
            return None, None, None
        pairs = zip(grads, likes, strict=True)
        scaled = [None if g.dtype == jnp.bool_ else keep_sharding((g * scale).astype(x.dtype), x) for g, x in pairs]
        return scaled[:num_shared], structure.unflatten(scaled[num_shared:]), None

    shared, (rows, structure) = [*call.diff, *closed], jax.tree.flatten(call.batch)
    # `backward` outlives the tracers.
    likes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.typeof(x).sharding) for x in (*shared, *rows)]
    num_shared = len(shared)
    value_of.defvjp(forward, backward, symbolic_zeros=True)
    return value_of(shared, call.batch, call._replace(diff=(), batch=()))


def _look(
    loss_fn: Callable[..., Any],
    options: Options,
    layout: Layout,
    placement: Placement | None,
    dtypes: list[Any],
    call: Call,
) -> tuple[list[MicroLoss], list[Any]]:
    """The loss as traced on one device's micro-batches, as `_of_shared` says, and what it closes over.

    That may be differentiated too, and is the same for micro-batches of each size. `call.diff` is all of the rest.
    """
    found = []  # not the loss before it was traced, which holds tracers

    def one_device(groups, call):
        diff = call.diff if placement is None else gather(call.diff, placement, dtypes)
        traced = trace_loss(loss_fn, options, layout, groups, lambda diff: call._replace(diff=(), rest=diff), diff)
        found[:] = traced[1:]
        return (jnp.float32(0), (), [], ()), ()

    bare = placement and placement.of_gradients([False] * len(call.diff))
    jax.eval_shape(functools.partial(divide_batch, one_device, options, bare), call)
    losses, consts = found
    closed = list({id(x): x for own in consts for x in own}.values())
    where = [[next(i for i, y in enumerate(closed) if y is x) for x in own] for own in consts]
    return [_of_shared(loss, at, len(call.diff)) for loss, at in zip(losses, where, strict=True)], closed


def _of_shared(loss: MicroLoss, where: list[int], num_diff: int) -> MicroLoss:
    """The loss whose operands are chosen among shared leaves: (those that are not chosen, those that are, ...)."""

    def call(fixed, some, *args):
        chosen = iter(some)
        shared = [next(chosen) if x is None else x for x in fixed]
        diff, closed = shared[:num_diff], shared[num_diff:]
        return loss.traced.call([closed[i] for i in where], diff, *args)

    return loss._replace(traced=loss.traced._replace(call=call))


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
