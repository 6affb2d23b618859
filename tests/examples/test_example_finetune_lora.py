"""LoRA's fine-tuning: packed, closed by bytes; stopped in a window, it goes on to the same bits."""

import itertools

import finetune_lora
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import assert_trees_equal
from flax import nnx
from stopped import run_stopped

SMALL = [
    *("--max-bytes", "200000", "--layers", "1", "--width", "16", "--heads", "2", "--length", "96"),
    *("--rank", "2", "--base-updates", "3", "--base-rows", "4", "--calls", "12", "--documents", "6"),
    *("--update-bytes", "600", "--microbatch-rows", "1", "--checkpoint-every", "4"),
]


def saved(folder, call):
    """The checkpoint after a call."""
    with ocp.CheckpointManager(folder / "lora") as manager:
        items = manager.restore(call, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    return items["state"]


def test_updates_by_bytes_and_a_run_stopped_in_a_window(tmp_path, capsys):
    folder, figure = tmp_path / "run", tmp_path / "figure.png"
    arguments = [*SMALL, "--figure", str(figure)]
    whole = finetune_lora.main(arguments)
    arguments += ["--checkpoints", str(folder)]
    run_stopped(finetune_lora, 8, arguments)
    resumed = finetune_lora.main(arguments)

    assert (whole.first_call, resumed.first_call) == (0, 4)
    assert 4 not in np.cumsum(whole.calls)  # a window was open
    assert_trees_equal(resumed.lora, whole.lora)
    assert resumed.losses == whole.losses
    assert resumed.bits_per_byte == whole.bits_per_byte
    with pytest.raises(AssertionError):
        assert_trees_equal(saved(folder, 8), saved(folder, 12))

    *full, last = whole.update_bytes
    assert min(full) >= 600
    assert last < 600  # the last call ended its window
    assert max(whole.calls) > 1
    assert len({*whole.counts}) > 1
    assert max(whole.counts) == whole.most
    assert whole.losses[-1] < whole.losses[0]
    assert whole.bits_per_byte["with LoRA"] < whole.bits_per_byte["base"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert f"{sum(whole.counts)} ran" in capsys.readouterr().out


PAIRS = [
    (b"def f(a):\n", b"Add.\n"),
    (b"def long_name(a, b):\n", b"Subtract it.\n"),
    (b"def g():\n", b"Go.\n"),
]


def test_packing_keeps_every_pair_and_counts_its_docstring():
    rows = finetune_lora.pack(PAIRS, length=40)
    assert rows.inputs.shape == (2, 40)  # the third goes where the first left room
    assert rows.document.max(1).tolist() == [2, 1]
    found = []
    for row, n in itertools.product(range(2), (1, 2)):
        if (here := rows.document[row] == n).any():
            header = bytes(rows.targets[row][here & ~rows.counted[row]])
            found.append((header, bytes(rows.targets[row][here & rows.counted[row]])))
            assert rows.position[row][here].tolist() == list(range(here.sum()))
            assert bytes(rows.inputs[row][here]) == b"\0" + bytes(rows.targets[row][here])[:-1]
    assert sorted(found) == sorted(PAIRS)
    assert not rows.counted[rows.document == 0].any()


def test_documents_in_a_row_do_not_see_each_other():
    size = finetune_lora.Size(layers=1, width=16, heads=2, length=40, rank=2)
    model = finetune_lora.Transformer(size, nnx.Rngs(0))
    together = finetune_lora.loss_fn(model, finetune_lora.pack(PAIRS, 40))
    alone = [finetune_lora.loss_fn(model, finetune_lora.pack([pair], 40)) for pair in PAIRS]
    np.testing.assert_allclose(together.total, sum(term.total for term in alone), rtol=1e-5)
    assert together.weight == sum(term.weight for term in alone)
    merged = finetune_lora.pack(PAIRS, 40)
    merged = merged._replace(document=np.minimum(merged.document, 1))
    assert abs(finetune_lora.loss_fn(model, merged).total - together.total) > 1e-3


def test_micro_batches_are_filled_up_with_rows_of_nothing():
    rows = finetune_lora.pack(PAIRS, length=40)
    batch, count = finetune_lora.as_micro_batches(rows, size=1, most=4)
    assert batch.inputs.shape == (4, 1, 40)
    assert count == 2
    assert_trees_equal(batch.inputs[:2, 0], rows.inputs)
    assert not batch.counted[2:].any()


def test_headers_and_docstrings_are_read_from_sources():
    source = b'def f(a, b=1):\n    """Add.\n\n    Twice."""\n\ndef g():\n    pass\n'
    pairs = finetune_lora.function_pairs([source, b"def broken(:"], length=96)
    assert pairs == [(b"def f(a, b=1):\n", b"Add.\n\nTwice.\n")]
    assert not finetune_lora.function_pairs([source], length=20)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--width", "10"], "2", "--heads must divide --width 10, got 4"),
        (["--rank", "0"], "2", "expected a whole number, 1 or more"),
        (["--max-bytes", "100"], "functions with docstrings to learn from", ""),
    ],
)
def test_refuses(arguments, code, message, capsys):
    with pytest.raises(SystemExit, match=code):
        finetune_lora.main(arguments)
    assert message in capsys.readouterr().err
