"""NNX in its own form: `flax.nnx.value_and_grad` over micro-batches, and `nnx.Optimizer.update` in place."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax import nnx

import optaccum
from optaccum._checks import check_flag, check_function
from optaccum._scanning.call import Roles, as_indices, make_roles, resolve_roles
from optaccum._scanning.data_axes import as_axes

_APPENDED = 2  # positional arguments that the pure form has after the user's: the graph and the carried state
_BARE = ""  # the name under which the pure form holds a Variable that is itself an argument

# For each NNX object of a call: its place among the leaves of the arguments, and the argnum of which it is a part.
_Places = tuple[tuple[int, int | None], ...]


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    key_argnum: int | None = None,
    count_argnum: int | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """`flax.nnx.value_and_grad`, one micro-batch at a time.

    The state that is not differentiated (BatchNorm statistics, the keys and counts of Rngs, caches, metrics), of every
    NNX object among the arguments, threads through the micro-batches in order, and the objects are updated with what
    the last one leaves, as NNX users expect of a call. What the loss sows (`nnx.Intermediate`) ends in the objects as
    the same leaves in aux would come back, in place of what was sown before the call. Python attributes that the loss
    sets are not kept: keep what changes in an `nnx.Variable`. Nor is what it writes into what is differentiated (as
    `nnx.WeightNorm` does): every micro-batch gets the call's parameters. With `data_axes`, the floating state that
    the loss changes is averaged over the devices, each device draws from its own keys, and counts advance as they would
    without.

    Args:
      loss_fn: (model, batch, ...) -> loss, or (loss, aux) with `has_aux`; losses and aux as for
        :func:`optaccum.value_and_grad`. An `nnx.Rngs`, metrics or a second model may be among the arguments.
      argnums: what to differentiate: of each of these arguments the `nnx.Param`, or with `nnx.DiffState(i, filter)`
        what the filter names. Arrays that stand beside the objects in one are differentiated too.
      batch_argnums: the positional argument or arguments to split.
      has_aux: whether `loss_fn` returns (loss, aux).
      key_argnum: a JAX key, as for :func:`optaccum.value_and_grad`; an `nnx.Rngs` needs no mention.
      count_argnum: as there.
      **options: the other options of :func:`optaccum.value_and_grad`, but `carry_argnum`: the objects are the carry.

    Returns:
      A function of `loss_fn`'s arguments that returns what `nnx.value_and_grad` returns, gradients as an `nnx.State`
      where an object was (a tuple for a sequence of `argnums`), and updates the objects.

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
        raise TypeError("expected no carry_argnum: the objects' own state is what is carried.")
    check_function(loss_fn, "loss_fn")
    check_flag(has_aux, "has_aux")
    filters, one_argnum = _filters(argnums), not isinstance(argnums, Iterable)
    roles = make_roles(tuple(filters), batch_argnums, key_argnum, count_argnum=count_argnum)
    data_axes = as_axes(options.get("data_axes"))

    def pure_loss_fn(*args, **kwargs):
        *args, (graphdef, places), (keys, state) = args
        leaves, structure = jax.tree.flatten((tuple(args), kwargs), is_leaf=_is_leaf)
        params = nnx.State({n: _unbox(leaves[i]) for n, (i, _) in enumerate(places)})
        own_keys = keys  # of this device, where others have rows of their own
        if data_axes:
            own_keys = jax.tree.map(lambda key: jax.random.fold_in(key, jax.lax.axis_index(data_axes)), keys)
        objects = nnx.merge(graphdef, params, own_keys, state, copy=True)
        args, kwargs = jax.tree.unflatten(structure, _replace(leaves, places, objects))
        out = loss_fn(*args, **kwargs)
        loss, aux = out if has_aux else (out, ())
        is_diff = _differentiated(filters, places)
        sown = _pop_sown(objects, is_diff)
        _, *new_states = nnx.split(objects, is_diff, nnx.RngKey, ...)
        _check_same_variables((params, keys, state), new_states)
        _, new_keys, new_state = new_states
        return loss, ((keys if data_axes else new_keys, new_state), (sown, aux))

    pure_grad_fn = optaccum.value_and_grad(
        pure_loss_fn,
        argnums=_shift(roles.diff[0]) if one_argnum else tuple(map(_shift, roles.diff)),
        batch_argnums=tuple(map(_shift, roles.batch)),
        key_argnum=_shift(roles.key),
        count_argnum=_shift(roles.limit),
        carry_argnum=-1,
        has_aux=True,
        **options,
    )

    @functools.wraps(loss_fn, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def grad_fn(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_leaf)
        places = _find_objects(args, kwargs, roles)
        objects, is_diff = [leaves[i] for i, _ in places], _differentiated(filters, places)
        _pop_sown(objects, is_diff)
        graphdef, params, keys, state = nnx.split(objects, is_diff, nnx.RngKey, ...)
        pure = [_box(params.get(n, nnx.State({}))) for n in range(len(objects))]
        args, kwargs = jax.tree.unflatten(structure, _replace(leaves, places, pure))
        (loss, (carry, (sown, aux))), grads, *info = pure_grad_fn(*args, (graphdef, places), (keys, state), **kwargs)
        nnx.update(objects, *carry, sown)
        grads = jax.tree.map(_unbox, grads, is_leaf=_is_leaf)
        return ((loss, aux) if has_aux else loss, grads, *info)

    return grad_fn


def apply_gradients(
    optimizer: nnx.Optimizer,
    model: Any,
    grads: Any,
    *,
    weight: jax.typing.ArrayLike | None = None,
    denominator: jax.typing.ArrayLike | None = None,
    emit: jax.typing.ArrayLike | None = None,
    **extra_args: Any,
) -> None:
    """`nnx.Optimizer.update` through :func:`optaccum.apply_gradients`: one micro-step, in place.

    The model and the optimizer are updated as `optimizer.update(model, grads)` does it, `optimizer.step` counts calls.
    For an optimizer whose transformation `optaccum.accumulate` made there are no zero updates in between: parameters
    and optimizer state are touched only by the call that ends a window, and then in place where they are donated, as
    by `nnx.jit(step, donate_argnums=(0, 1))` for a step of (model, optimizer, ...). Compute the gradients inside it
    too: an argument that is not donated cannot be overwritten.

    Args:
      optimizer: of any Optax transformation, and any `wrt`, such as `nnx.LoRAParam`.
      model: the module that it was made for.
      grads: gradients of one micro-batch, as `nnx.grad` gives them; those outside `optimizer.wrt` are not looked at.
      weight: scalar; see :func:`optaccum.accumulate`. Handed on only if given, as the next two.
      denominator: scalar; likewise.
      emit: scalar; likewise.
      **extra_args: as for `optimizer.update`.

    Raises:
      TypeError, ValueError: as :func:`optaccum.apply_gradients`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaccum.nnx
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optaccum.accumulate(optax.sgd(1.0), 2), wrt=nnx.Param)
      >>> @nnx.jit(donate_argnums=(0, 1))
      ... def step(model, optimizer, x):
      ...     grads = nnx.grad(lambda model: jnp.mean(model(x)))(model)
      ...     optaccum.nnx.apply_gradients(optimizer, model, grads)
      >>> for _ in range(4):
      ...     step(model, optimizer, jnp.ones((8, 3)))
      >>> int(optimizer.step[...]), model.bias[...].tolist()
      (4, [-2.0])
    """
    params, grads = (nnx.as_pure(nnx.state(x, optimizer.wrt, graph=optimizer.graph)) for x in (model, grads))
    extra_args |= {"weight": weight, "denominator": denominator, "emit": emit}
    params, opt_state = optaccum.apply_gradients(
        optimizer.tx, grads, nnx.as_pure(optimizer.opt_state), params, **nnx.as_pure(extra_args)
    )
    nnx.update(model, params)
    nnx.update(optimizer.opt_state, nnx.state(opt_state, graph=optimizer.graph))
    optimizer.step[...] += 1


def _filters(argnums: Any) -> dict[int, Callable[..., bool]]:
    """What to differentiate of each argument, as a function of (path in the object, Variable)."""
    argnums = tuple(argnums) if isinstance(argnums, Iterable) else (argnums,)
    states = [x if isinstance(x, nnx.DiffState) else nnx.DiffState(x, nnx.Param) for x in argnums]
    indices = as_indices([state.argnum for state in states], "argnums")
    resolve_roles(Roles(indices, batch=()))
    return {i: nnx.filterlib.to_predicate(state.filter) for i, state in zip(indices, states, strict=True)}


def _shift(argnum: Any) -> Any:
    """An argument's index in the pure form's call; None for none."""
    return argnum if argnum is None or argnum >= 0 else argnum - _APPENDED


def _box(x: nnx.State | nnx.Variable) -> nnx.State:
    """The state of an object as a State, also where the object is a Variable."""
    return nnx.State({_BARE: x}) if isinstance(x, nnx.Variable) else x


def _unbox(x: Any) -> Any:
    return x[_BARE] if isinstance(x, nnx.State) and _BARE in x else x


def _is_leaf(x: Any) -> bool:
    """Whether this is an NNX object, or a State, which nobody updates in place."""
    return isinstance(x, nnx.Pytree | nnx.Variable | nnx.State)


def _find_objects(args: tuple[Any, ...], kwargs: dict[str, Any], roles: Roles) -> _Places:
    """The places of the NNX objects in a call, those to differentiate first: what others share with them is theirs."""
    found = resolve_roles(roles, len(args))
    argnums = dict(zip(found.diff, roles.diff, strict=True))
    places = []
    for i, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path((args, kwargs), is_leaf=_is_leaf)):
        if not _is_leaf(x) or isinstance(x, nnx.State):
            continue
        index = path[1].idx if path[0].idx == 0 else -1  # -1: a keyword argument
        if index in (*found.batch, found.key, found.limit):
            raise TypeError(
                "expected arrays at batch_argnums, JAX keys at key_argnum and a count at count_argnum; argument "
                f"{index} is an NNX object. NNX objects, nnx.Rngs too, thread through the micro-batches by themselves."
            )
        places.append((i, argnums.get(index)))
    return tuple(sorted(places, key=lambda place: place[1] is None))


def _replace(leaves: list[Any], places: _Places, values: Sequence[Any]) -> list[Any]:
    """The leaves of a call, with others in the places of its objects."""
    leaves = list(leaves)
    for (i, _), value in zip(places, values, strict=True):
        leaves[i] = value
    return leaves


def _differentiated(filters: dict[int, Callable[..., bool]], places: _Places) -> Callable[[Any, Any], bool]:
    """Whether a Variable is differentiated, by its path in the list of a call's objects."""

    def is_diff(path, x):
        argnum = places[path[0]][1]
        return argnum is not None and (len(path) == 1 or filters[argnum](path[1:], x))

    return is_diff


def _pop_sown(objects: list[Any], is_diff: Callable[[Any, Any], bool]) -> nnx.State:
    """Takes what has been sown out of the objects, but for what is differentiated."""
    return nnx.pop(objects, nnx.All(nnx.Intermediate, nnx.Not(is_diff)))


def _check_same_variables(before: Sequence[nnx.State], after: Sequence[nnx.State]) -> None:
    """Raises, by name, for what the loss adds to the objects or takes away."""
    old, new = ({path[1:] for state in states for path, _ in nnx.to_flat_state(state)} for states in (before, after))
    if changed := sorted("/".join(map(str, path)) for path in old ^ new):
        raise TypeError(
            f"expected the loss to leave the NNX objects with the Variables they came with; it adds or removes "
            f"{', '.join(changed)}. Make them before the call; return what is only to be read as aux, or sow it as "
            "nnx.Intermediate; take away with nnx.pop, before the call, what it would remove."
        )
