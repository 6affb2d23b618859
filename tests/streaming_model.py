"""Calls of `accumulate` as data, the library run on them, and a float64 model of the window in plain Python."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaccum

TREES = {
    "nested": {"a": jnp.zeros(3), "b": (jnp.zeros([]), [jnp.zeros((2, 2)), None])},
    "half": {"h": jnp.zeros((2, 2), jnp.bfloat16), "f": jnp.zeros(2, jnp.float16), "s": jnp.zeros(1)},
    "complex": {"c": jnp.zeros(2, jnp.complex64), "none": None, "x": jnp.zeros(2), "y": optax.MaskedNode()},
    "bare": jnp.zeros(4),
}


class Setting(NamedTuple):
    """What is compiled once; all else is data."""

    tree: str
    weighted_by: str | None = "weight"
    skip: bool = False
    by_weight: bool = False
    use_grad_mean: bool = True
    accumulator_dtype: Any = jnp.float32
    track_noise_scale: bool = False


SETTINGS = [
    Setting("nested"),
    Setting("nested", skip=True, by_weight=True, track_noise_scale=True),
    Setting("half", "denominator", skip=True),
    Setting("half", accumulator_dtype=None),
    Setting("complex", "denominator", by_weight=True),
    Setting("bare", None, skip=True),
    Setting("bare", use_grad_mean=False),
]


class Call(NamedTuple):
    """One micro-step."""

    seed: int  # of the gradient: small integers, whose sums are exact in every dtype here
    weight: int
    bad: float  # NaN or an infinity at one element, or 0 for none


@functools.cache
def leaves_of(tree, seed):
    rng = np.random.default_rng(seed)
    leaves = []
    for leaf in jax.tree.leaves(TREES[tree]):
        values = rng.integers(-5, 6, leaf.shape)
        values = values + 1j * rng.integers(-5, 6, leaf.shape) if jnp.iscomplexobj(leaf) else values
        leaves.append(np.asarray(values).astype(leaf.dtype))
    return leaves


def gradient_of(tree, call):
    leaves = [leaf.copy() for leaf in leaves_of(tree, call.seed)]
    if call.bad != 0:
        leaf = leaves[call.seed % len(leaves)]
        leaf[(0,) * leaf.ndim] = call.bad
    return leaves


# The library.


def make_tx(setting, ks):
    def by_step(step):
        return jnp.asarray(ks)[step % 3]

    def by_weight(total):
        return jnp.asarray(ks)[(total / 5).astype(jnp.int32) % 3]

    return optaccum.accumulate(
        optax.scale_by_schedule(lambda step: 1.0 + step),  # so that a wrong number of updates shows
        optaccum.by_weight(by_weight) if setting.by_weight else by_step,
        use_grad_mean=setting.use_grad_mean,
        accumulator_dtype=setting.accumulator_dtype,
        should_skip_update_fn=optax.skip_not_finite if setting.skip else None,
        track_noise_scale=setting.track_noise_scale,
    )


num_traces: dict[Setting, int] = {}


@functools.cache
def compiled(setting):
    def step(ks, state, grads, weight):
        num_traces[setting] = num_traces.get(setting, 0) + 1
        given = {setting.weighted_by: weight} if setting.weighted_by else {}
        return make_tx(setting, ks).update(grads, state, TREES[setting.tree], **given)

    return jax.jit(step)


def run_library(setting, ks, calls, restarts=None):
    """Of each call: the updates and the state. `restarts`: index of a call -> what its state goes through."""
    structure = jax.tree.structure(TREES[setting.tree])
    initial = make_tx(setting, (1, 1, 1)).init(TREES[setting.tree])
    state, results = initial, []
    avals = jax.tree.map(jax.typeof, initial)
    for i, call in enumerate(calls):
        grads = structure.unflatten(map(jnp.asarray, gradient_of(setting.tree, call)))
        updates, state = compiled(setting)(np.int32(ks), state, grads, np.float32(call.weight))
        assert jax.tree.map(jax.typeof, state) == avals
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, TREES[setting.tree])
        results.append((jax.tree.leaves(updates), state))
        if restarts and i in restarts:
            state = restarts[i](state, initial)
    return results


# The model.


class Expected(NamedTuple):
    updates: list[np.ndarray] | None  # None: zeros
    micro_step: int
    gradient_step: int
    num_skipped: int
    weight_sum: float  # of the open window
    weight_total: float
    weight_dropped: float


def run_model(setting, ks, calls, wrong=""):
    """What the contract says, in Python numbers and float64; `wrong` names one way to get it wrong."""
    micro_step = gradient_step = num_skipped = 0
    weight_sum = weight_total = dropped = 0.0
    sums = [0.0] * len(jax.tree.leaves(TREES[setting.tree]))
    for call in calls:
        weight = float(call.weight) if setting.weighted_by and wrong != "drop the weight" else 1.0
        leaves = [leaf.astype(complex if np.iscomplexobj(leaf) else float) for leaf in gradient_of(setting.tree, call)]
        if weight == 0 and wrong != "mask by multiplication":
            leaves = [np.zeros_like(leaf) for leaf in leaves]
        updates = None
        if setting.skip and not all(np.isfinite(leaf).all() for leaf in leaves):
            num_skipped, dropped = num_skipped + 1, dropped + weight
            if wrong == "count what is skipped":
                micro_step += 1
        else:
            with np.errstate(invalid="ignore"):
                scale = weight if setting.weighted_by != "denominator" else 1.0
                sums = [total + scale * leaf for total, leaf in zip(sums, leaves, strict=True)]
            weight_sum += weight
            micro_step += 1
            position = weight_total // 5 if setting.by_weight else gradient_step
            k = ks[int(position) % 3] - (wrong == "a micro-step early")
            if micro_step >= k:
                if weight_sum != 0 or wrong == "step without weight":
                    divisor = {"divide by k": micro_step}.get(wrong, weight_sum or 1.0)
                    divisor = divisor if setting.use_grad_mean else 1.0
                    with np.errstate(invalid="ignore"):
                        updates = [(1.0 + gradient_step) * (total / divisor) for total in sums]
                    gradient_step += 1
                    weight_total += weight_sum
                micro_step, weight_sum = 0, 0.0
                if wrong != "never reset":
                    sums = [0.0] * len(sums)
        yield Expected(updates, micro_step, gradient_step, num_skipped, weight_sum, weight_total, dropped)


def check(setting, calls, results, expected):
    given = 0.0
    for call, (updates, state), e in zip(calls, results, expected, strict=True):
        assert bool(state.has_updated) == bool(optaccum.has_updated(state)) == (e.updates is not None)
        counts = state.micro_step, state.gradient_step, state.num_skipped, state.inner_state.count
        assert tuple(map(int, counts)) == (e.micro_step, e.gradient_step, e.num_skipped, e.gradient_step)
        assert optaccum.weight_total(state) == e.weight_total
        weight_open = float(state.weight_sum) if e.micro_step else 0.0
        assert weight_open == e.weight_sum
        given += call.weight if setting.weighted_by else 1.0
        assert optaccum.weight_total(state) + weight_open + e.weight_dropped == given
        for i, update in enumerate(updates):
            want = np.zeros(update.shape) if e.updates is None else e.updates[i]
            check_values(np.asarray(update), want)


def check_values(update, want):
    """Equal up to the dtype's rounding where finite, and finite at the same elements."""
    rtol = {jnp.bfloat16: 2**-6, np.float16: 2**-9}.get(update.dtype.type, 1e-6)
    update = update.astype(np.complex128 if np.iscomplexobj(update) else np.float64)
    finite = np.isfinite(want)
    assert (np.isfinite(update) == finite).all()
    assert update.shape == np.shape(want)
    np.testing.assert_allclose(update[finite], want[finite], rtol=rtol)
