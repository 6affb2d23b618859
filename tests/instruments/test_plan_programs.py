"""The planner on compiled programs: SGD over micro-batches of a scanned perceptron."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

import optaccum

BATCH_SIZE, LENGTH, WIDTH = 8, 32, 16
# The layer reads the first two. The others pass through the step: theirs are the buffers that donation saves.
WEIGHTS = dict.fromkeys(("in", "out", "unread", "idle"), (2, WIDTH, WIDTH))


def _layer(h, w):
    return h + jnp.tanh(h @ w["in"]) @ w["out"], None


def _make_step(num_microbatches):
    def loss(weights, x):
        return jnp.mean(jax.lax.scan(_layer, x, weights)[0] ** 2)

    def step(weights, x):
        def body(grad_sum, x):
            return jax.tree.map(jnp.add, grad_sum, jax.grad(loss)(weights, x)), None

        micro_batches = x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)
        grad_sum, _ = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, weights), micro_batches)
        return jax.tree.map(lambda w, g: w - 0.1 * g / num_microbatches, weights, grad_sum)

    return step


def _args(make_leaf, **options):
    weights = {name: make_leaf(shape, jnp.float32) for name, shape in WEIGHTS.items()}
    return weights, make_leaf((BATCH_SIZE, LENGTH, WIDTH), jnp.float32, **options)


def _need(step, args):
    memory = step.lower(*args).compile().memory_analysis()
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def test_the_fewest_micro_batches_that_fit():
    args = _args(jax.ShapeDtypeStruct)
    made = []

    def make_step(num_microbatches):
        made.append(num_microbatches)
        return _make_step(num_microbatches)

    needs = {n: _need(jax.jit(_make_step(n)), args) for n in (1, 2, 4, 8)}
    assert needs[1] > 2 * needs[BATCH_SIZE], "the micro-batch size does not matter"
    for fewest in (1, 4):
        made.clear()
        limit = needs[fewest] + 100
        plan = optaccum.plan_microbatches(make_step, args, batch_size=BATCH_SIZE, memory_limit=limit)
        assert plan.num_microbatches == fewest == min(n for n in needs if needs[n] <= limit)
        assert dict(plan.probes) == {n: needs[n] for n in made}
        assert len(made) == len(set(made)) <= 4


def test_nothing_is_executed_and_donation_saves_memory():
    args = _args(jnp.ones)
    donating = jax.jit(_make_step(4), donate_argnums=0)
    need, donating_need = _need(jax.jit(_make_step(4)), args), _need(donating, args)
    assert donating_need < need

    def plan(**options):
        calls = []

        def make_step(num_microbatches):
            def step(weights, x):
                jax.debug.callback(lambda: calls.append(num_microbatches))
                return _make_step(num_microbatches)(weights, x)

            return jax.jit(step, **options)

        limit = (need + donating_need) // 2
        found = optaccum.plan_microbatches(make_step, args, batch_size=BATCH_SIZE, memory_limit=limit)
        jax.effects_barrier()
        assert not calls
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(args))
        return found.num_microbatches

    assert plan(donate_argnums=0) == 4
    assert plan() == 8
    jax.block_until_ready(donating(*args))
    assert args[0]["in"].is_deleted(), "the step would not have donated anything"


def test_memory_is_that_of_one_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    sharded = _args(jax.ShapeDtypeStruct, sharding=sharding)
    limit = _need(jax.jit(_make_step(8)), _args(jax.ShapeDtypeStruct))
    options = {"batch_size": BATCH_SIZE, "memory_limit": limit}
    whole = optaccum.plan_microbatches(_make_step, _args(jax.ShapeDtypeStruct), **options)
    assert whole.num_microbatches == 8
    assert optaccum.plan_microbatches(_make_step, sharded, **options).num_microbatches == 1
