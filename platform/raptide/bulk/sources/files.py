"""Files that are read from any place, or from their beginning where they are compressed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from raptide.bulk.units import Unit, short_stretches
from raptide.data.compressed import READ_BYTES, compression_of, decompress
from raptide.errors import InputError
from raptide.patience import patiently, read_surely
from raptide.storage import Storage


def open_plainly(
    storage: Storage, name: str, called: str, error: type[InputError], digest: Any = None
) -> io.BufferedReader:
    """Open a file for reading, decompressed.

    Args:
        called: what messages call it.
        error: what is raised, also while reading, where it is damaged.
        digest: of its bytes as they lie, brought up to date while they are read.
    """
    raw = _open_raw(storage, name)
    return decompress(raw if digest is None else Digested(raw, digest), called, error)


def stretches_of_file(storage: Storage, name: str, units: list[Unit]) -> Iterator[list[Unit]]:
    """A compressed file is read from its beginning, any other from any place."""

    def compression() -> str:
        with io.BufferedReader(_open_raw(storage, name)) as file:
            return compression_of(file)

    whole = read_surely(storage.full(name), compression)
    return iter([units]) if whole else short_stretches(units)


def _open_raw(storage: Storage, name: str) -> Any:
    return patiently(lambda: storage.filesystem.open_input_file(storage.full(name)))


class Layout(NamedTuple):
    """The records of one piece of a file."""

    size: int
    starts: np.ndarray
    """Where each begins in the piece, [n] int64."""
    bytes: np.ndarray
    lines: np.ndarray
    """Lines of each, [n] int64."""
    residues: np.ndarray
    """Letters of each, and blanks and stops if there are any, [n] int64."""


class Marks:
    """Where units begin, gathered over the pieces of a file.

    Args:
        byte: at which the first record begins.
        line: of it.
    """

    def __init__(self, byte: int = 0, line: int = 1) -> None:
        self.records = 0
        self._bytes, self._line = byte, line
        self._residues = 0
        self._begun: list[tuple[int, int, int, int]] = [(0, byte, 0, line)]
        """Record, byte, residues before, and line of each unit's begin."""

    def add(self, piece: Layout, ends: list[int]) -> None:
        before = np.concatenate([[0], np.cumsum(piece.residues)])
        lines = np.concatenate([[0], np.cumsum(piece.lines)])
        self._begun += [
            (
                self.records + end,
                self._bytes + int(piece.starts[end]),
                self._residues + int(before[end]),
                self._line + int(lines[end]),
            )
            for end in ends
        ]
        self.records += len(piece.starts)
        self._bytes += piece.size
        self._residues += int(before[-1])
        self._line += int(lines[-1])

    def units(self, source: int, digest: str) -> list[Unit]:
        last = (self.records, self._bytes, self._residues, self._line)
        return [
            Unit(source, digest, first, stop - first, end - begin, start, byte, line)
            for (first, start, begin, line), (stop, byte, end, _) in pairwise([*self._begun, last])
        ]


def skip_to(
    file: io.BufferedReader, place: int, target: int, called: str, error: type[InputError]
) -> int:
    """Move on to a byte: at once, or through what is decompressed on the way.

    Raises:
        InputError: of type `error`, where the file called so ends before it.
    """
    if file.seekable():
        return file.seek(target)
    while place < target:
        passed = len(file.read(min(READ_BYTES, target - place)))
        if not passed:
            raise error(f"{called} has become shorter during the job; start it again.")
        place += passed
    return place


class Digested(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, raw: Any, digest: Any) -> None:
        self._raw, self._digest = raw, digest

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True  # so that it is not taken for a pipe; nobody seeks

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
