"""A function that runs in one form and is transformed in another."""

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any


def run_as(fast: Callable[[PyTree], PyTree], plain: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """`fast`, which every transformation takes for `plain`.

    For two functions of one pytree of arrays that compute the same, of which `fast` uses references. References do
    not go through all of `jax.vmap` and differentiation: some fail, and reverse mode inside an outer `lax.scan` gives
    wrong gradients without an error (JAX 0.10 and 0.12). So `jax.vmap` and derivatives of either mode and any order
    see `plain` alone; nesting follows, in any order and through `jax.jit`.

    Args:
      fast: what runs where nothing transforms it; it may close over no tracer.
      plain: what is transformed; it may close over no tracer either.
    """

    # A `custom_jvp` whose function shows the effects of references cannot be lowered ("No state discharge rule").
    # `linear_call`, here linear in nothing, is a call that shows none, and is lowered with its references by itself.
    def opaque(operands):
        leaves, structure = jax.tree.flatten(operands)
        outputs = jax.custom_derivatives.linear_call(
            lambda leaves, _: fast(jax.tree.unflatten(structure, leaves)), _never, leaves, ()
        )
        leaves.clear()  # JAX 0.12 keeps them, for a transposition that never comes, and would leak tracers
        return outputs

    unbatched = jax.custom_batching.custom_vmap(opaque)

    @unbatched.def_vmap
    def _(axis_size, in_batched, operands):
        in_axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
        outputs = jax.vmap(plain, in_axes=in_axes, axis_size=axis_size)(operands)
        return outputs, jax.tree.map(lambda _: True, outputs)

    function = jax.custom_jvp(unbatched)
    function.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return function


def _never(*_: Any) -> Any:
    raise AssertionError("the custom_jvp around it leaves nothing to transpose")
