"""Two JAX processes on this machine, each with half of the rows, train as one process does on all of them."""

import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import process_worker
import pytest
from conftest import assert_trees_close

NUM_PROCESSES = 2
DEADLINE = 600  # seconds; it takes about 10, and on a busy machine many times that


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _start(index, port, folder):
    command = [sys.executable, "-W", "error", process_worker.__file__]
    address, output = f"127.0.0.1:{port}", folder / f"{index}.npz"
    with open(folder / f"{index}.log", "w") as log:
        return subprocess.Popen(
            [*command, address, str(NUM_PROCESSES), str(index), str(output)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )


def _run_all(folder):
    """Runs all processes to their end; none outlives this call, whatever happens."""
    port, deadline = _free_port(), time.monotonic() + DEADLINE
    processes = [_start(index, port, folder) for index in range(NUM_PROCESSES)]
    try:
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() for process in processes)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"{i}.log").read_text()[-3000:] for i in range(NUM_PROCESSES))
    assert [process.returncode for process in processes] == [0] * NUM_PROCESSES, logs


def test_two_processes_train_as_one(tmp_path):
    _run_all(tmp_path)
    expected = jax.device_get(process_worker.train_whole())
    modes = [f"{mode}-{kind}" for mode in process_worker.MODES for kind in process_worker.KINDS]
    expected = {f"{mode}/{name}": x for mode in modes for name, x in expected.items()}
    for index in range(NUM_PROCESSES):
        assert_trees_close(dict(np.load(tmp_path / f"{index}.npz")), expected, rtol=1e-4, atol=1e-5)


def _mean_of_means(params, batch):
    """The mean of two halves' means, as if their weights were equal."""
    halves = [{name: x[half::2] for name, x in batch.items()} for half in range(2)]
    means = [process_worker.WHOLE(params, half) for half in halves]
    return jax.tree.map(lambda a, b: (a + b) / 2, *means)


def test_the_comparison_can_fail():
    out, wrong = (jax.device_get(process_worker.train_whole(fn)) for fn in (process_worker.WHOLE, _mean_of_means))
    with pytest.raises(AssertionError, match="differ beyond"):
        assert_trees_close(wrong, out, rtol=1e-2, atol=1e-2)
