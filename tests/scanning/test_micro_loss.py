"""The loss is traced once for each size of micro-batch, however many there are."""

import chex
import jax
import jax.numpy as jnp
import pytest
from scanning_problem import BATCH, PARAMS, mean_loss

import optaccum


@pytest.mark.parametrize(
    ("n", "bare", "traces"), [(1, False, 1), (7, False, 1), (3, False, 2), (7, True, 2), (3, True, 4)]
)
def test_traces_do_not_grow_with_n(n, bare, traces):
    """One for each size of micro-batch, and one more each to find the axes of bare leaves."""
    count = []

    def loss_fn(params, batch):
        count.append(1)
        return mean_loss(params, batch), (batch["mask"] if bare else optaccum.Sum(batch["mask"].sum()))

    grad_fn = optaccum.value_and_grad(loss_fn, num_microbatches=n, has_aux=True)
    for _ in range(2):
        grad_fn(PARAMS, BATCH)
    assert len(count) == traces


def test_the_program_does_not_grow_with_n():
    def program(n):
        grad_fn = optaccum.value_and_grad(lambda w, x: jnp.mean(jnp.tanh(x * w)), num_microbatches=n)
        return jax.jit(grad_fn).lower(1.0, jnp.ones(1024)).as_text()

    assert program(2).count("\n") == program(512).count("\n") < program(3).count("\n")  # of two sizes


def test_what_the_loss_closes_over_does_not_leak():
    def scaled(scale):
        def loss_fn(w, x):
            h, _ = jax.lax.scan(lambda h, w: (h * w * scale, None), x, w)
            return h.mean()

        return optaccum.grad(loss_fn, num_microbatches=2)(jnp.ones(2), jnp.ones(4))

    with jax.checking_leaks():
        assert jax.jit(scaled)(2.0).tolist() == [4.0, 4.0]


def test_a_step_is_traced_once():
    grad_fn = optaccum.grad(mean_loss, num_microbatches=3)
    step = jax.jit(chex.assert_max_traces(grad_fn, n=1))
    params = step(step(PARAMS, BATCH), BATCH)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, PARAMS)
