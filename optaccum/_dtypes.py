"""Which dtype a sum of gradients is kept in, and how a pytree is held to the types of another."""

import re
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

AccumulatorDType = DTypeLike | None | Callable[[tuple[Any, ...], Any], DTypeLike | None]
"""A dtype, None (each gradient's own), or a function of a leaf's key path and the leaf."""


def check_accumulator_dtype(accumulator_dtype: Any, where: str = "") -> AccumulatorDType:
    """`accumulator_dtype`; raises where it is no floating dtype, None or function."""
    if accumulator_dtype is None or is_function(accumulator_dtype):
        return accumulator_dtype
    try:
        dtype = np.dtype(accumulator_dtype)
    except TypeError as error:
        raise TypeError(
            f"expected accumulator_dtype{where} to be a dtype, None, or a function (path, leaf) -> dtype; "
            f"got {accumulator_dtype!r}."
        ) from error
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"expected accumulator_dtype{where} to be a floating dtype; got {dtype}, which truncates gradients."
        )
    return accumulator_dtype


def accumulator_dtype_of(accumulator_dtype: AccumulatorDType, path: tuple[Any, ...], leaf: Any) -> jnp.dtype:
    """The dtype that the sum of one gradient leaf, at this key path, is kept in.

    A dtype is taken exactly for real leaves, but never narrows float64; a complex leaf stays complex. What a
    function returns is taken as it is; None from it, as for the option itself, is the leaf's own.
    """
    own = dtype_of(leaf)  # not a weak type's default
    if jnp.issubdtype(own, jax.dtypes.extended):  # a PRNG key, which has no gradient
        dtype = None if is_function(accumulator_dtype) else accumulator_dtype
        return accumulator_dtype_of(dtype, path, np.float32(0))
    own = cast(Any, jax.dtypes.canonicalize_dtype(own))  # without x64 float32
    by_function = is_function(accumulator_dtype)
    if by_function:
        accumulator_dtype = cast(Callable[..., Any], accumulator_dtype)(path, leaf)
        if jnp.issubdtype(own, jnp.inexact):
            check_accumulator_dtype(accumulator_dtype, f" at {leaf_name(path)}")
    if accumulator_dtype is None:
        return own
    dtype = jax.dtypes.canonicalize_dtype(cast(DTypeLike, accumulator_dtype))
    if by_function:
        return dtype
    if jnp.issubdtype(own, jnp.complexfloating):
        return np.promote_types(own, at_least_float32(dtype))
    return own if own == jnp.float64 else dtype


def at_least_float32(dtype: Any) -> jnp.dtype:
    """The dtype to add, multiply and divide in: float32, or what is wider; complex stays complex.

    (`jnp.promote_types` refuses to mix dtypes under `jax_numpy_dtype_promotion="strict"`.)
    """
    is_wide = jnp.issubdtype(dtype, jnp.complexfloating) or dtype == jnp.float64
    return jnp.dtype(dtype if is_wide else jnp.float32)


def as_summand(x: Any) -> jax.Array:
    """16-bit floats to float32, bools to integers: the dtype that sums are kept in."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return x.astype(at_least_float32(x.dtype))
    return x.astype(jnp.int32) if x.dtype == jnp.bool_ else x


def is_function(accumulator_dtype: Any) -> bool:
    """Whether this `accumulator_dtype` is to be asked about each leaf."""
    return callable(accumulator_dtype) and not isinstance(accumulator_dtype, type)  # jnp.float32 is a type


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, of a float0 gradient, of a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def is_numeric(leaf: Any) -> bool:
    """Whether a leaf is an array, or a number that stands for one; a model's functions and strings are not."""
    return hasattr(leaf, "dtype") or isinstance(leaf, (int, float, complex))


def is_float0(leaf: Any) -> bool:
    """Whether JAX gave this gradient to an integer, bool or key parameter."""
    return dtype_of(leaf) == jax.dtypes.float0


def as_scalar(name: str, value: Any) -> jax.Array:
    """`value` as a float32 scalar; raises by `name` where it is no real one."""
    if not is_numeric(value):
        raise TypeError(f"expected {name} to be a real scalar; got {type(value).__name__}.")
    shape, dtype = jnp.shape(value), dtype_of(value)
    if shape != ():
        raise ValueError(f"expected {name} to be a scalar; got shape {shape}. Reduce it over the micro-batch.")
    is_real = jnp.issubdtype(dtype, np.number) and not jnp.issubdtype(dtype, jnp.complexfloating)
    if not is_real and dtype != jnp.bool_:
        raise TypeError(f"expected {name} to be a real scalar; got dtype {dtype}.")
    return jnp.asarray(value, jnp.float32)  # at once: an int32 in between would wrap


def as_flag(name: str, value: Any) -> jax.Array:
    """`value` as a bool scalar; raises by `name` where it is none."""
    if not is_numeric(value) or jnp.shape(value) != () or dtype_of(value) != jnp.bool_:
        raise TypeError(f"expected {name} to be a bool scalar, traced or not; got {value!r}. A comparison makes one.")
    return jnp.asarray(value)


def leaf_name(path: tuple[Any, ...]) -> str:
    """A leaf's key path as messages give it; a node that names no children numbers them."""
    name = re.sub(r"\[<flat index (\d+)>\]", r", leaf \1", jax.tree_util.keystr(path))
    return name.removeprefix(", ") or "the root"


def keep_avals(new: Any, old: Any, what: str, advice: str = "") -> Any:
    """`new` with the dtypes, weak types and shardings of `old`, arrays or `jax.ShapeDtypeStruct`s.

    A state whose types never change is what a scan's carry, a single trace and a donated buffer need. Raises where
    structure or shapes differ: `what` the trees are, and for another structure `advice`, the way out.
    """
    leaves, structure = jax.tree.flatten(new)
    old_leaves, old_structure = jax.tree.flatten_with_path(old)
    if structure != old_structure:
        raise TypeError(f"expected {what} to keep its structure, {old_structure}; got {structure}. {advice}".rstrip())
    pairs = zip(leaves, old_leaves, strict=True)
    return structure.unflatten(_keep_aval(leaf, was, path, what) for leaf, (path, was) in pairs)


def _keep_aval(new: Any, old: Any, path: tuple[Any, ...], what: str) -> Any:
    if jnp.shape(new) != jnp.shape(old):
        raise TypeError(
            f"expected {what} to keep its shapes, {jnp.shape(old)} at {leaf_name(path)}; got {jnp.shape(new)}."
        )
    aval = jax.typeof(old)
    new = jnp.asarray(new)
    new = new if new.dtype == aval.dtype else new.astype(aval.dtype)  # (a PRNG key has no astype to its own)
    new = keep_sharding(new, old)
    if aval.weak_type:
        # Only an indexed update gives a weakly typed result; XLA drops it, so it costs nothing.
        return jnp.asarray(old).at[...].set(new)
    # A PRNG key outside jit has no weak_type of its own.
    return lax.convert_element_type(new, aval.dtype) if jax.typeof(new).weak_type else new


def keep_sharding(new: jax.Array, old: Any) -> jax.Array:
    """`new` laid out as `old`, where their types show it: along the Explicit axes of a mesh."""
    sharding = jax.typeof(old).sharding
    return new if jax.typeof(new).sharding.spec == sharding.spec else jax.sharding.reshard(new, sharding)
