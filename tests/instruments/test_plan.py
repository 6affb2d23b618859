"""The planner against brute force, for known memory functions. Compiled programs: test_plan_programs.py."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaccum


class _Memory:
    """What `compiled.memory_analysis()` gives, with peaks and host memory that are not to be counted."""

    peak_memory_in_bytes = host_temp_size_in_bytes = generated_code_size_in_bytes = 10**15

    def __init__(self, temp, argument=0, output=0, alias=0):
        self.temp_size_in_bytes, self.argument_size_in_bytes = temp, argument
        self.output_size_in_bytes, self.alias_size_in_bytes = output, alias


class _Steps:
    """A `make_step` whose programs need what `memory_fn(microbatch_size)` says; it counts compilations."""

    def __init__(self, batch_size, memory_fn):
        self.batch_size, self.memory_fn, self.compiled = batch_size, memory_fn, []

    def __call__(self, num_microbatches):
        assert self.batch_size % num_microbatches == 0
        return _Step(self, num_microbatches)

    def plan(self, memory_limit, **options):
        options = {"batch_size": self.batch_size, "memory_limit": memory_limit} | options
        return optaccum.plan_microbatches(self, (), **options)


class _Step:
    def __init__(self, steps, num_microbatches):
        self.steps, self.num_microbatches = steps, num_microbatches

    def __call__(self):
        raise AssertionError("a step was executed")

    def lower(self, *args):
        return self

    def compile(self):
        self.steps.compiled.append(self.num_microbatches)
        return self

    def memory_analysis(self):
        memory = self.steps.memory_fn(self.steps.batch_size // self.num_microbatches)
        return memory if isinstance(memory, _Memory | None) else _Memory(int(memory))


@functools.cache
def _divisors(batch_size):
    return [n for n in range(1, batch_size + 1) if batch_size % n == 0]


def _brute_force(batch_size, memory_fn, limit):
    return next((n for n in _divisors(batch_size) if memory_fn(batch_size // n) <= limit), None)


def _check(batch_size, memory_fn, limit, most):
    """The plan, checked against brute force; at most so many programs, none of them twice."""
    steps = _Steps(batch_size, memory_fn)
    fewest = _brute_force(batch_size, memory_fn, limit)
    if fewest is None:
        smallest = min(memory_fn(batch_size // n) for n in _divisors(batch_size))
        with pytest.raises(ValueError, match=f"smallest need found: {smallest:,} bytes"):
            steps.plan(limit)
    else:
        plan = steps.plan(limit)
        assert (plan.num_microbatches, plan.microbatch_size) == (fewest, batch_size // fewest)
        needs = dict(plan.probes)
        assert list(needs) == steps.compiled
        assert needs == {n: memory_fn(batch_size // n) for n in needs}
        if fewest > 1:
            divisors = _divisors(batch_size)
            next_fewer = divisors[divisors.index(fewest) - 1]
            assert needs[fewest] <= limit < needs[next_fewer]
    assert len(set(steps.compiled)) == len(steps.compiled) <= most
    return len(steps.compiled)


def _limits(batch_size, memory_fn):
    """Just enough for each size, one byte less, and something between."""
    needs = sorted({memory_fn(batch_size // n) for n in _divisors(batch_size)})
    between = [(a + b) // 2 for a, b in itertools.pairwise(needs)]
    return [*needs, *(need - 1 for need in needs), *between, 2 * needs[-1]]


@pytest.mark.parametrize("batch_size", [1, 2, 6, 97, 4096, 30030, 720_720])
@pytest.mark.parametrize("offset", [0, 10**9])
def test_the_list_of_divisors_is_halved(batch_size, offset):
    """The whole batch, then 8 programs for the other 239 divisors of 720,720."""

    def memory_fn(size):
        return offset + 1000 * size

    most = 1 + len(_divisors(batch_size)[1:]).bit_length()
    limits = [limit for limit in _limits(batch_size, memory_fn) if limit >= memory_fn(1)]
    numbers = [_check(batch_size, memory_fn, limit, most) for limit in limits]
    assert (min(numbers), max(numbers)) == (1, most)
    _check(batch_size, memory_fn, memory_fn(1) - 1, most + 7)


def test_misleading_small_sizes_and_a_whole_batch_without_a_loop():
    def memory_fn(size):
        small = {1: 1.3, 2: 1.08, 4: 1.02}.get(size, 1.0)  # the need of 1 is above that of 2
        return int((50_000 + 1000 * size) * small) - (20_000 if size == 512 else 0)

    needs = [memory_fn(2**i) for i in range(10)]
    assert needs[0] > needs[1], "small sizes do not mislead"
    for limit in _limits(512, memory_fn):
        _check(512, memory_fn, limit, most=8)


def test_a_whole_batch_that_needs_less_than_half_of_it():
    needs = {64: 900, 32: 1000, 16: 600, 8: 400, 4: 300, 2: 250, 1: 225}
    assert _Steps(64, needs.get).plan(950).num_microbatches == 1
    assert _Steps(64, needs.get).plan(899).num_microbatches == 4


@pytest.mark.parametrize("seed", range(10))
def test_any_monotone_memory(seed):
    rng = np.random.default_rng(seed)
    batch_size = int(rng.choice([48, 360, 1024, 5040]))
    divisors = _divisors(batch_size)
    jumps = np.exp(rng.uniform(0, rng.choice([1, 8, 16]), len(divisors))).astype(int) * (
        rng.random(len(divisors)) < 0.7
    )
    needs = dict(zip(divisors, (1000 + np.cumsum(jumps)).tolist(), strict=True))
    most = 1 + len(divisors).bit_length() + 6
    for limit in _limits(batch_size, needs.__getitem__):
        _check(batch_size, needs.__getitem__, limit, most=most)


@pytest.mark.parametrize("seed", range(10))
def test_any_memory_gives_a_plan_that_was_compiled(seed):
    rng = np.random.default_rng(seed)
    needs = dict(zip(_divisors(720), rng.integers(100, 1000, len(_divisors(720))).tolist(), strict=True))
    needs[8] = min(needs[8], 500)
    steps = _Steps(720, needs.__getitem__)
    plan = steps.plan(500)
    probes = dict(plan.probes)
    divisors = _divisors(720)
    assert probes[plan.num_microbatches] == needs[plan.microbatch_size] <= 500
    if plan.num_microbatches > 1:
        assert probes[divisors[divisors.index(plan.num_microbatches) - 1]] > 500
    assert len(set(steps.compiled)) == len(steps.compiled)


def test_need_counts_donated_arguments_once():
    plan = _Steps(2, lambda size: _Memory(1000 * size, argument=70, output=50, alias=40)).plan(2080)
    assert plan.probes == ((1, 2080),)
    kept = _Steps(2, lambda size: _Memory(1000 * size, argument=70, output=50)).plan(2080)
    assert kept.probes == ((1, 2120), (2, 1120))


OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: out of HBM"


def _out_of_memory_above(size, error_type=jax.errors.JaxRuntimeError, message=OUT_OF_MEMORY):
    def memory_fn(b):
        if b > size:
            raise error_type(message)
        return 1000 * b

    return memory_fn


@pytest.mark.parametrize("error_type", [jax.errors.JaxRuntimeError, RuntimeError, ValueError])
@pytest.mark.parametrize("fits", [1, 8, 512])
def test_a_compiler_out_of_memory_means_that_it_does_not_fit(error_type, fits):
    steps = _Steps(1024, _out_of_memory_above(fits, error_type))
    plan = steps.plan(10**9)
    assert plan.microbatch_size == fits
    assert dict(plan.probes)[plan.num_microbatches // 2] == math.inf
    assert len(set(steps.compiled)) == len(steps.compiled) <= 9
    assert "out of memory  no" in str(plan)


def test_a_compiler_out_of_memory_below_the_limit_that_decides():
    assert _Steps(1024, _out_of_memory_above(256)).plan(32_000).microbatch_size == 32


def test_other_errors_propagate():
    for message in ("INTERNAL: miscompiled", "INVALID_ARGUMENT"):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            _Steps(64, _out_of_memory_above(0, message=message)).plan(10**9)


def test_nothing_fits():
    with pytest.raises(ValueError, match=r"smallest need found: 1,000 bytes, with num_microbatches=64\b"):
        _Steps(64, lambda size: 1000 * size).plan(999)
    hopeless = _Steps(64, lambda size: 10**6 + 1000 * size)
    with pytest.raises(ValueError, match="1,001,000 bytes"):
        hopeless.plan(999)
    assert hopeless.compiled == [1, 8, 32, 64]
    with pytest.raises(ValueError, match=r"every program"):
        _Steps(64, _out_of_memory_above(0)).plan(10**9)
    dip = {64: 990, 32: 900, 16: 800, 8: 700, 4: 600, 2: 500, 1: 550}
    with pytest.raises(ValueError, match=r"smallest need found: 500 bytes, with num_microbatches=32\b"):
        _Steps(64, dip.get).plan(499)
    assert _Steps(64, dip.get).plan(500).num_microbatches == 32


def test_each_probe_is_reported_as_it_comes():
    steps = _Steps(1024, lambda size: 5000 + 1000 * size)
    reported = []

    def on_probe(probe):
        reported.append(probe)
        assert steps.compiled == [probe.num_microbatches for probe in reported]

    plan = steps.plan(100_000, on_probe=on_probe)
    assert tuple(reported) == plan.probes
    assert len(plan.probes) >= 3
    assert reported[0] == (1, 1_029_000) == (reported[0].num_microbatches, reported[0].num_bytes)


def test_table():
    assert str(_Steps(6, lambda size: 1000 * size).plan(2500)).splitlines() == [
        "batch of 6 examples, memory limit 2,500 bytes",
        "micro-batches  examples each  bytes needed  fits",
        "            1              6         6,000  no",
        "            2              3         3,000  no",
        "            3              2         2,000  yes  <- the fewest that fit",
    ]


class _Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        if self.stats == "compile only":
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: only supported for addressable PjRt devices.")
        return self.stats


class _Placed:
    """An argument that lies on these devices."""

    def __init__(self, *stats):
        self.sharding = self
        self.addressable_devices = {_Device(stat) for stat in stats}


def test_the_limit_of_the_devices():
    def plan(*args, **options):
        steps = _Steps(64, lambda size: 1000 * size)
        return optaccum.plan_microbatches(steps, args, batch_size=64, **options)

    limits = [{"bytes_limit": 40_000}, {"bytes_limit": 20_000}]
    assert plan(_Placed(limits[0])).num_microbatches == 2
    assert plan({"x": _Placed(*limits)}).memory_limit == 20_000
    assert plan(_Placed(limits[0]), _Placed(limits[1])).num_microbatches == 4
    assert plan(_Placed(limits[0]), memory_limit=70_000).num_microbatches == 1
    for stats in (None, {"bytes_in_use": 1}, "compile only"):
        with pytest.raises(ValueError, match="memory_limit to be given"):
            plan(_Placed(stats))
        assert plan(_Placed(stats), memory_limit=70_000).num_microbatches == 1
    for args in [(), (jnp.ones(8),)]:
        with pytest.raises(ValueError, match="memory_limit to be given"):
            plan(*args)


@pytest.mark.parametrize(("limit", "n"), [(0.5 * 64_000, 2), (np.float32(16e3), 4), (np.int64(16_000), 4)])
def test_limits_and_sizes_of_other_types(limit, n):
    plan = _Steps(64, lambda size: 1000 * size).plan(limit, batch_size=np.int32(64))
    assert (plan.num_microbatches, plan.memory_limit) == (n, limit)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size to be an int >= 1; got 0"),
        ({"batch_size": -8}, ValueError, "batch_size"),
        ({"batch_size": 8.0}, TypeError, "batch_size to be an int"),
        ({"batch_size": True}, TypeError, "batch_size"),
        ({"batch_size": None}, TypeError, "batch_size"),
        ({"memory_limit": 0}, ValueError, "memory_limit to be a positive"),
        ({"memory_limit": math.nan}, ValueError, "memory_limit"),
        ({"memory_limit": math.inf}, ValueError, "memory_limit"),
        ({"memory_limit": "16GB"}, TypeError, "memory_limit to be a number"),
        ({"memory_limit": True}, TypeError, "memory_limit"),
        ({"args": jnp.ones(3)}, TypeError, "args to be a tuple"),
        ({"args": {"x": 1}}, TypeError, "args to be a tuple"),
    ],
)
def test_bad_arguments(options, error, message):
    options = {"args": (), "batch_size": 8, "memory_limit": 10**6} | options
    steps = _Steps(8, lambda size: 1000 * size)
    with pytest.raises(error, match=message):
        optaccum.plan_microbatches(steps, **options)
    assert not steps.compiled


def test_a_backend_without_memory_analysis():
    with pytest.raises(ValueError, match="analyse its programs' memory; got None"):
        _Steps(8, lambda size: None).plan(1000)
