"""How many collectives a compiled program holds, inside its loops and outside them."""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, Protocol

_COLLECTIVES = frozenset(
    {
        "all-gather",
        "all-reduce",
        "all-to-all",
        "collective-broadcast",
        "collective-permute",
        "ragged-all-to-all",
        "reduce-scatter",
    }
)

# Quoted text (metadata, backend configurations) may name anything; so may comments.
_QUOTED_OR_COMMENT = re.compile(r'"(?:[^"\\]|\\.)*"|/\*.*?\*/', re.DOTALL)
_MODULE_START = re.compile(r"^(?=HloModule )", re.MULTILINE)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = ")
# The opcode stands between the result's type and the operands; no type has a lower-case word before "(".
_OPCODE = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|(?:true|false)_computation|(?:branch|called)_computations)"
    r"=(\{[^{}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r"[\w.\-]+")


class _Program(Protocol):
    def as_text(self) -> str | None: ...


class CollectiveCounts(NamedTuple):
    """What `count_collectives` found; a name that is absent counts 0."""

    in_loops: dict[str, int]  # HLO collective name -> instructions inside a while loop
    outside: dict[str, int]  # HLO collective name -> instructions outside every while loop


class _Instruction(NamedTuple):
    opcode: str
    called: tuple[str, ...]  # names of the computations it runs


def count_collectives(compiled: _Program | str) -> CollectiveCounts:
    r"""Counts the collective instructions of a compiled program, inside loops and outside.

    Numbers cannot show whether a gradient crosses devices once per window or once per layer and micro-batch;
    the compiled program can. It is a tree of computations: with own(c) the collectives that stand in
    computation c itself, and i the instructions of c,

    $$ \mathrm{count}(c) = \mathrm{own}(c) + \sum_{i \in c} \sum_{d \text{ run by } i} \mathrm{count}(d) $$

    from the entry down. All of count(d) goes to `in_loops` where the instruction that runs d is a `while` (as
    its body or its condition), or is itself in a loop.

    What the counts mean:

    - Instructions, not executions: a loop body counts once however often it runs, and a `while` is a loop
      even where it runs at most once (as the inner optimizer of `accumulate` does).
    - One instruction that reduces several arrays counts once; so does an asynchronous pair
      (`all-reduce-start` and `-done`, or `async-start` and what it wraps), in the place where it starts.
    - A computation that several instructions run counts once for each of them, and so does every branch of a
      conditional.
    - Point-to-point `send` and `recv` are not collectives. Computations that nothing runs do not count.

    Args:
        compiled: what `jax.jit(fn).lower(*args).compile()` returns, or the text of an HLO module. The
            text before compilation lacks the collectives that the partitioner inserts.

    Returns:
        A NamedTuple `(in_loops, outside)` of dicts from HLO collective name ("all-reduce", "all-gather",
        "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast") to
        count. They hold the names that occur, and give 0 for the others.

    Raises:
        TypeError: `compiled` is neither a string nor has `as_text()`.
        ValueError: the text is no HLO module, or lacks a computation that it names.

    Example:
        >>> import jax, optaccum
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> def each_time(x):  # one reduction per micro-batch
        ...     return jax.lax.map(lambda x: jax.lax.psum(x.sum(), "data"), x.reshape(4, -1)).sum()
        >>> def once(x):
        ...     return jax.lax.psum(jax.lax.map(lambda x: x.sum(), x.reshape(4, -1)).sum(), "data")
        >>> for total in each_time, once:
        ...     step = jax.jit(jax.shard_map(total, mesh=mesh, in_specs=P("data"), out_specs=P()))
        ...     counts = optaccum.count_collectives(step.lower(jax.numpy.ones(64)).compile())
        ...     print(counts.in_loops["all-reduce"], counts.outside["all-reduce"])
        1 0
        0 1
    """
    modules = [_computations(module) for module in _MODULE_START.split(_program_text(compiled))]
    entries = [_count(computations, entry) for computations, entry in modules if entry is not None]
    if not entries:
        raise ValueError(
            "expected the text of an HLO module, with an ENTRY computation; got a text without one. A "
            "lowered program must be compiled first: `count_collectives(jax.jit(fn).lower(*args).compile())`."
        )
    in_loops, outside = Counter[str](), Counter[str]()
    for counts in entries:
        in_loops.update(counts.in_loops)
        outside.update(counts.outside)
    return CollectiveCounts(in_loops, outside)


def _program_text(compiled: _Program | str) -> str:
    if isinstance(compiled, str):
        return compiled
    if not callable(getattr(compiled, "as_text", None)):
        raise TypeError(
            "expected a compiled program or HLO text; got "
            f"{type(compiled).__name__}. Compile first: `jax.jit(fn).lower(*args).compile()`."
        )
    text = compiled.as_text()
    if text is None:
        raise ValueError(
            "this backend gives no text for its compiled programs, so there is nothing to count in."
        )
    return text


def _computations(module: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    """The instructions of each computation of one HLO module, and the name of its entry."""
    computations: dict[str, list[_Instruction]] = {}
    entry = None
    for name, is_entry, lines in _blocks(_QUOTED_OR_COMMENT.sub('""', module)):
        computations[name] = [_instruction(line) for line in lines]
        entry = name if is_entry else entry
    return computations, entry


def _blocks(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """Each computation's name, whether it is the entry, and its instructions (wrapped lines joined)."""
    block: tuple[str, bool, list[str]] | None = None
    for line in text.splitlines():
        if header := _COMPUTATION.fullmatch(line.strip()):
            if block is not None:
                yield block
            block = header[2], header[1] is not None, []
        elif block is not None and _INSTRUCTION.match(line):
            block[2].append(line)
        elif block is not None and block[2]:
            block[2][-1] += " " + line
    if block is not None:
        yield block


def _instruction(line: str) -> _Instruction:
    opcode = _OPCODE.search(line)
    if opcode is None:
        raise ValueError(f"cannot read this HLO instruction: {line.strip()[:120]!r}")
    groups = _CALLED.findall(line, opcode.end())
    return _Instruction(opcode[1], tuple(name for group in groups for name in _NAME.findall(group)))


def _count(computations: dict[str, list[_Instruction]], entry: str) -> CollectiveCounts:
    @functools.cache
    def count(name: str) -> CollectiveCounts:
        if name not in computations:
            raise ValueError(
                f"the HLO text runs the computation {name!r} but does not hold it; is it cut short?"
            )
        in_loops, outside = Counter[str](), Counter[str]()
        for opcode, called in computations[name]:
            if opcode.endswith(("-done", "-update")):
                continue  # counted where it starts, although it may name the same computation
            operation = opcode.removesuffix("-start")
            if operation in _COLLECTIVES:
                outside[operation] += 1
                continue
            for callee in map(count, called):
                in_loops.update(callee.in_loops)
                (in_loops if operation == "while" else outside).update(callee.outside)
        return CollectiveCounts(in_loops, outside)

    return count(entry)
