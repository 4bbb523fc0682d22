"""Records of FASTA files, plain or compressed, here or behind a URI."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from raptide.alphabet import decode_residues
from raptide.bulk.units import Cutter, Records, Sizes, Survey, Unit, short_stretches
from raptide.data.compressed import READ_BYTES, decompress, is_compressed_file
from raptide.data.fasta import (
    BAD_LETTERS,
    EMPTY,
    NUCLEOTIDE,
    SOUND,
    STOP_CODON,
    FastaBatch,
    ReadingRules,
    read_fasta,
)
from raptide.data.fasta_text import FastaStream, pieces, refuse_carriage_return
from raptide.errors import FastaError
from raptide.storage import Storage, patiently, read_surely

REASONS = {
    STOP_CODON: "stop codon: a * or . stands within the sequence",
    BAD_LETTERS: "bad letters: not all characters are residue letters",
    NUCLEOTIDE: "nucleotides: DNA or RNA, not a protein",
    EMPTY: "empty: no residues",
}


@dataclass(frozen=True)
class FastaFile:
    """One FASTA file; records are judged by `rules`, which drop and never refuse."""

    storage: Storage
    file: str
    rules: ReadingRules
    called: str = ""
    """What people call it, if not by its path."""

    @property
    def name(self) -> str:
        return self.called or self.path

    @property
    def path(self) -> str:
        return self.storage.full(self.file)

    def survey(self, index: int, sizes: Sizes) -> Survey:
        digest = hashlib.sha256()
        stream = FastaStream(self.name, self._open(digest))
        cutter, marks = Cutter(sizes), _Marks()
        for piece in pieces(stream):
            stream.remember(piece)
            refuse_carriage_return(stream, piece, marks.records)
            layout = _lay_out(piece)
            marks.add(layout, cutter.ends(layout.residues, layout.bytes))
            stream.forget(marks.records)
        return Survey(digest.hexdigest(), marks.units(index, digest.hexdigest()))

    def stretches(self, units: list[Unit]) -> Iterator[list[Unit]]:
        whole = read_surely(self.name, self._is_compressed)
        return iter([units]) if whole else short_stretches(units)

    def read(self, units: Sequence[Unit]) -> Iterator[Records]:
        plain = self._open()
        place = 0
        for unit in units:
            place = self._skip(plain, place, unit.start)
            window = cast(BinaryIO, _Window(plain, unit.stop - unit.start))
            yield self._records(FastaStream(self.name, window, line=unit.line))
            place = unit.stop

    def _records(self, stream: FastaStream) -> Records:
        found = Records([], [], [], [], [])
        for batch in read_fasta(stream, rules=self.rules):
            found.ids.extend(batch.names)
            found.items.extend(_letters(batch))
            found.lengths.extend(batch.lengths.tolist())
            found.lines.extend(stream.line_of(place) for place in batch.places.tolist())
            found.flaws.extend(REASONS.get(flaw, "") for flaw in batch.flaws.tolist())
        return found

    def _skip(self, file: io.BufferedReader, place: int, target: int) -> int:
        """Move on to a byte: at once, or through what is decompressed on the way."""
        if file.seekable():
            return file.seek(target)
        while place < target:
            passed = len(file.read(min(READ_BYTES, target - place)))
            if not passed:
                raise FastaError(f"{self.name} has become shorter during the job; start it again.")
            place += passed
        return place

    def _is_compressed(self) -> bool:
        with io.BufferedReader(self._raw()) as file:
            return is_compressed_file(file)

    def _raw(self) -> Any:
        return patiently(lambda: self.storage.filesystem.open_input_file(self.path))

    def _open(self, digest: Any = None) -> io.BufferedReader:
        raw = self._raw()
        if digest is not None:
            raw = _Digested(raw, digest)
        return decompress(raw, self.name, FastaError)


def _letters(batch: FastaBatch) -> Iterator[str]:
    ends = [0, *np.cumsum(batch.lengths).tolist()]
    residues = np.frombuffer(batch.residues, np.uint8)
    for (start, stop), flaw in zip(pairwise(ends), batch.flaws.tolist(), strict=True):
        yield decode_residues(residues[start:stop]) if flaw == SOUND else ""


class _Layout(NamedTuple):
    """The records of one piece."""

    size: int
    starts: np.ndarray
    """Where each begins in the piece, [n] int64."""
    bytes: np.ndarray
    lines: np.ndarray
    """Lines of each, [n] int64."""
    residues: np.ndarray
    """Letters of each, and blanks and stops if there are any, [n] int64."""


def _lay_out(piece: bytes) -> _Layout:
    text = np.frombuffer(piece, np.uint8)
    breaks = np.flatnonzero(text == ord("\n"))
    lines = np.concatenate([[0], breaks + 1])
    lines = lines[lines < len(text)]
    headers = np.flatnonzero(text[lines] == ord(">"))
    starts = lines[headers]
    sizes = np.diff(starts, append=len(text))
    line_ends = np.append(breaks, len(text))
    counts = np.diff(headers, append=len(lines))
    # A last line may lack its break.
    newlines = np.diff(np.searchsorted(breaks, starts), append=0)
    newlines[-1] = len(breaks) - int(np.searchsorted(breaks, starts[-1]))
    header_bytes = line_ends[headers] - starts
    return _Layout(len(text), starts, sizes, counts, sizes - header_bytes - newlines)


class _Marks:
    """Where units begin, gathered over the pieces of a file."""

    def __init__(self) -> None:
        self.records = 0
        self._bytes = self._residues = 0
        self._line = 1
        self._begun: list[tuple[int, int, int, int]] = [(0, 0, 0, 1)]
        """Record, byte, residues before, and line of each unit's begin."""

    def add(self, piece: _Layout, ends: list[int]) -> None:
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


class _Window:
    """The next `size` bytes of an open file."""

    def __init__(self, file: io.BufferedReader, size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, *_: object) -> None:
        """The file stays open for the next unit."""


class _Digested(io.RawIOBase):
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
