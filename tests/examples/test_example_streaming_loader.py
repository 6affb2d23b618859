"""The streaming loop: ramp, flushes and weights; stopped in a window, it goes on to the same bits."""

import numpy as np
import pytest
import streaming_loader
from conftest import assert_trees_equal
from stopped import run_stopped

SMALL = [
    *("--max-bytes", "6000", "--layers", "1", "--width", "16", "--heads", "2", "--length", "32"),
    *("--epochs", "2", "--ramp", "2000", "--max-k", "4", "--checkpoint-every", "5"),
]


def test_ramp_flush_and_a_run_stopped_in_a_window(tmp_path, capsys):
    folder, figure = tmp_path / "run", tmp_path / "figure.png"
    arguments = [*SMALL, "--figure", str(figure)]
    whole = streaming_loader.main(arguments)
    arguments += ["--checkpoints", str(folder)]
    run_stopped(streaming_loader, 25, arguments)
    resumed = streaming_loader.main(arguments)

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
