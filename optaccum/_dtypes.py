"""Which dtype a sum of gradients is kept in."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

AccumulatorDType = DTypeLike | None | Callable[[tuple[Any, ...], Any], DTypeLike | None]
"""A dtype, None (each gradient's own), or a function of a leaf's key path and the leaf."""


def check_accumulator_dtype(accumulator_dtype: Any) -> AccumulatorDType:
    """`accumulator_dtype`; raises where it is no floating dtype, None or function."""
    if accumulator_dtype is None or _is_function(accumulator_dtype):
        return accumulator_dtype
    try:
        dtype = np.dtype(accumulator_dtype)
    except TypeError as error:
        raise TypeError(
            "accumulator_dtype expects a dtype, None, or a function (path, leaf) -> dtype; "
            f"got {accumulator_dtype!r}."
        ) from error
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"accumulator_dtype expects a floating dtype, got {dtype}, which truncates gradients."
        )
    return accumulator_dtype


def accumulator_dtype_of(accumulator_dtype: AccumulatorDType, path: tuple[Any, ...], leaf: Any) -> jnp.dtype:
    """The dtype that the sum of one gradient leaf is kept in.

    A dtype is taken exactly for real leaves, but never narrows float64; a complex leaf stays complex. What a
    function returns is taken as it is; None from it, as for the option itself, is the leaf's own.

    Args:
      accumulator_dtype: the user's option.
      path: the leaf's key path, as `jax.tree_util.tree_map_with_path` gives it.
      leaf: anything with a dtype.
    """
    own = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)  # not a weak type's default
    own = cast(Any, jax.dtypes.canonicalize_dtype(own, allow_extended_dtype=True))  # without x64 float32
    if _is_function(accumulator_dtype):
        dtype = cast(Callable[..., Any], accumulator_dtype)(path, leaf)
        return own if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
    if accumulator_dtype is None:
        return own
    dtype = jax.dtypes.canonicalize_dtype(cast(DTypeLike, accumulator_dtype))
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


def _is_function(accumulator_dtype: Any) -> bool:
    return callable(accumulator_dtype) and not isinstance(accumulator_dtype, type)  # jnp.float32 is a type
