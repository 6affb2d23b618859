"""Documents packed into rows, and rows into micro-batches: what finetune_lora.py feeds its model."""

import ast
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from _text import as_rows

Pair = tuple[bytes, bytes]  # a function's header, its docstring


class Rows(NamedTuple):
    """What a model reads and is to predict; leaves of shape=(rows, length), or micro-batches of them."""

    inputs: Any  # uint8
    targets: Any  # uint8
    document: Any  # int32, from 1 in each row; 0: padding
    position: Any  # int32, in the document
    counted: Any  # bool: what the loss is over


def function_pairs(documents: Sequence[bytes], length: int) -> list[Pair]:
    """Every function's header and its docstring, where both fit into a row."""
    pairs = []
    for document in documents:
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes that are not valid
                tree = ast.parse(document)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                header = f"def {node.name}({ast.unparse(node.args)}):\n".encode()
                docstring = f"{text}\n".encode()
                if len(header) + len(docstring) <= length:
                    pairs.append((header, docstring))
    return pairs


def pack(pairs: Sequence[Pair], length: int) -> Rows:
    """Each pair in the first row that has room for it; the docstrings' bytes are counted."""
    rows: list[list[np.ndarray]] = []
    free: list[int] = []
    for header, docstring in pairs:
        text = np.frombuffer(header + docstring, np.uint8)
        place = next((i for i, room in enumerate(free) if room >= len(text)), len(rows))
        if place == len(rows):
            rows.append([])
            free.append(length)
        document = np.full(len(text), len(rows[place]) + 1)
        position = np.arange(len(text))
        fields = (np.append(0, text[:-1]), text, document, position, position >= len(header))
        rows[place].append(np.stack(fields))
        free[place] -= len(text)
    packed = np.zeros((len(Rows._fields), len(rows), length), np.int32)
    for i, texts in enumerate(rows):
        row = np.concatenate(texts, axis=1)
        packed[:, i, : row.shape[1]] = row
    return Rows(*(x.astype(t) for x, t in zip(packed, (np.uint8, np.uint8, np.int32, np.int32, bool), strict=True)))


def whole_rows(documents: Sequence[bytes], length: int) -> Rows:
    """Text as it stands, a row of each `length` bytes, all of it counted."""
    rows = as_rows(list(documents), length)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    position = np.broadcast_to(np.arange(length, dtype=np.int32), targets.shape)
    return Rows(inputs, targets, (targets != 0).astype(np.int32), position, targets != 0)


def as_micro_batches(rows: Rows, size: int, most: int) -> tuple[Rows, int]:
    """`most` micro-batches of `size` rows, leaves of shape=(most, size, length), and how many hold something."""
    num_rows, length = rows.inputs.shape
    missing = most * size - num_rows
    padded = (np.pad(x, [(0, missing), (0, 0)]).reshape(most, size, length) for x in rows)
    return Rows(*padded), math.ceil(num_rows / size)
