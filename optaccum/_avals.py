"""Holding a pytree to the structure, shapes and dtypes of another."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def keep_avals(new: Any, old: Any, what: str, advice: str = "") -> Any:
    """`new` with the dtypes and weak types of `old`; raises where structure or shapes differ.

    A state whose types never change is what a scan's carry, a single trace and a donated buffer need.

    Args:
      new: a pytree of arrays.
      old: a pytree of arrays of the same structure and shapes.
      what: what the trees are, for the error message.
      advice: the way out of another structure.
    """
    new_leaves, new_structure = jax.tree.flatten(new)
    old_leaves, old_structure = jax.tree.flatten_with_path(old)
    if new_structure != old_structure:
        raise TypeError(
            f"{what} may not change its structure: expected {old_structure}, got {new_structure}. {advice}".rstrip()
        )
    pairs = zip(new_leaves, old_leaves, strict=True)
    return old_structure.unflatten(_keep_aval(leaf, was, path, what) for leaf, (path, was) in pairs)


def _keep_aval(new: Any, old: Any, path: tuple[Any, ...], what: str) -> Any:
    if jnp.shape(new) != jnp.shape(old):
        raise TypeError(
            f"{what} may not change its shapes: at {jax.tree_util.keystr(path) or 'the root'} expected "
            f"{jnp.shape(old)}, got {jnp.shape(new)}."
        )
    aval = jax.typeof(old)
    new = jnp.asarray(new)
    new = new if new.dtype == aval.dtype else new.astype(aval.dtype)  # (a PRNG key has no astype to its own)
    if aval.weak_type:
        # Only an indexed update gives a weakly typed result; XLA drops it, so it costs nothing.
        return jnp.asarray(old).at[...].set(new)
    # A PRNG key outside jit has no weak_type of its own.
    return lax.convert_element_type(new, aval.dtype) if jax.typeof(new).weak_type else new
