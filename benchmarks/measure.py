"""Timing in turns, and memory from compiled programs."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median as median
from typing import Any

import jax

MIB = 2**20


def interleave(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each contender took in each round; the order turns from round to round.

    Contenders take turns within a round, so that what else the machine does meets them alike, and the ratio
    of two within a round means more than the ratio of their medians. Each runs once before the first round.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(-1, repeats):
        start = round_index % len(names)
        for name in names[start:] + names[:start]:
            begin = time.perf_counter()
            jax.block_until_ready(contenders[name]())
            if round_index >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """The median over rounds of one contender's time over another's."""
    return over_sum(seconds, over, [under])


def over_sum(seconds: Mapping[str, list[float]], over: str, under: Sequence[str]) -> float:
    """The median over rounds of one contender's time over that of several one after another."""
    sums = [sum(times) for times in zip(*(seconds[name] for name in under), strict=True)]
    return median(a / b for a, b in zip(seconds[over], sums, strict=True))


def num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def temp_bytes(compiled: Any) -> int:
    """What a compiled program allocates beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def copies(tree: Any) -> Any:
    """The same arrays in buffers of their own, to donate."""
    return jax.tree.map(lambda x: x.copy(), tree)


def peak_bytes() -> int | None:
    """The most that the device has held in this process; None where it does not say (CPU)."""
    stats = jax.devices()[0].memory_stats()
    return stats and stats.get("peak_bytes_in_use")
