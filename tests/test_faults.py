"""Killed, cut short, restored into something else: no other parameters at the end, or it says why."""

import functools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import fault_worker as worker
import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import assert_trees_equal

import optaccum

KILLS = int(os.environ.get("OPTACCUM_KILLS", "3"))
CALLS_PER_LIFE = 8


def train(folder, num_calls):
    """The worker's run in this process, from its newest checkpoint."""
    tx = worker.make_tx()
    step = worker.make_step(tx)
    first, tree = worker.restore(folder, worker.init(tx))
    for call in range(first, num_calls):
        tree = step(call, *tree)
    return tree


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("none"), 12)


def test_killed_at_random_moments_it_ends_as_if_undisturbed(tmp_path):
    """OPTACCUM_KILLS times: half of them by kill -9, half by SIGTERM."""
    rng, command, pause = random.Random(0), [sys.executable, worker.__file__, str(tmp_path)], "0.005"
    root = pathlib.Path(optaccum.__file__).parent.parent
    # As many devices as here: that shapes what the compiler does.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(root)}
    half_written = 0
    for kill in range(KILLS):
        sent = (signal.SIGKILL, signal.SIGTERM)[kill % 2]
        with subprocess.Popen([*command, "10000", pause], env=env, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(rng.randrange(1, CALLS_PER_LIFE)):
                assert process.stdout.readline(), "the program ended by itself"
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(sent)
            process.stdout.read()
        assert process.returncode == (-sent if sent == signal.SIGKILL else 128 + sent)
        half_written += (tmp_path / "partial").exists()
    first, _ = worker.restore(tmp_path, worker.init(worker.make_tx()))
    assert first > 0
    num_calls = first + CALLS_PER_LIFE
    subprocess.run([*command, str(num_calls), pause], env=env, check=True, stdout=subprocess.DEVNULL)

    last, tree = worker.restore(tmp_path, worker.init(worker.make_tx()))
    assert last == num_calls
    undisturbed = train(tmp_path / "none", num_calls)
    assert_trees_equal(tree, undisturbed)
    assert int(tree[1].num_skipped) > 0
    assert int(tree[1].gradient_step) > 3
    assert half_written or KILLS < 20, "no kill fell while a checkpoint was written"


@pytest.mark.parametrize("forgotten", ["grad_sum", "micro_step", "inner_state"])
def test_a_run_that_forgets_a_part_of_its_state_ends_elsewhere(tmp_path, undisturbed, forgotten):
    tx = worker.make_tx()
    params, state = train(tmp_path, 9)
    assert int(state.micro_step) > 0  # in the middle of a window
    _, fresh = worker.init(tx)
    for kept, same in ((state, True), (state._replace(**{forgotten: getattr(fresh, forgotten)}), False)):
        worker.save(tmp_path, 9, (params, kept))
        end = train(tmp_path, 12)
        if same:
            assert_trees_equal(end, undisturbed)
        else:
            with pytest.raises(AssertionError):
                assert_trees_equal(end[0], undisturbed[0])


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-1] + b"?"]
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(tmp_path, undisturbed, damage, capsys):
    for num_calls in (5, 9):
        worker.save(tmp_path, num_calls, train(tmp_path, num_calls))
    newest = worker.checkpoints(tmp_path)[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    first, _ = worker.restore(tmp_path, worker.init(worker.make_tx()))
    assert first == 5
    assert "refused: 000009.checkpoint is not what was written" in capsys.readouterr().err
    assert_trees_equal(train(tmp_path, 12), undisturbed)


# A state from elsewhere.

PARAMS = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}}
WAYS = pytest.mark.parametrize("way", ["update", "apply_gradients"])


def one_call(way, tx, state, params=PARAMS, **extra_args):
    """Abstractly: what does not fit shows before anything runs."""

    def call(state):
        grads = jax.tree.map(jnp.ones_like, params)
        if way == "update":
            return tx.update(grads, state, params, **extra_args)
        return optaccum.apply_gradients(tx, grads, state, params, **extra_args)

    return jax.eval_shape(call, state)


def in_a_window(tx, params=PARAMS):
    return tx.init(params)._replace(micro_step=jnp.int32(2), weight_sum=jnp.float32(2))


@WAYS
@pytest.mark.parametrize(("k", "emits"), [(2, True), (3, True), (4, False)])
def test_a_state_from_another_k_goes_on(way, k, emits):
    state = in_a_window(optaccum.accumulate(optax.sgd(0.1), 5))
    tx = optaccum.accumulate(optax.sgd(0.1), k)
    call = tx.update if way == "update" else functools.partial(optaccum.apply_gradients, tx)
    _, state = call(PARAMS, state, PARAMS)
    assert bool(state.has_updated) is emits


@WAYS
@pytest.mark.parametrize(
    ("then", "now"),
    [
        (optax.sgd(0.1), optax.adam(0.1)),
        (optax.adam(0.1), optax.lion(0.1)),
        (optax.adam(0.1), optax.sgd(0.1, momentum=0.9)),
        (optax.sgd(0.1, momentum=0.9), optax.adam(0.1)),
        (optax.adam(0.1), optax.adamw(0.1)),
    ],
    ids=["sgd-adam", "adam-lion", "adam-momentum", "momentum-adam", "adam-adamw"],
)
def test_a_state_of_another_inner_optimizer_is_refused_at_once(way, then, now):
    """By the optimizer's own error, and a note that says what to restore."""
    state = in_a_window(optaccum.accumulate(then, 4))  # of which the third call does not end the window
    tx = optaccum.accumulate(now, 4)
    with pytest.raises((AttributeError, TypeError, ValueError)) as refused:
        one_call(way, tx, state)
    assert "Restore it with the options that it was saved with" in "".join(refused.value.__notes__)
    one_call(way, tx, in_a_window(tx))


@WAYS
@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"layer": {"w": jnp.ones((2, 3))}}, r"(?s)\['layer'\].*1 child keys"),
        (
            {"layer": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3), "c": jnp.zeros(1)}},
            r"(?s)\['layer'\].*3 child keys",
        ),
        ({"layer": {"w": jnp.ones((3, 2)), "b": jnp.zeros(3)}}, r"\['layer'\]\['w'\]"),
    ],
    ids=["fewer", "more", "shape"],
)
def test_a_state_of_another_tree_is_refused_by_name(way, other, named):
    tx = optaccum.accumulate(optax.adam(0.1), 4)
    with pytest.raises(ValueError, match=named):
        one_call(way, tx, in_a_window(tx, other))


@WAYS
def test_a_state_with_narrower_sums_is_refused_by_name(way):
    state = in_a_window(optaccum.accumulate(optax.adam(0.1), 4, accumulator_dtype=jnp.bfloat16))
    for dtype in (jnp.float32, None):
        tx = optaccum.accumulate(optax.adam(0.1), 4, accumulator_dtype=dtype)
        if dtype is None:
            one_call(way, tx, state)  # whatever dtype the state has
        else:
            with pytest.raises(ValueError, match=r"\['layer'\]\['b'\] to be float32.*got bfloat16"):
                one_call(way, tx, state)


@WAYS
@pytest.mark.parametrize(
    "options",
    [
        {"averaged_extra_args": ("value",)},
        {"should_skip_update_fn": optax.skip_not_finite},
        {"track_noise_scale": True},
    ],
    ids=["averages", "skip", "noise"],
)
def test_a_state_without_what_an_option_keeps_is_refused_by_name(way, options):
    state = in_a_window(optaccum.accumulate(optax.adam(0.1), 4))
    tx = optaccum.accumulate(optax.adam(0.1), 4, **options)
    extra = {"value": 1.0} if "averaged_extra_args" in options else {}
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        one_call(way, tx, state, **extra)
    one_call(way, tx, in_a_window(tx), **extra)
