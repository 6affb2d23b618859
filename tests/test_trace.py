"""A function traced: what its outputs are computed from, beside what it closes over."""

import jax.numpy as jnp

from optaccum._trace import trace


def test_outputs_depend_on_some_arguments_and_a_closure_is_none_of_them():
    closed_over = jnp.arange(3.0)
    traced, consts = trace(lambda a, b: (a + closed_over, b, closed_over), True, jnp.ones(3))
    assert [traced.depends_on(i) for i in range(3)] == [[True, False], [False, True], [False, False]]
    assert len(consts) == 1
    total, _, same = traced.call([2 * consts[0]], True, jnp.ones(3))
    assert (total.tolist(), same.tolist()) == ([1.0, 3.0, 5.0], [0.0, 2.0, 4.0])
