"""How many micro-batches does this step need, in this much memory?"""

import math
import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

# Below this micro-batch size memory is not yet affine in the size: padding and alignment weigh too much.
_AFFINE_FROM = 8
# So many probes follow the line; what is left of the bracket after them is halved each time.
_NUM_PREDICTED = 5


class Probe(NamedTuple):
    """One compiled program: a `(num_microbatches, num_bytes)` pair."""

    num_microbatches: int
    num_bytes: int | float  # bytes on each device; infinite where the compiler itself ran out of memory


class MicrobatchPlan(NamedTuple):
    """What `plan_microbatches` found; `str()` of it is a table."""

    num_microbatches: int  # the fewest that fit
    microbatch_size: int  # batch_size / num_microbatches, examples
    probes: tuple[Probe, ...]  # every program compiled, in order
    memory_limit: int  # bytes on each device

    def __str__(self) -> str:
        """The probes as a table, fewest micro-batches first."""
        batch_size = self.num_microbatches * self.microbatch_size
        rows = [("micro-batches", "examples each", "bytes needed", "fits")]
        for num_microbatches, num_bytes in sorted(self.probes):
            chosen = "  <- the fewest that fit" if num_microbatches == self.num_microbatches else ""
            fits = ("yes" if num_bytes <= self.memory_limit else "no") + chosen
            size = f"{batch_size // num_microbatches:,}"
            rows.append((f"{num_microbatches:,}", size, _format_bytes(num_bytes), fits))
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]]
        lines = ["  ".join([*map(str.rjust, row, widths), row[3]]) for row in rows]
        return "\n".join(
            [f"batch of {batch_size:,} examples, memory limit {self.memory_limit:,} bytes", *lines]
        )


class _Need(NamedTuple):
    total: int | float  # bytes the program needs
    fixed: int | float  # of these, arguments and outputs: the same for every number of micro-batches


def plan_microbatches(
    make_step: Callable[[int], Callable[..., Any]],
    args: Sequence[Any],
    *,
    batch_size: int,
    memory_limit: float | None = None,
    on_probe: Callable[[Probe], object] | None = None,
) -> MicrobatchPlan:
    r"""Finds the fewest micro-batches whose step fits into memory, without running anything.

    A step is compiled, and the compiler's own account of its memory is read:

    $$ \mathrm{need}(n) = \mathrm{temp} + \mathrm{argument} + \mathrm{output} - \mathrm{alias} $$

    bytes on each device (donated arguments are the alias; what is offloaded to the host does not count). From
    micro-batches of 8 examples up, the need is close to affine in the micro-batch size b = batch_size / n,

    $$ \mathrm{need} \approx \alpha + \beta b, $$

    so that few programs have to be compiled:

    1. The whole batch, n = 1. If it fits, that is the answer.
    2. The size at which the line through that need and through (0, arguments and outputs) crosses the limit.
    3. The sizes at which the line through the two needs nearest to the limit crosses it, until a size that
       fits and the next larger divisor, which does not, have both been compiled. Sizes below 8 and the whole
       batch (its program has no loop) are left out of the line where others are known. After five probes the
       bracket is halved instead.

    Where memory is affine, that is three or four programs. The line only decides what to compile next; the
    answer rests on compiled programs alone, whatever the shape of the curve: it fits, and the program with
    the next fewer micro-batches does not. (Where memory falls as the micro-batch grows, a still larger size
    that was never compiled might fit as well.) Before saying that nothing fits, every size up to 8 is
    compiled, unless one example alone needs more than twice the limit.

    Args:
        make_step: from a number of micro-batches to the step: a function to be jitted, or one that `jax.jit`
            already made (with `donate_argnums`, shardings, ...).
        args: the step's positional arguments: arrays or `jax.ShapeDtypeStruct`s (with shardings, on several
            devices).
        batch_size: examples in the batch, at least 1; its divisors are the candidates. Where each device
            splits its own rows (`data_axes`), the rows of one device.
        memory_limit: bytes on each device. None: the smallest limit among the devices of `args`, or the first
            local device's. What other arrays occupy on the device has to be subtracted by the caller.
        on_probe: called with each `(num_microbatches, bytes)` pair as soon as it is known.

    Returns:
        A NamedTuple with `num_microbatches`, `microbatch_size`, `probes` (a tuple of `(num_microbatches,
        bytes)` pairs in the order of compilation; infinite bytes where the compiler gave up with
        RESOURCE_EXHAUSTED) and `memory_limit`. `str()` of it is a table.

    Raises:
        ValueError: nothing fits (the message gives the smallest need found), the device's limit is unknown
            and `memory_limit` is None, or a number is not positive.
        TypeError: `batch_size`, `memory_limit` or `args` is of another type.

    Example:
        >>> import jax, jax.numpy as jnp, optaccum
        >>> def make_step(num_microbatches):
        ...     def step(w, x):
        ...         micro_batches = x.reshape(num_microbatches, -1, 64)
        ...         return jax.lax.map(lambda x: jnp.sort(jnp.sin(x @ w)).sum(), micro_batches)
        ...     return step
        >>> w, x = jax.ShapeDtypeStruct((64, 4096), "float32"), jax.ShapeDtypeStruct((64, 64), "float32")
        >>> plan = optaccum.plan_microbatches(make_step, (w, x), batch_size=64, memory_limit=1_500_000)
        >>> plan.num_microbatches, plan.microbatch_size
        (4, 16)
    """
    sizes = _divisors(_positive_int(batch_size))
    limit = _limit(memory_limit, args)
    needs: dict[int, _Need] = {}  # micro-batch size -> what its program needs
    probes: list[Probe] = []
    size: int | None = sizes[-1]
    while size is not None:
        num_microbatches = sizes[-1] // size
        needs[size] = _compiled_need(make_step(num_microbatches), args)
        probes.append(Probe(num_microbatches, needs[size].total))
        if on_probe is not None:
            on_probe(probes[-1])
        size = _next_size(sizes, needs, limit)
    fitting = [size for size, need in needs.items() if need.total <= limit]
    if not fitting:
        raise ValueError(_nothing_fits(probes, limit))
    return MicrobatchPlan(sizes[-1] // max(fitting), max(fitting), tuple(probes), limit)


def _next_size(sizes: Sequence[int], needs: dict[int, _Need], limit: int) -> int | None:
    """The micro-batch size to compile next; None when what is known decides."""
    low = max((size for size, need in needs.items() if need.total <= limit), default=0)
    high = min((size for size in needs if size > low), default=math.inf)
    between = [size for size in sizes if low < size < high]
    if between and len(needs) >= _NUM_PREDICTED:
        return between[len(between) // 2]
    if between and high < math.inf:
        return _predicted_size(between, sizes[-1], needs, limit)
    if low:
        return None
    # Nothing fits so far. Below 8 a size may need somewhat more than the next larger: look at all of these,
    # except where one example alone is far beyond the limit.
    if needs[1].total > 2 * limit:
        return None
    largest = next((size for size in sizes if size >= _AFFINE_FROM), sizes[-1])
    return max((size for size in sizes if size <= largest and size not in needs), default=None)


def _predicted_size(between: Sequence[int], batch_size: int, needs: dict[int, _Need], limit: int) -> int:
    """The largest of the sizes at which the line through two known needs is within the limit."""
    points = [(size, need.total) for size, need in needs.items() if need.total < math.inf]
    if not points:
        return next((size for size in between if size >= _AFFINE_FROM), between[len(between) // 2])
    affine = [point for point in points if point[0] >= _AFFINE_FROM]
    inner = [point for point in affine if point[0] < batch_size]
    points = next((some for some in (inner, affine, points) if len(some) >= 2), points)
    if len(points) == 1:
        points = [(0, needs[points[0][0]].fixed), *points]
    nearest = sorted(points, key=lambda point: abs(point[1] - limit))[:2]
    (size, need), (larger_size, larger_need) = sorted(nearest)
    step, growth = larger_size - size, larger_need - need
    if growth <= 0:
        return between[len(between) // 2]
    # need + growth / step * (b - size) <= limit, in whole numbers
    fitting = [b for b in between if need * step + growth * (b - size) <= limit * step]
    return fitting[-1] if fitting else between[0]


def _compiled_need(step: Callable[..., Any], args: Sequence[Any]) -> _Need:
    jitted: Any = step if hasattr(step, "lower") else jax.jit(step)
    try:
        memory = jitted.lower(*args).compile().memory_analysis()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _Need(math.inf, math.inf)
    if memory is None:
        raise ValueError(
            "this backend gives no memory analysis of its compiled programs, so nothing can be planned."
        )
    fixed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return _Need(memory.temp_size_in_bytes + fixed, fixed)


def _limit(memory_limit: float | None, args: Sequence[Any]) -> int:
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            f"args must be a tuple of the step's positional arguments; got {type(args).__name__}."
        )
    if memory_limit is None:
        return _device_limit(args)
    if isinstance(memory_limit, bool) or not isinstance(memory_limit, Real):
        raise TypeError(f"memory_limit must be a number of bytes; got {memory_limit!r}.")
    if not 0 < memory_limit < math.inf:
        raise ValueError(f"memory_limit must be a positive number of bytes; got {memory_limit!r}.")
    return int(memory_limit)


def _device_limit(args: Sequence[Any]) -> int:
    """The smallest memory limit, in bytes, of the devices that hold `args`."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args)]
    placed = [
        s for s in shardings if s is not None and not isinstance(getattr(s, "mesh", None), AbstractMesh)
    ]
    devices = set[Any]().union(*(sharding.addressable_devices for sharding in placed))
    stats = [device.memory_stats() for device in devices or jax.local_devices()[:1]]
    limits = [stat["bytes_limit"] for stat in stats if stat and "bytes_limit" in stat]
    if not limits:
        raise ValueError(
            "the memory limit of the device is unknown here (memory_stats() gives none): "
            "give memory_limit, in bytes per device."
        )
    return min(limits)


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _positive_int(batch_size: int) -> int:
    try:
        number = operator.index(batch_size)
    except TypeError:
        number = None
    if number is None or isinstance(batch_size, bool):
        raise TypeError(f"batch_size must be an int; got {batch_size!r}.")
    if number < 1:
        raise ValueError(f"batch_size must be at least 1; got {number}.")
    return number


def _nothing_fits(probes: Sequence[Probe], limit: int) -> str:
    num_microbatches, num_bytes = min(probes, key=lambda probe: probe.num_bytes)
    need = f"{_format_bytes(num_bytes)} bytes, with num_microbatches={num_microbatches}"
    if num_bytes == math.inf:
        need = "unknown, the compiler ran out of memory on every program"
    return (
        f"no number of micro-batches fits into {limit:,} bytes; the smallest need found: {need}. What "
        "remains is parameters, optimizer state and one example's activations: donate the arguments that the "
        "step replaces, rematerialise (jax.checkpoint), shard over more devices, or raise memory_limit."
    )


def _format_bytes(num_bytes: int | float) -> str:
    return "out of memory" if num_bytes == math.inf else f"{num_bytes:,}"
