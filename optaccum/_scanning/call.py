"""One call's arguments, each by its role."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


class Roles(NamedTuple):
    """Which positional arguments play which part; indices as the user gave them."""

    diff: tuple[int, ...]
    batch: tuple[int, ...]
    key: int | None
    carry: int | None


class Call(NamedTuple):
    """A call's arrays by role, and all that is not an array."""

    diff: tuple[PyTree, ...]
    batch: tuple[PyTree, ...]
    key: PyTree
    carry: PyTree
    rest: list[jax.Array]  # the arrays among the other positional and the keyword arguments


class Layout(NamedTuple):
    """What is static of a call; hashable where the arguments that are not arrays are."""

    roles: Roles
    num_args: int
    structure: Any
    others: tuple[Any, ...]  # (type, value) of what is not an array, None for each array


def as_indices(argnums: int | Sequence[int], name: str) -> tuple[int, ...]:
    """An int or a sequence of ints as a tuple."""
    indices: tuple[Any, ...] = tuple(argnums) if isinstance(argnums, Iterable) else (argnums,)
    if not indices or any(isinstance(i, bool) or not hasattr(i, "__index__") for i in indices):
        raise TypeError(f"expected {name} to be an int or a non-empty sequence of ints; got {argnums!r}.")
    return tuple(int(i) for i in indices)


def as_index(argnum: int | None, name: str) -> int | None:
    """An int, or None where there is none."""
    return None if argnum is None else as_indices(argnum, name)[0]


def check_function(fn: Any, name: str) -> None:
    """Raises for what cannot be called."""
    if not callable(fn):
        raise TypeError(f"expected {name} to be a function; got {fn!r}.")


def split_call(roles: Roles, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Layout]:
    """Sorts a call's arguments by role.

    Raises:
      ValueError: where an index is out of range, or one argument has two roles.
    """
    roles = resolve_roles(roles, len(args))
    by_role = {*roles.diff, *roles.batch, roles.key, roles.carry}
    others = [None if i in by_role else arg for i, arg in enumerate(args)]
    leaves, structure = jax.tree.flatten((others, kwargs))
    as_arrays = functools.partial(jax.tree.map, jnp.asarray)
    call = Call(
        diff=as_arrays(tuple(args[i] for i in roles.diff)),
        batch=as_arrays(tuple(args[i] for i in roles.batch)),
        key=() if roles.key is None else as_arrays(args[roles.key]),
        carry=() if roles.carry is None else jax.tree.map(_strongly_typed, args[roles.carry]),
        rest=[leaf for leaf in leaves if _is_array(leaf)],
    )
    # 1, 1.0 and True are equal and hash alike; a program traced for one is not right for the others.
    static = tuple(None if _is_array(leaf) else (type(leaf), leaf) for leaf in leaves)
    return call, Layout(roles, len(args), structure, static)


def by_name(layout: Layout, call: Call) -> dict[str, PyTree]:
    """A call's arguments but the batch, by names for error messages."""
    diff = {f"argument {i}": x for i, x in zip(layout.roles.diff, call.diff, strict=True)}
    return diff | {"the key": call.key, "the carry": call.carry, "another argument": call.rest}


def join_call(layout: Layout, call: Call) -> tuple[list[Any], dict[str, Any]]:
    """The inverse of `split_call`: positional and keyword arguments."""
    arrays = iter(call.rest)
    leaves = [next(arrays) if other is None else other[1] for other in layout.others]
    args, kwargs = jax.tree.unflatten(layout.structure, leaves)
    for indices, values in ((layout.roles.diff, call.diff), (layout.roles.batch, call.batch)):
        for i, value in zip(indices, values, strict=True):
            args[i] = value
    if layout.roles.key is not None:
        args[layout.roles.key] = call.key
    if layout.roles.carry is not None:
        args[layout.roles.carry] = call.carry
    return args, kwargs


def jit_call(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `fn(layout, static, call)` once for each layout, static argument and shapes."""

    def call_fn(layout, static, call):
        try:
            hash((layout, static))
        except TypeError:
            # An argument that is neither an array nor hashable: nothing to look a program up by.
            return jax.jit(functools.partial(fn, layout, static))(call)
        return jitted(layout, static, call)

    jitted = jax.jit(fn, static_argnums=(0, 1))
    return call_fn


def fold_in(key: jax.Array, index: jax.Array) -> jax.Array:
    """`jax.random.fold_in`, with an error that names the argument."""
    try:
        return jax.random.fold_in(key, index)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"expected single PRNG keys at key_argnum, such as jax.random.key(0); got shape {key.shape} and dtype "
            f"{key.dtype}. Keys for each example, as jax.random.split gives them, go into the batch."
        ) from error


def resolve_roles(roles: Roles, num_args: int | None = None) -> Roles:
    """Indices into `num_args` arguments; before there are any, as given.

    Raises:
      ValueError: where an index is out of range, or one argument has two roles.
    """
    owner: dict[int, str] = {}

    def resolve(i, name):
        index = i + num_args if i < 0 and num_args is not None else i
        if num_args is not None and not 0 <= index < num_args:
            raise ValueError(
                f"expected {name} within the call's {num_args} positional arguments, counted from 0; got {i}. Pass "
                f"that argument by position, or give another {name}."
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
    )


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array) or (isinstance(x, np.ndarray | np.generic) and x.dtype.kind not in "OSU")


def _strongly_typed(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return jax.lax.convert_element_type(x, x.dtype) if jnp.issubdtype(x.dtype, jnp.number) else x
