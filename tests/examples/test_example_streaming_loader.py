"""The streaming loop: ramp, flushes and weights; killed in a window, it goes on to the same bits."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import streaming_loader
from conftest import assert_trees_equal

EXAMPLES = pathlib.Path(streaming_loader.__file__).parent
SMALL = [
    *("--max-bytes", "6000", "--layers", "1", "--width", "16", "--heads", "2", "--length", "32"),
    *("--epochs", "2", "--ramp", "2000", "--max-k", "4", "--checkpoint-every", "5"),
]
KILLED = """
import os, signal, sys
import streaming_loader as program

note = program.note

def note_then_die(record, *rest):
    note(record, *rest)
    if sum(record["micro_steps"]) + len(record["window"]) == 23:
        os.kill(os.getpid(), signal.SIGKILL)

program.note = note_then_die
program.main(sys.argv[1:])
"""


@pytest.mark.usefixtures("fast_compilation")
def test_ramp_flush_and_a_run_killed_in_a_window(tmp_path, capsys):
    folder, figure = tmp_path / "run", tmp_path / "figure.png"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)]),
        "PYTHONWARNINGS": "error",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",  # as here: threads are shared out by it
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    arguments = [*SMALL, "--figure", str(figure)]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments, "--checkpoints", str(folder)], env=environment
    ) as process:
        whole = streaming_loader.main(arguments)  # meanwhile
        try:
            assert process.wait(timeout=120) == -signal.SIGKILL
        finally:
            process.kill()
    resumed = streaming_loader.main([*arguments, "--checkpoints", str(folder)])

    assert whole.first_micro_step == 0
    assert resumed.first_micro_step == 20
    assert 20 not in np.cumsum(whole.micro_steps)  # a window was open
    assert_trees_equal(resumed.params, whole.params)
    assert resumed.losses == whole.losses
    np.testing.assert_array_equal(resumed.noise_scales, whole.noise_scales)

    before = np.array([0.0, *whole.totals[:-1]])
    full = [update for update in range(len(before)) if update not in whole.flushed]
    expected = np.minimum(2 ** np.floor(before / 2000), 4)
    assert np.array(whole.micro_steps)[full].tolist() == expected[full].tolist()
    assert set(whole.micro_steps) >= {1, 2, 4}
    assert len(whole.flushed) == 2
    assert all(whole.micro_steps[update] < expected[update] for update in whole.flushed)
    assert whole.tokens == sum(whole.batch_sizes) == whole.totals[-1]
    assert np.isnan(whole.noise_scales[0])  # a window of one micro-batch shows no spread
    assert np.isfinite(whole.noise_scales[-1])
    assert whole.losses[-1] < whole.losses[0]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert f"{whole.tokens:,.0f} bytes counted" in capsys.readouterr().out


def test_an_epoch_is_every_row_once():
    rows = np.arange(1, 23, dtype=np.uint8).reshape(11, 2)
    stream = streaming_loader.micro_batches(rows, size=4, seed=0, first=0)
    epochs = [[next(stream) for _ in range(3)] for _ in range(2)]
    for epoch in epochs:
        assert [ends for _, ends in epoch] == [False, False, True]
        seen = np.concatenate([batch for batch, _ in epoch])
        assert sorted(seen[seen.any(axis=1)].tolist()) == rows.tolist()
        assert seen.shape == (12, 2)
    assert not np.array_equal(epochs[0][0][0], epochs[1][0][0])
    again, _ = next(streaming_loader.micro_batches(rows, size=4, seed=0, first=4))
    assert np.array_equal(again, epochs[1][1][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "10"], "--heads must divide --width 10, got 4"),
        (["--ramp", "0"], "expected a whole number, 1 or more"),
    ],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        streaming_loader.main(arguments)
    assert message in capsys.readouterr().err


def test_explains_itself(capsys):
    with pytest.raises(SystemExit, match="0"):
        streaming_loader.main(["--help"])
    assert "--ramp" in capsys.readouterr().out
