"""The benchmark runs, at sizes that say nothing; its figures are no test's business."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytest.importorskip("matplotlib")


def _run(folder, *args):
    env = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # most of the time is compilation
    env |= {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "benchmarks", *args]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=600
    )


def test_runs_and_writes_everything(tmp_path):
    done = _run(tmp_path / "compiled", "--tiny", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    written = (tmp_path / "RESULTS.md").read_text()
    assert written.strip() in done.stdout
    for part in [
        "Streaming",
        "Scanning",
        "Collectives",
        "Two processes",
        "Accuracy of sums",
        "Date",
        "limit",
    ]:
        assert part in written
    for name in ["streaming.png", "scanning.png"]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "| data_axes: all-reduces in loops | ≤ 0 | 0 | met |" in written


def test_names_an_unknown_section(tmp_path):
    done = _run(tmp_path, "--only", "speed")
    assert done.returncode == 2
    assert "no section speed; choose from streaming, scanning" in done.stderr
