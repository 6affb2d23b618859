"""The language model: all three ways, resumed after kill -9, each way to rematerialise, and its mistakes."""

import functools
import os
import pathlib
import signal
import subprocess
import sys

import _common
import jax
import jax.numpy as jnp
import language_model
import numpy as np
import pytest
from conftest import assert_trees_close, assert_trees_equal

import optaccum

SMALL = ["--max-bytes=30000", "--layers=2", "--width=16", "--heads=2", "--length=24", "--batch-size=12"]
SMALL += ["--microbatches=4"]


def test_language_model(tmp_path, capsys):
    figure = tmp_path / "figures" / "language_model.png"
    results = language_model.main([*SMALL, "--experts", "2", "--updates", "4", "--compare", "--figure", str(figure)])

    ours, whole, mean_of_means = results
    assert [r.name for r in results] == ["optaccum", "whole batch", "mean of means"]
    assert len(whole.losses) == 4
    assert whole.losses[-1] < 0.99 * whole.losses[0]
    assert 4 < whole.bits_per_byte < 8.5
    np.testing.assert_allclose(ours.losses, whole.losses, rtol=1e-4)
    assert 0 < ours.distance < 1e-4 < 1e-3 < mean_of_means.distance
    assert max(abs(np.subtract(mean_of_means.losses, whole.losses))) > 1e-3
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(result.name in printed for result in results)


# Saves after calls 3 and 6, in the middle of windows of 4, and is killed as it is about to save after call 9.
KILLED = """
import os, signal, sys
import language_model

def save_or_die(manager, call, *rest, save=language_model.save):
    if call == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    save(manager, call, *rest)

language_model.save = save_or_die
language_model.main(sys.argv[1:])
"""


def test_language_model_resumes_after_kill_9(tmp_path, compiled):
    command = [*SMALL, "--updates", "3", "--calls-per-update", "4", "--checkpoint-every", "3"]
    command += ["--figure", str(tmp_path / "figure.png")]
    (undisturbed,) = language_model.main(command)

    command += ["--checkpoints", str(tmp_path / "checkpoints")]
    examples = pathlib.Path(language_model.__file__).parent
    env = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",  # as here: it shapes what the compiler does
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONPATH": os.pathsep.join([str(examples), str(examples.parent)]),
    }
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], env=env, capture_output=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]

    (resumed,) = language_model.main(command)
    assert_trees_equal(resumed.params, undisturbed.params)
    assert resumed.losses == undisturbed.losses


def test_checkpoints_refuse_other_settings(tmp_path):
    state, record = {"w": jnp.ones(2)}, {"settings": {"seed": "0"}}
    manager = _common.open_checkpoints(tmp_path)
    assert _common.restore(manager, state, record) == (0, state, record)
    _common.save(manager, 3, state, record)
    step, restored, _ = _common.restore(manager, state, record)
    assert step == 3
    assert_trees_equal(restored, state)
    with pytest.raises(SystemExit, match="other settings: seed '0', now '1'"):
        _common.restore(manager, state, {"settings": {"seed": "1"}})
    manager.close()


def _problem(remat, dtype=jnp.float32, experts=0):
    size = language_model.Size(layers=2, width=16, heads=2, length=16, experts=experts, remat=remat, dtype=dtype)
    model = language_model.Transformer(size)
    rows = np.random.default_rng(0).integers(1, 256, (4, 17)).astype(np.uint8)
    rows[1, 12:] = 0
    inputs = jnp.zeros((1, 16), jnp.int32)
    init_fn = jax.jit(functools.partial(model.init, inputs=inputs, is_token=inputs == 0))
    return functools.partial(language_model.loss_terms, model), init_fn, rows


def test_remat_changes_the_program():
    lowered = {}
    for remat in language_model.REMAT:
        loss_fn, init_fn, rows = _problem(remat)
        params = jax.eval_shape(init_fn, jax.random.key(0))
        traced = jax.jit(optaccum.grad(loss_fn, num_microbatches=2)).trace(params, rows)
        lowered[remat] = traced.lower(lowering_platforms=("cuda",)).as_text()  # CPUs have no other memory
    assert len(set(lowered.values())) == len(lowered) == 4
    assert [remat for remat, text in lowered.items() if "pinned_host" in text] == ["offload"]


def test_remat_does_not_change_the_gradient():
    loss_fn, init_fn, rows = _problem("none", experts=2)
    offload_fn, _, _ = _problem("offload", experts=2)
    params = init_fn(jax.random.key(0))
    expected = jax.jit(optaccum.value_and_grad(loss_fn, num_microbatches=1))(params, rows)
    actual = jax.jit(optaccum.value_and_grad(offload_fn, num_microbatches=1))(params, rows)
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert jnp.abs(expected[1]["params"]["positions"]).max() > 1e-3


def test_bfloat16_computes_narrow_and_sums_wide():
    loss_fn, init_fn, rows = _problem("none")
    narrow_fn, _, _ = _problem("none", jnp.bfloat16)
    params = init_fn(jax.random.key(0))
    loss, narrow = (jax.jit(fn)(params, rows)["bytes"].total for fn in (loss_fn, narrow_fn))
    assert 0 < abs(float(narrow - loss)) < 0.01 * float(loss)
    results = jax.eval_shape(optaccum.value_and_grad(narrow_fn, num_microbatches=2), params, rows)
    assert {x.dtype for x in jax.tree.leaves(results)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--updates", "0"], "--updates: expected a whole number, 1 or more; got 0"),
        (["--microbatches", "65"], "--batch-size 64 cannot make 65 micro-batches"),
        (["--calls-per-update", "3"], "--calls-per-update must divide --microbatches 8"),
        (["--heads", "5"], "--heads must divide --width 64"),
        (["--length", "8"], "--length must be over 8"),
        (["--experts", "1"], "--experts expects 0, or 2 or more"),
        (["--experts", "4", "--calls-per-update", "2"], "--experts needs --calls-per-update 1"),
        (["--remat", "offload"], "has no pinned_host memory to offload to"),
    ],
)
def test_language_model_refuses(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(language_model, "has_host_memory", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        language_model.main(arguments)
    assert message in capsys.readouterr().err


def test_language_model_refuses_data(tmp_path):
    with pytest.raises(SystemExit, match="is neither a file nor a folder"):
        language_model.main(["--data", str(tmp_path / "missing")])
    (tmp_path / "short.txt").write_text("Two short\n\ndocuments.")
    with pytest.raises(SystemExit, match="2 documents do not fill --batch-size 64"):
        language_model.main(["--data", str(tmp_path)])
