"""Real text that is already there: the sources of Python's standard library, or any file or folder."""

import pathlib
import sysconfig

import numpy as np


def read_documents(path: pathlib.Path | None, max_bytes: int) -> list[bytes]:
    """The documents of a text file or a folder, or Python's own sources, until `max_bytes` are full.

    Exits with a clear message where there is nothing to read.
    """
    if path is None:
        files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    elif path.is_file():
        files = [path]
    else:
        raise SystemExit(f"error: --data {path} is neither a file nor a folder.")
    documents, room = [], max_bytes
    for file in files:
        document = file.read_bytes().replace(b"\0", b"")[:room]  # 0 is for padding
        if document:
            documents.append(document)
            room -= len(document)
        if not room:
            break
    if not documents:
        raise SystemExit(f"error: --data {path} holds no text.")
    return documents


def paragraphs(documents: list[bytes]) -> list[bytes]:
    """What stands between blank lines: texts of a few bytes to a few thousand, as documents' lengths vary."""
    return [part for document in documents for part in document.split(b"\n\n") if part.strip()]


def as_rows(texts: list[bytes], length: int) -> np.ndarray:
    """Each text in rows of `length` bytes to predict, the rest padded with zeros.

    A row begins with the byte before its first one to predict, which for a text's first row is 0.

    Returns:
      shape=(rows, length + 1), uint8.
    """
    pieces = [text[i : i + length] for text in texts for i in range(0, len(text), length)]
    before = [text[i - 1] if i else 0 for text in texts for i in range(0, len(text), length)]
    rows = np.zeros((len(pieces), length + 1), np.uint8)
    rows[:, 0] = before
    for row, piece in zip(rows, pieces, strict=True):
        row[1 : 1 + len(piece)] = np.frombuffer(piece, np.uint8)
    return rows
