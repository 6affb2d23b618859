"""Checks of what a user hands over."""

import sys
from typing import Any

import jax
import numpy as np


def check_function(fn: Any, name: str) -> None:
    """Raises for what cannot be called."""
    if not callable(fn):
        raise TypeError(f"expected {name} to be a function; got {fn!r}.")


def check_flag(value: Any, name: str, *, or_none: bool = False) -> Any:
    """`value`, as Python's bool; raises where it is none."""
    if or_none and value is None:
        return None
    if not isinstance(value, (bool, np.bool_)):
        flags = "True, False or None" if or_none else "True or False"
        raise TypeError(f"expected {name} to be {flags}; got {value!r}.")
    return bool(value)


def check_no_nnx_objects(args: Any) -> None:
    """Raises for objects whose state would stay as it is: the same dropout mask in every micro-batch and call."""
    if (nnx := sys.modules.get("flax.nnx")) is None:
        return

    def is_leaf(x):
        return isinstance(x, nnx.Pytree | nnx.Variable | nnx.State)

    for x in jax.tree.leaves(args, is_leaf=is_leaf):
        if is_leaf(x) and not isinstance(x, nnx.State):
            raise TypeError(
                f"expected arrays among the arguments; got an NNX object, {type(x).__name__}, whose state stays. "
                "optaccum.nnx takes it (value_and_grad, apply_gradients); or pass states from nnx.split, and a JAX "
                "key, in scanned functions named with key_argnum."
            )
