"""The pod program: as one process, and as two real ones, killed, stopped, started wrongly, and going on."""

import gc
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple

import _compile_for
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tpu_data_parallel
from conftest import assert_trees_equal
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optaccum

EXAMPLES = pathlib.Path(tpu_data_parallel.__file__).parent
SECONDS = 900  # for all processes of a test together; none is waited for longer, however busy the machine

# 12 calls in windows of 3; checkpoints after calls 4 and 8, in the middle of a window.
SMALL = [
    *("--max-bytes", "20000", "--layers", "1", "--width", "16", "--heads", "2", "--length", "32"),
    *("--batch-size", "8", "--updates", "4", "--calls-per-update", "3", "--checkpoint-every", "4"),
]

# Runs the program, which sends itself a signal when it has written down the metrics of a given call.
HOST = """
import os, signal, sys
import tpu_data_parallel as program

name, call = sys.argv[1].split("@")
note = program.note

def note_then_signal(record, *rest):
    wished = note(record, *rest)
    if len(record["losses"]) == int(call):
        os.kill(os.getpid(), getattr(signal, name))
    return wished

program.note = note_then_signal
program.main(sys.argv[2:])
"""
NO_SIGNAL = "SIGTERM@0"


class Ended(NamedTuple):
    """A process that has ended."""

    code: int
    text: str  # all it printed


class Pod(NamedTuple):
    """Two hosts of two devices each, parameters sharded over all, started again and again within one limit of time."""

    folder: pathlib.Path
    deadline: float

    def run(
        self,
        checkpoints: str,
        *,
        signals: tuple[str, str] = (NO_SIGNAL, NO_SIGNAL),
        other: tuple[str, ...] = (),
    ) -> list[Ended]:
        """Both hosts' ends; `other` is what host 1 is told besides."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--num-processes", "2"]
        folders = ["--checkpoints", self.folder / checkpoints, "--figure", self.folder / "figure.png"]
        argv = [*SMALL, *folders, "--fsdp", "--simulate-devices", "2", "--timeout", "300", *place]
        hosts = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    HOST,
                    signals[i],
                    *argv,
                    "--process-id",
                    str(i),
                    *(other if i else ()),
                ],
                env=self._environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(2)
        ]
        try:
            return [self._wait(host) for host in hosts]
        finally:
            for host in hosts:
                host.kill()
                host.communicate()

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)]),
            # One host may read what the other writes into the cache, too early.
            "PYTHONWARNINGS": "error,ignore:Error reading persistent compilation cache entry",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def _wait(self, host: subprocess.Popen) -> Ended:
        text, _ = host.communicate(timeout=max(0.0, self.deadline - time.monotonic()))
        return Ended(host.returncode, text)


@pytest.fixture
def pod(tmp_path) -> Pod:
    return Pod(tmp_path, time.monotonic() + SECONDS)


def saved(folder: pathlib.Path, call: int) -> dict[str, Any]:
    """The checkpoint after a call, as NumPy arrays."""
    state = folder / str(call) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(state).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(state, restore_args=as_numpy)


def test_two_hosts_killed_and_stopped_in_the_middle_of_windows(pod):
    undisturbed = pod.run("undisturbed")
    assert [host.code for host in undisturbed] == [0, 0], undisturbed
    assert "2 hosts, {'data': 4, 'model': 1} devices" in undisturbed[0].text
    assert "done after call 12: 4 updates" in undisturbed[0].text
    assert "done" not in undisturbed[1].text  # process 0 speaks for all

    killed = pod.run("run", signals=("SIGKILL@6", "SIGKILL@6"))
    assert killed[1].code == -signal.SIGKILL, killed
    assert killed[0].code != 0, killed
    stopped = pod.run("run", signals=(NO_SIGNAL, "SIGTERM@6"))  # pre-emption of host 1 alone
    assert [host.code for host in stopped] == [0, 0], stopped
    assert "from call 4" in stopped[0].text  # 4 = 3 + 1: a window was open
    assert "stopped after call 8" in stopped[0].text  # told with call 7, read and agreed while call 8 ran
    ended = pod.run("run")
    assert [host.code for host in ended] == [0, 0], ended
    assert "from call 8" in ended[0].text

    expected = saved(pod.folder / "undisturbed", 12)
    assert_trees_equal(saved(pod.folder / "run", 12), expected)
    assert expected["opt_state"]["gradient_step"] == 4
    with pytest.raises(AssertionError):  # 8 is another state: the comparison sees it
        assert_trees_equal(saved(pod.folder / "run", 8), expected)


def test_two_hosts_started_differently_fail_at_the_start(pod):
    for host in pod.run("run", other=("--learning-rate", "0.1")):
        assert host.code == 1, host
        assert "learning_rate is 0.003 on host 0, 0.1 on host 1" in host.text
    assert not (pod.folder / "run").exists()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the program here, on eight devices; with a signal after a call, if one is given."""
    note = tpu_data_parallel.note

    def run(checkpoints: str, *arguments: str, sigterm_after: int = 0) -> tpu_data_parallel.Result:
        def note_then_signal(record, *rest):
            wished = note(record, *rest)
            if len(record["losses"]) == sigterm_after:
                signal.raise_signal(signal.SIGTERM)
            return wished

        monkeypatch.setattr(tpu_data_parallel, "note", note_then_signal)
        folders = ["--checkpoints", str(tmp_path / checkpoints), "--figure", str(tmp_path / "figure.png")]
        return tpu_data_parallel.main([*SMALL, "--simulate-devices", "8", *folders, *arguments])

    return run


def test_stopped_run_goes_on_to_the_same_parameters(run, tmp_path, capsys):
    two = ("--model-devices", "2", "--checkpoint-every", "100")
    whole = run("whole", *two)
    assert (whole.first_call, whole.calls, whole.updates, whole.stopped) == (0, 12, 4, False)
    assert whole.losses[-1] < whole.losses[0]
    before = signal.getsignal(signal.SIGTERM)
    stopped = run("run", *two, sigterm_after=4)  # noted while 5 runs, told with 6, agreed while 7 runs
    assert (stopped.first_call, stopped.calls, stopped.updates, stopped.stopped) == (0, 7, 2, True)
    assert signal.getsignal(signal.SIGTERM) == before
    resumed = run("run", *two)
    assert (resumed.first_call, resumed.calls, resumed.updates, resumed.stopped) == (7, 12, 4, False)
    assert resumed.losses == whole.losses
    assert resumed.tokens == whole.tokens == sum(whole.record["tokens"])
    assert_trees_equal(saved(tmp_path / "run", 12), saved(tmp_path / "whole", 12))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "stopped after call 7" in capsys.readouterr().out

    again = run("run", *two)  # nothing is left to do
    assert (again.first_call, again.calls, again.collectives) == (12, 12, None)
    assert again.losses == whole.losses


def test_fsdp_goes_on_in_the_middle_of_a_window_in_another_layout(run):
    rows = ("--batch-size", "16")
    whole = run("whole", *rows, "--model-devices", "2", "--checkpoint-every", "100")
    sharded = run("run", *rows, "--fsdp", "--model-devices", "2", "--stop-after", "4")  # 4 = 3 + 1: a window is open
    assert "all-gather" not in sharded.collectives.in_loops
    assert sharded.collectives.outside["all-gather"] >= 1
    assert sharded.collectives.outside["reduce-scatter"] >= 1
    resumed = run("run", *rows, "--fsdp", "layers")  # over eight devices, where it was over four times two
    assert resumed.collectives.in_loops  # as JAX places them
    assert (resumed.first_call, resumed.calls, resumed.updates) == (4, 12, 4)
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=1e-4)
    assert abs(whole.losses[-1] / whole.losses[0] - 1) > 1e-2


def test_ways_to_shard_are_compared_in_the_memory_that_there_is(capsys):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec, num_layers = P(None, "data"), 3

    def placed(shape, spec):
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))

    def loss_fn(weights, rows):
        return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), rows, weights)[0] ** 2)

    def steps(**options):
        return lambda n: jax.jit(optaccum.value_and_grad(loss_fn, num_microbatches=n, **options))

    once = {"data_axes": "data", "param_specs": spec}
    ways = {"window": steps(**once), "sums": steps(**once, shard_sums=True), "layers": steps()}
    args = placed((num_layers, 64, 64), spec), placed((8 * 4, 16, 64), P("data"))
    roomy = _compile_for.compare(ways, args, mesh, num_layers, 4, 2**30)
    assert {name: way.num_microbatches for name, way in roomy.items()} == dict.fromkeys(ways, 1)
    # Weights are gathered, their gradients scattered in eighths, the loss's total and weight all-reduced.
    size = 4 * num_layers * 64**2
    assert roomy["window"].wire_bytes == size + 7 * size // 8 + 2 * (4 + 4)
    assert "window" in capsys.readouterr().out

    tight = _compile_for.compare(ways, args, mesh, num_layers, 4, roomy["window"].num_bytes - 1)
    assert tight["window"].num_microbatches > 1
    assert tight["window"].wire_bytes == roomy["window"].wire_bytes
    assert tight["layers"].wire_bytes == tight["layers"].num_microbatches * roomy["layers"].wire_bytes
    assert _compile_for.compare(ways, args, mesh, num_layers, 4, 2**10) == {}
    assert capsys.readouterr().out.count("to fit into 1,024 bytes") == 3


# Where one array cannot be read, Orbax closes its event loop and leaves the coroutines of the others behind. They
# complain when they are collected, which gc.collect makes happen here.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_gradients_cross_devices_once_per_call_and_damaged_checkpoints_are_set_aside(run, tmp_path, capsys):
    whole = run("run", "--batch-size", "16")
    assert whole.collectives is not None
    assert "all-reduce" not in whole.collectives.in_loops
    assert whole.collectives.outside["all-reduce"] >= 1
    data = [path for path in (tmp_path / "run/12/state").rglob("*") if path.parent.name == "d"]
    assert data
    for path in data:
        path.write_bytes(path.read_bytes()[:100])
    again = run("run", "--batch-size", "16")
    assert (again.first_call, again.calls) == (8, 12)
    assert again.losses == whole.losses
    assert "Checkpoint 12 cannot be read" in capsys.readouterr().out
    assert (tmp_path / "run/unreadable-12").exists()
    with pytest.raises(SystemExit, match=r"other settings: updates 4, now 5"):
        run("run", "--batch-size", "16", "--updates", "5")
    gc.collect()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "3"], "--model-devices 1 must divide --heads 3, which must divide --width 16"),
        (["--calls-per-update", "0"], "expected a whole number, 1 or more"),
        (["--compile-for", "v5e"], 'expected a target such as "v5e:2x4" or "h100:1x1x8"'),
        (["--compile-for", "abacus:2x4"], "of v5e, v5p, v6e, h100; got 'abacus:2x4'"),
        (["--memory", "16"], "--memory goes with --compile-for"),
    ],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        tpu_data_parallel.main([*SMALL, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "6", "--width", "18", "--model-devices", "3"], "must divide a host's 8 devices"),
        (["--batch-size", "12"], "--batch-size 12 must divide over the 8 devices"),
        (["--data", "/nowhere"], "--data /nowhere is neither a file nor a folder"),
    ],
)
def test_refuses_what_the_devices_rule_out(arguments, message):
    with pytest.raises(SystemExit, match=message):
        tpu_data_parallel.main([*SMALL, "--simulate-devices", "8", *arguments])
