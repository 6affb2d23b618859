"""The two towers: exact beside wrong, resumed in the middle of a window, and their mistakes."""

import contrastive
import numpy as np
import pytest
from conftest import assert_trees_equal
from stopped import run_stopped

SMALL = ["--updates=4", "--batch-size=64", "--microbatches=8", "--width=32", "--checkpoint-every=3"]


def test_contrastive(tmp_path, capsys):
    figure = tmp_path / "figures" / "contrastive.png"
    command = [*SMALL, "--calls-per-update=2", "--figure", str(figure)]
    results = contrastive.main(command)

    whole, exact, wrong = results
    assert [r.name for r in results] == ["whole batch", "optaccum", "per micro-batch"]
    assert len(whole.test_losses) == 4
    assert whole.test_losses[-1] < whole.test_losses[0]
    np.testing.assert_allclose(exact.test_losses, whole.test_losses, rtol=1e-5)
    assert whole.distances == [0] * 4
    assert 0 < exact.distances[-1] < 1e-5 < 1e-3 < wrong.distances[-1]
    assert abs(exact.found - whole.found) < 0.01
    assert 0 < exact.temp_bytes < whole.temp_bytes
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(result.name in printed for result in results)

    command += ["--checkpoints", str(tmp_path / "checkpoints")]
    run_stopped(contrastive, 6, command)  # saved after call 3, in the middle of a window of 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
    resumed = contrastive.main(command)
    assert_trees_equal([r.params for r in resumed], [r.params for r in results])
    assert [r.test_losses for r in resumed] == [r.test_losses for r in results]


def test_contrastive_refuses(capsys):
    with pytest.raises(SystemExit, match="2"):
        contrastive.main(["--batch-size", "8", "--microbatches", "9"])
    assert "--batch-size 8 cannot make 9 micro-batches" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1541 training pairs do not fill --batch-size 2000"):
        contrastive.main(["--batch-size", "2000"])
