"""Bytes that a compiled program reads and writes in the device's main memory, counted from its text.

Each instruction outside fusions reads its operands and writes its result; what TPUs keep in their on-chip memory
(a layout with `S(1)` and the like) does not count. A loop of known length counts so many times. A loop of unknown
length is what ends a window, and is counted apart, once.
"""

import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count\\?"?:\{\\?"?n\\?"?:\\?"(\d+)')
_MOVES_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}


class Traffic(NamedTuple):
    """Bytes on one device, in a call that ends no window and in what ends one besides."""

    each_call: float
    emit: float


class _Instruction(NamedTuple):
    opcode: str
    result: str  # its type
    operands: list[str]
    line: str


def count_traffic(text: str) -> Traffic:
    """Of a compiled program's text, `compiled.as_text()`."""
    computations, entry = _parse(text)
    return _count(computations, entry)


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            opcode = _OPCODE.search(found[2])
            assert opcode is not None, line
            arguments = found[2][opcode.end() :].partition("), ")[0]
            computations[current][found[1]] = _Instruction(
                opcode[1], found[2][: opcode.start()], _NAME.findall(arguments), line
            )
    return computations, entry


def _count(computations: dict[str, dict[str, _Instruction]], name: str) -> Traffic:
    each_call, emit = 0.0, 0.0
    instructions = computations[name]
    for instruction in instructions.values():
        opcode, line = instruction.opcode, instruction.line
        if opcode == "while":
            body = _count(computations, _called(line, "body"))
            if trips := _TRIPS.search(line):
                each_call += int(trips[1]) * body.each_call
                emit += int(trips[1]) * body.emit
            else:
                emit += body.each_call + body.emit
        elif opcode == "call":
            inner = _count(computations, _called(line, "to_apply"))
            each_call, emit = each_call + inner.each_call, emit + inner.emit
        elif opcode.endswith("-start"):
            each_call += _moved(instruction.result)
        elif opcode not in _MOVES_NOTHING and not opcode.endswith("-done") and "ConcatBitcast" not in line:
            operands = [instructions[operand].result for operand in instruction.operands]
            each_call += sum(map(_in_main_memory, [instruction.result, *operands]))
    return Traffic(each_call, emit)


def _called(line: str, attribute: str) -> str:
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", line)
    assert found is not None, line
    return found[1]


def _moved(result: str) -> float:
    """An asynchronous copy or slice: as much is moved as the smaller of source and destination holds."""
    ends = [(_size(array), _is_on_chip(array)) for array in _ARRAY.finditer(result)]
    ends = sorted(ends, reverse=True)[:2]
    return min(size for size, _ in ends) * sum(not on_chip for _, on_chip in ends)


def _in_main_memory(type_text: str) -> int:
    return sum(_size(array) for array in _ARRAY.finditer(type_text) if not _is_on_chip(array))


def _is_on_chip(array: re.Match[str]) -> bool:
    return "S(" in (array[3] or "")


def _size(array: re.Match[str]) -> int:
    size = _BYTES.get(array[1], 4)
    for length in filter(None, array[2].split(",")):
        size *= int(length)
    return size
