"""Adam's moments in host memory between updates: the recipe of docs/memory.md, by the TPU's own account."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import optaccum
from benchmarks.measure import num_bytes
from examples._targets import find

PARAMS = {f"w{i}": jax.ShapeDtypeStruct((2048, 2048), jnp.float32) for i in range(6)}
ROWS = jax.ShapeDtypeStruct((8192, 2048), jnp.float32)  # whose activations need more than an emit does


def loss_fn(params, x):
    for w in params.values():
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def move(tree, space):
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, tree)


def on_host(inner):
    def update(grads, state, params=None, **extra_args):
        updates, state = inner.update(grads, move(state, jax.memory.Space.Device), params, **extra_args)
        return updates, move(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(lambda params: move(inner.init(params), jax.memory.Space.Host), update)


def compile_step(inner, memory_kind):
    mesh = Mesh(find("v5e:1x1").devices, ("data",))

    def placed(x, kind="device"):
        sharding = NamedSharding(mesh, P(), memory_kind=kind if x.ndim else "device")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def step(params, state, rows):
        return optaccum.apply_gradients(tx, jax.grad(loss_fn)(params, rows), state, params)

    tx = optaccum.accumulate(inner, 8)
    plain = jax.eval_shape(optaccum.accumulate(optax.adamw(1e-3), 8).init, PARAMS)
    params, state, rows = jax.tree.map(placed, (PARAMS, plain, ROWS))
    state = state._replace(inner_state=jax.tree.map(lambda x: placed(x, memory_kind), plain.inner_state))
    kept = jax.tree.map(lambda x: x.sharding, (params, state))
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=kept).lower(params, state, rows).compile()


def device_copies(compiled):
    memory = compiled.memory_analysis()
    need = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (need + memory.temp_size_in_bytes) / num_bytes(PARAMS)


def transfers(compiled):
    """How many copies from or to host memory each computation starts."""
    found, computation = Counter(), ""
    for line in compiled.as_text().splitlines():
        if header := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = "entry" if header[1] else header[2]
        found[computation] += "copy-start(" in line and "S(5)" in line
    return +found


def test_moments_wait_on_the_host_and_travel_in_the_emit_alone():
    plain = compile_step(optax.adamw(1e-3), "device")
    offloaded = compile_step(on_host(optax.adamw(1e-3)), "pinned_host")
    assert device_copies(offloaded) < device_copies(plain) - 1.9
    assert offloaded.memory_analysis().host_argument_size_in_bytes >= 2 * num_bytes(PARAMS)
    (where,) = transfers(offloaded)
    assert re.search(rf"while\(.*body=%{re.escape(where)}\b", offloaded.as_text())
    assert transfers(offloaded)[where] == 4 * len(PARAMS)  # two moments, there and back
    assert not transfers(plain)
