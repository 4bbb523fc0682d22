"""Records of FASTA files, plain or compressed, here or behind a URI."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, cast

import numpy as np

from raptide.alphabet import decode_residues
from raptide.bulk.sources.files import Layout, Marks, open_plainly, skip_to, stretches_of_file
from raptide.bulk.units import Cutter, Records, Sizes, Survey, Unit
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
from raptide.storage import Storage

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
        cutter, marks = Cutter(sizes), Marks()
        for piece in pieces(stream):
            stream.remember(piece)
            refuse_carriage_return(stream, piece, marks.records)
            layout = _lay_out(piece)
            marks.add(layout, cutter.ends(layout.residues, layout.bytes))
            stream.forget(marks.records)
        return Survey(digest.hexdigest(), marks.units(index, digest.hexdigest()))

    def stretches(self, units: list[Unit]) -> Iterator[list[Unit]]:
        return stretches_of_file(self.storage, self.file, units)

    def read(self, units: Sequence[Unit]) -> Iterator[Records]:
        plain = self._open()
        place = 0
        for unit in units:
            place = skip_to(plain, place, unit.start, self.name, FastaError)
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

    def _open(self, digest: Any = None) -> io.BufferedReader:
        return open_plainly(self.storage, self.file, self.name, FastaError, digest)


def _letters(batch: FastaBatch) -> Iterator[str]:
    ends = [0, *np.cumsum(batch.lengths).tolist()]
    residues = np.frombuffer(batch.residues, np.uint8)
    for (start, stop), flaw in zip(pairwise(ends), batch.flaws.tolist(), strict=True):
        yield decode_residues(residues[start:stop]) if flaw == SOUND else ""


def _lay_out(piece: bytes) -> Layout:
    text = np.frombuffer(piece, np.uint8)
    breaks = np.flatnonzero(text == ord("\n"))
    lines = np.concatenate([[0], breaks + 1])
    lines = lines[lines < len(text)]
    headers = np.flatnonzero(text[lines] == ord(">"))
    starts = lines[headers]
    stops = np.append(starts[1:], len(text))
    bodies = np.append(breaks, len(text))[headers]  # where each header ends
    residues = stops - bodies
    for ends in (breaks, np.flatnonzero(text == ord("\r"))):
        residues -= np.searchsorted(ends, stops) - np.searchsorted(ends, bodies)
    counts = np.diff(headers, append=len(lines))
    return Layout(len(text), starts, stops - starts, counts, residues)


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
