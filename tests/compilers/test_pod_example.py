"""examples/tpu_data_parallel.py --compile-for: what a pod would need that is not there."""

import pytest
import tpu_data_parallel

SMALL = ["--layers", "2", "--width", "256", "--length", "128", "--batch-size", "512", "--bfloat16"]


@pytest.mark.parametrize(("target", "number"), [("v5e:16x16", 256), ("h100:1x1x8", 8)])
def test_says_what_a_pod_would_need(target, number, capsys):
    found = tpu_data_parallel.main([*SMALL, "--compile-for", target])
    text = capsys.readouterr().out
    assert f"{target}, {number} devices, --microbatches 2; on each device:" in text
    assert "crosses in loops: nothing" in text
    assert found.num_devices == number
    layers = 4 * 12 * 2 * 256**2  # bytes
    assert found.num_bytes > found.donated_bytes > 4 * layers  # parameters, sum and Adam's moments
    assert found.collectives.outside["all-reduce"] >= 1
    assert found.collectives.bytes_outside["all-reduce"] >= layers
    assert found.plan is None


def test_finds_the_fewest_micro_batches_that_fit(capsys):
    few = [*SMALL, "--layers", "1", "--batch-size", "64", "--compile-for", "h100:1x1x8"]
    whole = tpu_data_parallel.main([*few, "--memory"])
    assert whole.plan.num_microbatches == 1
    gib = (whole.num_bytes - 2**22) / 2**30
    split = tpu_data_parallel.main([*few, "--memory", str(gib)])
    assert split.plan.num_microbatches > 1
    assert split.num_bytes < gib * 2**30 < whole.num_bytes
    assert "<- the fewest that fit" in capsys.readouterr().out
    assert not split.collectives.in_loops


def test_plans_each_way_to_shard(capsys):
    smaller = ["--width", "128", "--length", "64", "--batch-size", "8"]
    arguments = [*SMALL, *smaller, "--fsdp", "--compile-for", "h100:1x1x8", "--memory"]
    found = tpu_data_parallel.main(arguments)
    assert set(found) == {"window", "sums", "layers"}
    assert found["window"].wire_bytes <= found["sums"].wire_bytes < found["layers"].wire_bytes
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["--fsdp", "micro-batches"]
    assert [line.split()[0] for line in lines[1:]] == list(found)
