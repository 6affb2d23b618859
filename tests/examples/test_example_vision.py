"""The images: planned, trained, resumed in the middle of a window; a folder of them; and the mistakes."""

import numpy as np
import pytest
import vision
from conftest import assert_trees_equal
from flax.serialization import to_state_dict
from matplotlib.image import imsave
from stopped import run_stopped

SMALL = ["--updates=4", "--calls-per-update=2", "--batch-size=32", "--resolution=16", "--checkpoint-every=3"]


def test_vision(tmp_path, capsys):
    figure = tmp_path / "figures" / "vision.png"
    command = [*SMALL, "--memory=700KB", "--figure", str(figure)]
    result = vision.main(command)

    assert result.plan.num_microbatches > 1
    assert dict(result.plan.probes)[1] > result.plan.memory_limit == 700_000
    assert len(result.losses) == 8
    assert result.losses[-1] < result.losses[0]
    assert 0 < result.test_accuracy <= 1
    assert any(x.any() for x in _leaves(result.training.batch_stats, "mean"))
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "the fewest that fit" in capsys.readouterr().out

    command += ["--checkpoints", str(tmp_path / "checkpoints")]
    run_stopped(vision, 6, command)  # saved after call 3, in the middle of a window of 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
    resumed = vision.main(command)
    assert_trees_equal(to_state_dict(resumed.training), to_state_dict(result.training))
    assert resumed.losses == result.losses


def _leaves(tree, name):
    return [leaf[name] for leaf in tree.values()]


def test_vision_reads_a_folder(tmp_path):
    for label, name in enumerate(["dark", "light"]):
        (tmp_path / name).mkdir()
        for i in range(2):
            image = np.full((6, 9, 3) if i else (9, 6, 3), 40 + 150 * label, np.uint8)
            imsave(tmp_path / name / f"{i}.png", image)
    images, num_classes = vision.read_images(tmp_path, 8)
    assert num_classes == 2
    assert images.pixels.shape == (4, 8, 8, 3)
    assert images.pixels.dtype == np.uint8
    assert images.pixels.mean((1, 2, 3)).tolist() == [40, 40, 190, 190]
    assert images.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "dark" / "broken.png").write_text("no image")
    with pytest.raises(SystemExit, match=r"broken\.png is not an image that matplotlib can read"):
        vision.read_images(tmp_path, 8)


def test_vision_takes_sizes():
    assert vision.memory_size("64MB") == 64_000_000
    assert vision.memory_size("1.5 GiB") == 1.5 * 2**30
    assert vision.memory_size("100") == 100
    assert vision.memory_size("device") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "much"], "expected a size such as 64MB or 1.5GiB, or device; got much"),
        (["--memory", "0MB"], "expected a size such as 64MB"),
        (["--resolution", "4"], "--resolution must be 5 or more"),
        (["--batch-size", "none"], "expected a whole number, 1 or more; got none"),
    ],
)
def test_vision_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        vision.main(arguments)
    assert message in capsys.readouterr().err


def test_vision_refuses_what_cannot_be(tmp_path):
    with pytest.raises(SystemExit, match="expects a folder with a folder of images for each class"):
        vision.main(["--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="1438 images do not fill --batch-size 2000"):
        vision.main(["--batch-size", "2000"])
    with pytest.raises(SystemExit, match="--memory: expected some number of micro-batches to fit"):
        vision.main([*SMALL, "--memory", "1KB"])
