"""Every program runs, small, and returns what it should have measured."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest
import quickstart


def test_quickstart(tmp_path, capsys):
    figure = tmp_path / "figures" / "quickstart.png"
    results = quickstart.main(["--updates", "12", "--batch-size", "128", "--figure", str(figure)])

    whole, *accumulated = results
    assert [r.name for r in accumulated] == [
        "optaccum, streaming",
        "optaccum, scanned",
        "optax.MultiSteps",
        "optax microbatch",
    ]
    assert len(whole.losses) == 12
    assert whole.losses[-1] < 0.8 * whole.losses[0]
    assert whole.test_accuracy > 0.3
    for result in accumulated:
        np.testing.assert_allclose(result.losses, whole.losses, rtol=1e-5)
        assert 0 < result.max_difference < 1e-5
        assert abs(result.test_accuracy - whole.test_accuracy) < 0.01
        assert result.temp_bytes < whole.temp_bytes / 3
        assert result.milliseconds > 0
    streaming, scanned, multi_steps, microbatch = accumulated
    assert streaming.temp_bytes < multi_steps.temp_bytes
    assert scanned.temp_bytes <= microbatch.temp_bytes
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(result.name in printed for result in results)


def test_quickstart_sees_a_difference():
    params = {"w": jnp.ones(3), "b": jnp.zeros(1)}
    assert quickstart.max_difference(params, params) == 0
    assert quickstart.max_difference(params, params | {"b": jnp.full(1, 0.5)}) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--updates", "0"], "--updates must be at least 1"),
        (["--batch-size", "1438"], "--batch-size must be from 1 to 1437"),
        (["--microbatches", "7"], "--microbatches must divide --batch-size 256"),
    ],
)
def test_quickstart_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        quickstart.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("quickstart", "--microbatches"),
        ("contrastive", "--microbatches"),
        ("finetune_lora", "--update-bytes"),
        ("language_model", "--experts"),
        ("streaming_loader", "--ramp"),
        ("tpu_data_parallel", "--simulate-devices"),
        ("vision", "--resolution"),
    ],
)
def test_explains_itself(name, option, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(name).main(["--help"])
    assert option in capsys.readouterr().out
