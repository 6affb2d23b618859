"""One call's arguments, each by its role."""

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaccum._checks import check_no_nnx_objects

PyTree = Any


class Roles(NamedTuple):
    """Which positional arguments play which part; indices as the user gave them."""

    diff: tuple[int, ...]
    batch: tuple[int, ...]
    key: int | None = None
    carry: int | None = None
    limit: int | None = None  # count_argnum


class Call(NamedTuple):
    """A call's arrays by role, and all that is not an array."""

    diff: tuple[PyTree, ...]
    batch: tuple[PyTree, ...]
    key: PyTree
    carry: PyTree
    limit: PyTree  # shape=(), int32, >= 0: of the micro-batches to run
    rest: list[jax.Array | float]  # the arrays among the other positional and the keyword arguments


class Layout(NamedTuple):
    """What is static of a call; hashable."""

    roles: Roles
    num_args: int
    structure: Any
    others: tuple[Any, ...]  # (type, value) of what is not an array, None for each array


def as_indices(argnums: int | Sequence[int], name: str, *, one: bool = False) -> tuple[int, ...]:
    """An int, or unless it is to be `one` a sequence of ints, as a tuple."""
    try:
        indices: tuple[Any, ...] = tuple(argnums) if isinstance(argnums, Iterable) and not one else (argnums,)
        if indices and not any(isinstance(i, bool | Iterable) for i in indices):  # an array may be an index as well
            return tuple(map(operator.index, indices))
    except TypeError:
        pass
    kinds = "an int" if one else "an int or a non-empty sequence of ints"
    raise TypeError(f"expected {name} to be {kinds}; got {argnums!r}.")


def make_roles(
    argnums: Any, batch_argnums: Any, key_argnum: Any = None, carry_argnum: Any = None, count_argnum: Any = None
) -> Roles:
    """The roles that these options give; raises for what is no index, or has two roles already. `...`: nothing is."""
    rest = {"key_argnum": key_argnum, "carry_argnum": carry_argnum, "count_argnum": count_argnum}
    return resolve_roles(
        Roles(
            () if argnums is ... else as_indices(argnums, "argnums"),
            as_indices(batch_argnums, "batch_argnums"),
            *(None if index is None else as_indices(index, name, one=True)[0] for name, index in rest.items()),
        )
    )


def split_call(roles: Roles, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Layout]:
    """Sorts a call's arguments by role.

    Raises:
      ValueError: where an index is out of range, or one argument has two roles.
      TypeError: where an argument is not what its role takes, or can be neither traced nor looked up.
    """
    roles = resolve_roles(roles, len(args))
    check_no_nnx_objects((args, kwargs))
    by_role = {*roles.diff, *roles.batch, roles.key, roles.carry, roles.limit}
    others = [None if i in by_role else arg for i, arg in enumerate(args)]
    leaves, structure = jax.tree.flatten((others, kwargs))

    def arrays(index):
        return jax.tree_util.tree_map_with_path(functools.partial(_as_array, index), args[index])

    call = Call(
        diff=tuple(map(arrays, roles.diff)),
        batch=tuple(map(arrays, roles.batch)),
        key=() if roles.key is None else arrays(roles.key),
        carry=() if roles.carry is None else jax.tree.map(_strongly_typed, arrays(roles.carry)),
        limit=() if roles.limit is None else _as_count(args[roles.limit]),
        rest=[leaf for leaf in leaves if _is_traced(leaf)],
    )
    # 1, 1.0 and True are equal and hash alike; a program traced for one is not right for the others.
    static = tuple(None if _is_traced(leaf) else (type(leaf), leaf) for leaf in leaves)
    try:
        hash(static)
    except TypeError:
        _raise_unhashable(others, kwargs)
    return call, Layout(roles, len(args), structure, static)


def join_call(layout: Layout, call: Call) -> tuple[list[Any], dict[str, Any]]:
    """The inverse of `split_call`: positional and keyword arguments."""
    arrays, roles = iter(call.rest), layout.roles
    leaves = [next(arrays) if other is None else other[1] for other in layout.others]
    args, kwargs = jax.tree.unflatten(layout.structure, leaves)
    indices = (*roles.diff, *roles.batch, roles.key, roles.carry, roles.limit)
    values = (*call.diff, *call.batch, call.key, call.carry, call.limit)
    for i, value in zip(indices, values, strict=True):
        if i is not None:
            args[i] = value
    return args, kwargs


def fold_in(key: PyTree, index: jax.Array) -> PyTree:
    """`jax.random.fold_in` for each key of a pytree, with an error that names the argument."""

    def fold(key):
        try:
            return jax.random.fold_in(key, index)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"expected single PRNG keys at key_argnum, such as jax.random.key(0); got shape {key.shape} and dtype "
                f"{key.dtype}. Keys for each example, as jax.random.split gives them, go into the batch."
            ) from error

    return jax.tree.map(fold, key)


def resolve_roles(roles: Roles, num_args: int | None = None) -> Roles:
    """Indices into `num_args` arguments; before there are any, as given.

    Raises:
      ValueError: where an index is out of range, or one argument has two roles.
    """
    owner: dict[int, str] = {}

    def resolve(i, name):
        index = i + num_args if i < 0 and num_args is not None else i
        if num_args is not None and not 0 <= index < num_args:
            closed = " A batch that the loss closes over has to become an argument of it." if "batch" in name else ""
            raise ValueError(
                f"expected {name} within the call's {num_args} positional arguments, counted from 0; got {i}. Pass "
                f"that argument by position, or give another {name}.{closed}"
            )
        if index in owner:
            raise ValueError(
                f"expected each argument to have one role; argument {index} has two, {owner[index]} and {name}."
            )
        owner[index] = name
        return index

    return Roles(
        tuple(resolve(i, "argnums") for i in roles.diff),
        tuple(resolve(i, "batch_argnums") for i in roles.batch),
        None if roles.key is None else resolve(roles.key, "key_argnum"),
        None if roles.carry is None else resolve(roles.carry, "carry_argnum"),
        None if roles.limit is None else resolve(roles.limit, "count_argnum"),
    )


def _is_traced(x: Any) -> bool:
    is_array = isinstance(x, jax.Array) or (isinstance(x, np.ndarray | np.generic) and x.dtype.kind not in "OSU")
    return is_array or isinstance(x, float | complex)


def _as_array(index: int, path: tuple[Any, ...], x: Any) -> jax.Array:
    if _is_traced(x) or isinstance(x, bool | int):
        return jnp.asarray(x)
    try:
        return jnp.asarray(x)  # what knows __jax_array__, or a dtype of its own
    except TypeError as error:
        name = f"argument {index}{jax.tree_util.keystr(path)}"
        raise TypeError(
            f"expected {name} to be an array; got {type(x).__name__}. Split off what is not (eqx.partition, "
            "jax.tree_util.Partial) and close over it."
        ) from error


def _as_count(x: Any) -> jax.Array:
    count = jnp.asarray(x)
    if count.shape != () or not jnp.issubdtype(count.dtype, jnp.integer):
        raise TypeError(f"expected an integer scalar at count_argnum; got shape {count.shape} and dtype {count.dtype}.")
    return jnp.clip(count, 0, min(jnp.iinfo(count.dtype).max, jnp.iinfo(jnp.int32).max)).astype(jnp.int32)


def _strongly_typed(x: jax.Array) -> jax.Array:
    return jax.lax.convert_element_type(x, x.dtype) if jnp.issubdtype(x.dtype, jnp.number) else x


def _raise_unhashable(args: list[Any], kwargs: dict[str, Any]) -> None:
    named = {f"argument {i}": arg for i, arg in enumerate(args)} | {f"argument {k!r}": v for k, v in kwargs.items()}
    for name, arg in named.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
            try:
                hash(None if _is_traced(leaf) else leaf)
            except TypeError as error:
                raise TypeError(
                    f"expected {name}{jax.tree_util.keystr(path)} to be an array, or hashable, for a program to be "
                    f"looked up by; got {type(leaf).__name__}. Close over it (functools.partial), or make it hashable."
                ) from error
