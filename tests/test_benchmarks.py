"""The benchmark runs, at sizes that say nothing; its figures are no test's business."""

import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.report import find_section, replace_section
from benchmarks.traffic import count_traffic

ROOT = pathlib.Path(__file__).parent.parent
TITLE = "As compiled for TPU v5e and H100"
pytest.importorskip("matplotlib")


def _run(folder, *args):
    env = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "benchmarks", *args]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=600)


def test_runs_and_writes_everything(tmp_path):
    (tmp_path / "RESULTS.md").write_text(f"# Old\n\n## Streaming\n\nold\n\n## {TITLE}\n\nkept\n")
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
    assert written.endswith(f"\n\n## {TITLE}\n\nkept\n")
    assert "old" not in written
    for name in ["streaming.png", "scanning.png"]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "| data_axes: all-reduces in loops | ≤ 0 | 0 | met |" in written


def test_a_section_is_replaced_alone():
    before, after = "# Benchmark\n\n## One\n\n1\n\n", "## Three\n\n3\n"
    results = f"{before}## Two\n\n2\n\n{after}"
    assert find_section(results, "Two") == "## Two\n\n2"
    assert find_section(results, "Tw") == ""
    assert replace_section(results, "## Two\n\nnew") == f"{before}## Two\n\nnew\n\n{after}"
    assert replace_section(results, "## Four\n\n4") == f"{results}\n## Four\n\n4\n"


TEXT = """HloModule step

%body (p: (pred[], f32[256,64], f32[256,64])) -> (pred[], f32[256,64], f32[256,64]) {
  %p = (pred[], f32[256,64]{1,0}, f32[256,64]{1,0}) parameter(0)
  %a = f32[256,64]{1,0} get-tuple-element(%p), index=1
  ROOT %n = f32[256,64]{1,0} negate(%a), metadata={op_name="jit(step)"}
}

ENTRY %main (a: f32[256,64], b: bf16[256,64]) -> f32[256,64] {
  %a = f32[256,64]{1,0:T(8,128)} parameter(0)
  %b = bf16[256,64]{1,0} parameter(1)
  %near = (f32[256,64]{1,0:T(8,128)S(1)}, f32[256,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %there = f32[256,64]{1,0:T(8,128)S(1)} copy-done(%near)
  %sum = f32[256,64]{1,0} fusion(%there, %b), kind=kLoop, calls=%fused
  %five = (pred[], f32[256,64]{1,0}) while(%sum), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %once = (pred[], f32[256,64]{1,0}) while(%five), condition=%c, body=%body
}
"""


def test_traffic_is_counted_from_a_program():
    copy = 256 * 64 * 4
    # Read for the copy, half (bf16) read and one written by the sum, five times two in the loop; two in what ends.
    assert count_traffic(TEXT) == (copy * (1 + 0.5 + 1 + 10), copy * 2)
    assert count_traffic(TEXT.replace("S(1)", "")).each_call == copy * (2 + 1 + 0.5 + 1 + 10)


def test_names_an_unknown_section(tmp_path):
    done = _run(tmp_path, "--only", "speed")
    assert done.returncode == 2
    assert "no section speed; choose from streaming, scanning" in done.stderr
