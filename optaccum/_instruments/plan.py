"""How many micro-batches does this step need, in this much memory?"""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from optaccum._scanning.split import check_positive_int

# Padding and alignment weigh so much in micro-batches up to this size that a smaller one may need more than a larger.
_UNRELIABLE_SIZE = 8


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
        return "\n".join([f"batch of {batch_size:,} examples, memory limit {self.memory_limit:,} bytes", *lines])


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

    .. math:: \mathrm{need}(n) = \mathrm{temp} + \mathrm{argument} + \mathrm{output} - \mathrm{alias}

    bytes on each device (donated arguments are the alias; what is offloaded to the host does not count). First for the
    whole batch, then halving the list of its divisors: about log2 of their number are compiled. What is found fits,
    and the next fewer micro-batches do not. (Where memory falls as the micro-batch grows, still fewer might again.
    Micro-batches of up to 8 examples do that: before saying that nothing fits, all of these are compiled, unless one
    example alone needs more than twice the limit.)

    Args:
      make_step: from a number of micro-batches to the step: a function to be jitted, or one that `jax.jit` already made
        (with `donate_argnums`, shardings, ...).
      args: the step's positional arguments: arrays or `jax.ShapeDtypeStruct`s (with shardings, on several devices).
      batch_size: examples in the batch, at least 1; its divisors are the candidates. Where each device splits its own
        rows (`data_axes`), the rows of one device.
      memory_limit: bytes on each device. None: the smallest limit among the devices of `args`, or the first local
        device's. What other arrays occupy on the device has to be subtracted by the caller.
      on_probe: called with each `(num_microbatches, bytes)` pair as soon as it is known.

    Returns:
      A NamedTuple with `num_microbatches`, `microbatch_size`, `probes` (those pairs, in order of compilation; infinite
      bytes where the compiler gave up with RESOURCE_EXHAUSTED) and `memory_limit`; `str()` of it is a table.

    Raises:
      ValueError: nothing fits (the message gives the smallest need found), the device's limit is unknown and
        `memory_limit` is None (on CPUs, and on devices that are only compiled for), or a number is not positive.
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
    check_positive_int(batch_size, "batch_size")
    small = [size for size in range(1, math.isqrt(batch_size) + 1) if batch_size % size == 0]
    sizes = sorted({*small, *(int(batch_size) // size for size in small)})
    limit = _limit(memory_limit, args)
    needs: dict[int, int | float] = {}  # micro-batch size -> the bytes of its program, as they come
    size: int | None = sizes[-1]
    while size is not None:
        num_microbatches = sizes[-1] // size
        needs[size] = _compiled_need(make_step(num_microbatches), args)
        if on_probe is not None:
            on_probe(Probe(num_microbatches, needs[size]))
        size = _next_size(sizes, needs, limit)
    probes = tuple(Probe(sizes[-1] // size, need) for size, need in needs.items())
    fitting = [size for size, need in needs.items() if need <= limit]
    if not fitting:
        raise ValueError(_nothing_fits(probes, limit))
    return MicrobatchPlan(sizes[-1] // max(fitting), max(fitting), probes, limit)


def _next_size(sizes: Sequence[int], needs: dict[int, int | float], limit: int) -> int | None:
    """The micro-batch size to compile next; None when what is known decides."""
    low = max((size for size, need in needs.items() if need <= limit), default=0)
    high = min((size for size in needs if size > low), default=0)
    between = [size for size in sizes if low < size < high]
    if between:
        return between[len(between) // 2]
    if low or needs[1] > 2 * limit:
        return None
    return max((size for size in sizes if size <= _UNRELIABLE_SIZE and size not in needs), default=None)


def _compiled_need(step: Callable[..., Any], args: Sequence[Any]) -> int | float:
    jitted: Any = step if hasattr(step, "lower") else jax.jit(step)
    try:
        memory = jitted.lower(*args).compile().memory_analysis()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    if memory is None:
        raise ValueError("expected the backend to analyse its programs' memory; got None. Plan on another backend.")
    fixed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + fixed


def _limit(memory_limit: float | None, args: Sequence[Any]) -> int:
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"expected args to be a tuple of the step's positional arguments; got {type(args).__name__}.")
    if memory_limit is None:
        return _device_limit(args)
    if isinstance(memory_limit, bool) or not isinstance(memory_limit, Real):
        raise TypeError(f"expected memory_limit to be a number of bytes; got {memory_limit!r}.")
    if not 0 < memory_limit < math.inf:
        raise ValueError(f"expected memory_limit to be a positive number of bytes; got {memory_limit!r}.")
    return int(memory_limit)


def _device_limit(args: Sequence[Any]) -> int:
    """The smallest memory limit, in bytes, of the devices that hold `args`."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args)]
    placed = [s for s in shardings if s is not None and not isinstance(getattr(s, "mesh", None), AbstractMesh)]
    devices = set[Any]().union(*(sharding.addressable_devices for sharding in placed))
    stats = [_memory_stats(device) for device in devices or jax.local_devices()[:1]]
    limits = [stat["bytes_limit"] for stat in stats if "bytes_limit" in stat]
    if not limits:
        raise ValueError("expected memory_limit to be given in bytes, as these devices do not say theirs; got None.")
    return min(limits)


def _memory_stats(device: Any) -> dict[str, int]:
    try:
        return device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # of a device that is only compiled for
        return {}


def _nothing_fits(probes: Sequence[Probe], limit: int) -> str:
    num_microbatches, num_bytes = min(probes, key=lambda probe: probe.num_bytes)
    need = f"{_format_bytes(num_bytes)} bytes, with num_microbatches={num_microbatches}"
    if num_bytes == math.inf:
        need = "unknown, the compiler ran out of memory on every program"
    return (
        f"expected some number of micro-batches to fit into {limit:,} bytes; the smallest need found: {need}. What "
        "remains is parameters, optimizer state and one example's activations: donate the arguments that the "
        "step replaces, rematerialise (jax.checkpoint), shard over more devices, or raise memory_limit."
    )


def _format_bytes(num_bytes: int | float) -> str:
    return "out of memory" if num_bytes == math.inf else f"{num_bytes:,}"
