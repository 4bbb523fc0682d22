"""A FASTA file as text: its records one by one, without a look at their letters.

needletail parses (440 M residues/s on one Zen 5 core, 60 letters a line). A plain file can be read
in parts, by byte range: a record belongs to the part in which its > lies. A pipe is read once.

Headers are UTF-8; one that is not is read as Latin-1, so that different headers stay different.
The name ends at the first blank or tab.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import needletail
import numpy as np

from raptide.data.compressed import STANDARD_INPUT, is_compressed, open_plain
from raptide.errors import FastaError
from raptide.patience import is_final, patiently, reason_of, unreadable

PART_BYTES = 64 << 20
"""Bytes of a plain file that one task reads."""


PIECE_BYTES = 4 << 20
"""Bytes of it that are parsed at once, so that they stay in the processor's cache."""


LONGEST = 1 << 30
"""Letters in a record, at most: 30,000 times titin; what is longer is no protein."""


class FastaPart(NamedTuple):
    """A byte range of one file; `end` None reads to the end."""

    path: str
    start: int = 0
    end: int | None = None

    @property
    def source(self) -> str:
        return self.path


class FastaStream:
    """A FASTA file that is read once: standard input (`-`), a pipe, a device, or an open file.

    It remembers the lines of the records given out last, since an error cannot read it again.

    Args:
        file: read instead of opening `source`; where it begins, a record does.
        line: of that record.
    """

    start, end = 0, None

    def __init__(self, source: str | Path, file: BinaryIO | None = None, *, line: int = 1) -> None:
        self.source = str(source)
        self.path = "standard input" if self.source == STANDARD_INPUT else self.source
        """What messages call it."""
        self.file = file
        self._first = 0
        """The record that the first of the lines belongs to."""
        self._lines = np.zeros(0, np.int64)
        self._next_line = line

    def remember(self, piece: bytes) -> None:
        """Take note of the lines of a piece's records."""
        text = np.frombuffer(piece, np.uint8)
        breaks = np.flatnonzero(text == ord("\n"))
        starts = np.concatenate([[0], breaks + 1])
        headers = np.flatnonzero(text[starts[starts < len(text)]] == ord(">"))
        self._lines = np.concatenate([self._lines, self._next_line + headers])
        self._next_line += len(breaks)

    def forget(self, before: int) -> None:
        """Records before this one are not asked for any more."""
        self._lines = self._lines[before - self._first :]
        self._first = before

    def line_of(self, index: int) -> int:
        return int(self._lines[index - self._first])


class Record(NamedTuple):
    header: str
    letters: str
    latin1: bool


def split_fasta(path: str | Path, part_bytes: int = PART_BYTES) -> list[FastaPart]:
    """The parts of one file: byte ranges of a plain one, the whole of a compressed one.

    Raises:
        FastaError: the path is no file.
    """
    refuse_missing(path)
    path = Path(path).resolve()
    size = path.stat().st_size
    if size <= part_bytes or is_compressed(path):
        return [FastaPart(str(path))]
    starts = range(0, size, part_bytes)
    return [FastaPart(str(path), start, min(start + part_bytes, size)) for start in starts]


def open_fasta(path: str | Path) -> FastaPart | FastaStream:
    """A whole file, or what can be read only once, to be parsed."""
    return FastaStream(path) if is_stream(path) else FastaPart(str(path))


def parse(part: FastaPart | FastaStream, *, empty: bool = False) -> Iterator[Record]:
    """Each record, without any check of the letters.

    Args:
        empty: give out a last record without letters, rather than refuse the file.
    """
    if isinstance(part, FastaPart):
        refuse_missing(part.path)
    seen = 0
    for piece in pieces(part) if part.end is None else _pieces_of_range(part):
        if isinstance(part, FastaStream):
            part.remember(piece)
        refuse_carriage_return(part, piece, seen)
        # needletail takes a last header of one byte, a bare >, for an empty file.
        text, latin1 = _decode(piece if piece.endswith(b"\n") else piece + b"\n")
        first = seen
        try:
            for record in needletail.parse_fastx_string(text):
                yield Record(record.id, record.seq, seen - first in latin1)
                seen += 1
        except needletail.NeedletailError as error:
            if "end of input" in str(error):
                header = text[text.rfind("\n>") + 2 :].rstrip("\r\n")
                if empty:
                    yield Record(header, "", seen - first in latin1)
                    seen += 1
                    continue
                refuse_empty_record(part, seen, split_header(header)[0])
            reason = str(error).split(" (line")[0].rstrip(".")
            raise FastaError(
                f"{part.path}:{line_of_record(part, seen)}: this record cannot be read ({reason}); "
                "the file is damaged or cut short, fetch it again."
            ) from None


def is_stream(path: str | Path) -> bool:
    """Whether a path can be read only once: standard input (`-`), a pipe or a device."""
    if str(path) == STANDARD_INPUT:
        return True
    path = Path(path)
    return path.is_fifo() or path.is_char_device()


def refuse_missing(path: str | Path, *, what: str = "FASTA file") -> None:
    """Raises FastaError unless the path is a file that can be read more than once."""
    path = Path(path)
    if path.is_file():
        return
    if is_stream(path):
        raise FastaError(
            f"{path} is standard input, a pipe or a device, which can be read only once, but a "
            f"{what} is read twice here; write it to a file first."
        )
    problem = "a folder" if path.is_dir() else "no file" if path.exists() else "not there"
    raise FastaError(f"A {what} is needed, but {path} is {problem}; name an existing file.")


def pieces(part: FastaPart | FastaStream) -> Iterator[bytes]:
    """Whole records of a file, about PIECE_BYTES at a time."""
    waiting: list[bytes] = []
    with _open(part) as file:
        chunk = file.read(PIECE_BYTES)
        _refuse_other_files(part.path, chunk)
        while chunk:
            begins = bool(waiting) and waiting[-1].endswith(b"\n") and chunk.startswith(b">")
            cut = chunk.rfind(b"\n>") + 1
            if cut or begins:
                yield b"".join([*waiting, chunk[:cut]])
                waiting = []
            waiting.append(chunk[cut:])
            if len(waiting) * PIECE_BYTES > 2 * LONGEST:
                raise FastaError(
                    f"{part.path}: a record has more than {LONGEST:,} letters, which is no "
                    "protein; remove it."
                )
            chunk = file.read(PIECE_BYTES)
    if waiting:
        yield b"".join(waiting)


def _open(part: FastaPart | FastaStream) -> BinaryIO:
    if isinstance(part, FastaStream) and part.file is not None:
        return part.file
    try:
        return open_plain(part.source, FastaError)
    except OSError as error:
        if not is_final(error):
            raise unreadable(part.path, error) from None
        reason = reason_of(error)
        raise FastaError(f"{part.path} cannot be opened ({reason}); give another file.") from None


def _pieces_of_range(part: FastaPart) -> Iterator[bytes]:
    """Whole records of a byte range of a plain file."""
    assert part.end is not None
    with (
        patiently(partial(Path(part.path).open, "rb")) as plain,
        mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        if part.start == 0:
            _refuse_other_files(part.path, data[:PIECE_BYTES])
        start = _next_record(data, part.start)
        while start < part.end:
            end = _next_record(data, min(start + PIECE_BYTES, part.end))
            yield data[start:end]
            start = end


def _next_record(data: mmap.mmap, place: int) -> int:
    """Where the first record at or after `place` starts, or the end of the data."""
    if place == 0:
        return 0
    found = data.find(b"\n>", place - 1)
    return len(data) if found < 0 else found + 1


INNER_CARRIAGE_RETURN = re.compile(rb"^>[^\n]*?\r(?!\r*(?:\n|\Z))", re.MULTILINE)


HEADER = re.compile(rb"^>[^\n]*", re.MULTILINE)


def refuse_carriage_return(part: FastaPart | FastaStream, piece: bytes, seen: int) -> None:
    """A CR within a header means lines that end with CR alone: letters would pass for a header."""
    if b"\r" in piece and (found := INNER_CARRIAGE_RETURN.search(piece)):
        index = seen + sum(1 for _ in HEADER.finditer(piece, 0, found.start()))
        raise FastaError(
            f"{part.path}:{line_of_record(part, index)}: a header holds a CR, so lines end with "
            "CR alone here, as on old Macs; convert them to LF."
        )


def _decode(piece: bytes) -> tuple[str, set[int]]:
    """The text of some records, and which of their headers are no UTF-8."""
    try:
        return piece.decode(), set()
    except UnicodeDecodeError:
        pass
    latin1: set[int] = set()
    pieces, end = [], 0
    for index, found in enumerate(HEADER.finditer(piece)):
        pieces.append(piece[end : found.start()].decode("utf-8", "replace"))
        end = found.end()
        try:
            pieces.append(found[0].decode())
        except UnicodeDecodeError:
            latin1.add(index)
            pieces.append(found[0].decode("latin-1"))
    pieces.append(piece[end:].decode("utf-8", "replace"))
    return "".join(pieces), latin1


def _refuse_other_files(path: str, beginning: bytes) -> None:
    """Refuse what is no FASTA at all, by the file's first line."""
    line = beginning.split(b"\n", 1)[0]
    shown = line[:20].decode("utf-8", "replace").strip()
    if line.startswith(b">"):
        return
    if not beginning:
        problem = "the file is empty; a FASTA file starts with a > line"
    elif line.startswith(b"\xef\xbb\xbf"):
        problem = "the file starts with a byte-order mark; save it as UTF-8 without one"
    elif b"\0" in line or sum(byte > 126 for byte in line) > len(line) // 4:
        problem = "this is a binary file, not FASTA text"
    elif line.startswith(b"@"):
        problem = "this is FASTQ (reads of DNA), not protein FASTA"
    elif not shown:
        problem = "a blank line before the first > line; remove it"
    else:
        problem = f"text before the first > line ({shown!r}); records start with a line like >name"
    raise FastaError(f"{path}:1: {problem}.")


def refuse_empty_record(part: FastaPart | FastaStream, index: int, name: str) -> None:
    raise FastaError(
        f"{part.path}:{line_of_record(part, index)}: the record {name!r} has no "
        "residues; give it a sequence or remove it."
    )


BLANKS = re.compile(r"[ \t\r\n\v\f]+")


def split_header(header: str) -> list[str]:
    """Name and description; blanks separate them, but no other of Unicode's spaces does."""
    words = (
        header.split(maxsplit=1)
        if header.isascii()
        else BLANKS.split(header.lstrip(" \t\r\n\v\f"), maxsplit=1)
    )
    return [*words, "", ""][:2]


def line_of_record(part: FastaPart | FastaStream, index: int) -> int:
    """The line on which a part's `index`-th record starts; files are read again for it."""
    if isinstance(part, FastaStream):
        return part.line_of(index)
    position = 0
    with open_plain(part.path, FastaError) as file:
        for number, line in enumerate(file, 1):
            if line.startswith(b">") and position >= part.start:
                if index == 0:
                    return number
                index -= 1
            position += len(line)
    return 0
