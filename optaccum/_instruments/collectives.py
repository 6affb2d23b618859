"""How many collectives a compiled program holds, and how many bytes they bring: inside its loops and outside them."""

import functools
import math
import re
from collections import Counter
from typing import NamedTuple, Protocol

_COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}

# Quoted text (metadata, backend configurations) may name anything; comments count a long tuple's elements.
_QUOTED_OR_COMMENT = re.compile(r'"(?:[^"\\]|\\.)*"|/\*.*?\*/')
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{")
# The opcode stands between the result's type and the operands; no type has a lower-case word before "(".
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\(([^()]*)(.*)")
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|(?:true|false)_computation|(?:branch|called)_computations)"
    r"=(\{[^{}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r"[\w.\-]+")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")  # f32[8,128], pred[], f8e4m3fn[16]
# TPUs fuse an asynchronous collective into what is computed meanwhile. Each of these fusions holds it, and all but
# the one that starts it have its flags among their operands.
_GOES_ON = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')
_COPIES = ("bitcast", "copy", "copy-done", "copy-start")


class _Program(Protocol):
    def as_text(self) -> str | None: ...


class CollectiveCounts(NamedTuple):
    """What `count_collectives` found, by HLO collective name; a name that is absent counts 0."""

    in_loops: dict[str, int]  # instructions inside a loop
    outside: dict[str, int]  # instructions outside every loop
    bytes_in_loops: dict[str, int]  # of their results on one device; a loop's body once
    bytes_outside: dict[str, int]


class _Instruction(NamedTuple):
    type: str
    opcode: str
    operands: list[str]
    attributes: str

    def called(self) -> list[str]:
        """The names of the computations it runs."""
        return [name for names in _CALLED.findall(self.attributes) for name in _NAME.findall(names)]

    def attribute(self, name: str) -> str:
        return re.findall(rf"\b{name}=%?([\w.\-]+)", self.attributes)[0]


class _Computation(NamedTuple):
    instructions: dict[str, _Instruction]
    root: list[str]  # its one name

    def origin(self, name: str) -> _Instruction:
        """The instruction that makes a value, behind its copies."""
        instruction = self.instructions[name]
        while instruction.opcode in _COPIES:
            instruction = self.instructions[instruction.operands[0]]
        return instruction


class _Computations(dict[str, _Computation]):
    def __missing__(self, name: str) -> _Computation:
        raise ValueError(f"expected the HLO text to hold {name!r}, which it runs; got none. Is it cut short?")


def count_collectives(compiled: _Program | str) -> CollectiveCounts:
    r"""Counts the collective instructions of a compiled program, inside loops and outside, and their bytes.

    Numbers cannot show whether a gradient crosses devices once per window or once per layer and micro-batch; the
    compiled program can. With own(c) the collectives that stand in computation c itself,

    .. math:: \mathrm{count}(c) = \mathrm{own}(c) + \sum_{i \in c} \sum_{d \text{ run by } i} \mathrm{count}(d)

    from the entry down, and all of count(d) is in loops where a `while` runs d, or is itself in a loop.

    - Instructions, not executions: a loop's body counts once however often it runs, and so does every branch of a
      conditional. A `while` that runs at most once, its condition being a flag in its carry that its body sets to
      false (an emit's), is no loop.
    - One instruction that reduces several arrays counts once, and so do the parts of an asynchronous one. On TPUs an
      all-reduce that is fused with a slice of it is a reduce-scatter.
    - Bytes are those of the results on one device. What a result of r bytes puts on the wire, among D devices: about
      2 r for an all-reduce, r for an all-gather, (D - 1) r for a reduce-scatter.

    Args:
      compiled: what `jax.jit(fn).lower(*args).compile()` returns, or its text. The text before compilation lacks the
        collectives that the partitioner inserts.

    Returns:
      A NamedTuple `(in_loops, outside, bytes_in_loops, bytes_outside)` of dicts from HLO collective name ("all-reduce",
      "all-gather", ...), which hold the names that occur and give 0 for the others.

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
      ...     print(counts.in_loops["all-reduce"], counts.outside["all-reduce"], counts.bytes_outside["all-reduce"])
      1 0 0
      0 1 4
    """
    computations, entry = _computations(_program_text(compiled))

    @functools.cache
    def count(name: str) -> CollectiveCounts:
        counts = CollectiveCounts(Counter(), Counter(), Counter(), Counter())
        for instruction in computations[name].instructions.values():
            operation, part = _operation(instruction, computations)
            if operation in _COLLECTIVES:
                # Counted where it starts; the bytes are of what is done: what starts holds operands and buffers.
                counts.outside[operation] += part != "done"
                counts.bytes_outside[operation] += _num_bytes(instruction.type) if part != "start" else 0
            elif part not in ("update", "done"):  # these may name what has started
                repeats = operation == "while" and not _runs_at_most_once(instruction, computations)
                for callee in instruction.called():
                    _add(counts, count(callee), repeats)
        return counts

    return count(entry)


def _program_text(compiled: _Program | str) -> str:
    if isinstance(compiled, str):
        return compiled
    if not callable(getattr(compiled, "as_text", None)):
        raise TypeError(
            f"expected compiled to be a compiled program or its text; got {type(compiled).__name__}. Compile first: "
            "`jax.jit(fn).lower(*args).compile()`."
        )
    text = compiled.as_text()
    if text is None:
        raise ValueError("expected compiled to have a text; got none from this backend. Compile for another.")
    return text


def _computations(text: str) -> tuple[_Computations, str]:
    """The computations of an HLO module, and the name of its entry."""
    computations, entry, name = _Computations(), "", ""
    for line in text.splitlines():
        plain = _QUOTED_OR_COMMENT.sub('""', line)
        if header := _COMPUTATION.fullmatch(plain):
            name = header[2]
            computations[name] = _Computation({}, [])
            entry = name if header[1] else entry
        elif plain.startswith("}"):
            name = ""
        elif name and not _GOES_ON.search(line):
            match = _INSTRUCTION.fullmatch(plain)
            if match is None:
                raise ValueError(f"expected an HLO instruction; got {plain[:120]!r}. Is the text cut short?")
            root, result, type_, opcode, operands, attributes = match.groups()
            computations[name].instructions[result] = _Instruction(type_, opcode, _NAME.findall(operands), attributes)
            if root:
                computations[name].root.append(result)
    if not entry:
        raise ValueError(
            "expected the text of an HLO module, with an ENTRY computation; got a text without one. A lowered program "
            "must be compiled first: `count_collectives(jax.jit(fn).lower(*args).compile())`."
        )
    return computations, entry


def _operation(instruction: _Instruction, computations: _Computations) -> tuple[str, str]:
    """What an instruction does, and its part in it where it is asynchronous: start, update, done or empty."""
    if instruction.opcode == "fusion":
        fused = computations[instruction.attribute("calls")]
        root = fused.origin(fused.root[0])
        if root.opcode == "dynamic-slice" and fused.origin(root.operands[0]).opcode == "all-reduce":
            return "reduce-scatter", ""
    operation, _, part = instruction.opcode.rpartition("-")
    return (operation, part) if part in ("start", "update", "done") else (instruction.opcode, "")


def _runs_at_most_once(loop: _Instruction, computations: _Computations) -> bool:
    """Whether a loop's condition is a flag in its carry, which its body sets to false."""
    condition, body = (computations[loop.attribute(name)] for name in ("condition", "body"))
    flag, carry = condition.origin(condition.root[0]), body.instructions[body.root[0]]
    if flag.opcode != "get-tuple-element" or carry.opcode != "tuple":
        return False
    after = body.origin(carry.operands[int(flag.attribute("index"))])
    is_carried = condition.origin(flag.operands[0]).opcode == "parameter"
    return is_carried and (after.opcode, after.operands) == ("constant", ["false"])


def _add(counts: CollectiveCounts, found: CollectiveCounts, repeats: bool) -> None:
    """Adds what an instruction runs; what repeats is in a loop."""
    for number in (0, 2):
        in_loops, outside = counts[number : number + 2]
        in_loops.update(found[number])
        (in_loops if repeats else outside).update(found[number + 1])


def _num_bytes(type_: str) -> int:
    """Of an array, or of a tuple of arrays; tokens have none."""
    num_bytes = 0
    for dtype, digits, shape in _ARRAY.findall(type_):
        num_bits = 8 if dtype == "pred" else int(digits or 0)
        num_bytes += -(-num_bits * math.prod(map(int, filter(None, shape.split(",")))) // 8)
    return num_bytes
