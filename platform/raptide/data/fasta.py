"""FASTA files of proteins, plain or compressed (gz, bz2, xz, zst; told by content, not by name).

needletail parses (440 M residues/s on one Zen 5 core, 60 letters a line); what is said here is what
a protein file must hold, and which line breaks the rule. A plain file can be read in parts, by byte
range: a record belongs to the part in which its > lies.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import needletail
import numpy as np
from xopen import xopen

from raptide.alphabet import BAD_RESIDUE, describe_bad_residue, translate_batch
from raptide.errors import FastaError

NUCLEOTIDES = b"ACGTUNacgtun"
NUCLEOTIDE_SHARE = 0.95
"""A file whose first batch has a larger share of A, C, G, T, U and N is taken for nucleotides;
these letters make up a quarter of natural proteins."""


PART_BYTES = 64 << 20
"""Bytes of a plain file that one task reads."""

PIECE_BYTES = 4 << 20
"""Bytes of it that are parsed at once, so that they stay in the processor's cache."""

BATCH_LETTERS = 16 << 20
"""Letters after which a batch ends early, so that giant records do not gather in one."""

LONGEST = 1 << 30
"""Letters in a record, at most: 30,000 times titin; what is longer is no protein."""


class FastaPart(NamedTuple):
    """A byte range of one file; `end` None reads to the end."""

    path: str
    start: int = 0
    end: int | None = None


class FastaBatch(NamedTuple):
    """Some records of one file, residues joined end to end."""

    names: list[str]
    """The header's first word, [n]."""

    descriptions: list[str]
    """The rest of the header, [n]."""

    residues: bytes
    """Residue ids, one byte each, [sum of lengths]."""

    lengths: np.ndarray
    """Residues in each record, [n] int64."""


def split_fasta(path: str | Path, part_bytes: int = PART_BYTES) -> list[FastaPart]:
    """The parts of one file: byte ranges of a plain one, the whole of a compressed one.

    Raises:
        FastaError: the path is no file.
    """
    path = Path(path).resolve()
    _refuse_missing(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        plain = file.read(1) == b">"
    if not plain or size <= part_bytes:
        return [FastaPart(str(path))]
    starts = range(0, size, part_bytes)
    return [FastaPart(str(path), start, min(start + part_bytes, size)) for start in starts]


def read_fasta(file: str | Path | FastaPart, batch_records: int = 4096) -> Iterator[FastaBatch]:
    """Read a FASTA file, or a part of one, in batches of up to `batch_records` records, in order.

    Raises:
        FastaError: the file is no protein FASTA; the message names file and line.
    """
    part = file if isinstance(file, FastaPart) else FastaPart(str(file))
    first = 0
    for batch in _batches(_parse(part), batch_records):
        if first == 0 and part.start == 0:
            _refuse_nucleotides(part, batch)
        yield _encode(part, first, batch)
        first += len(batch)


def _batches(
    records: Iterator[tuple[str, str]], batch_records: int
) -> Iterator[list[tuple[str, str]]]:
    batch, letters = [], 0
    for record in records:
        batch.append(record)
        letters += len(record[1])
        if len(batch) == batch_records or letters >= BATCH_LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _parse(part: FastaPart) -> Iterator[tuple[str, str]]:
    """(header, letters) of each record, without any check of the letters."""
    path = Path(part.path)
    _refuse_missing(path)
    if part.start == 0:
        _refuse_other_files(path)
    seen = 0
    try:
        for record in _records(part):
            yield record.id, record.seq
            seen += 1
    except needletail.NeedletailError as error:
        if "end of input" in str(error):
            _refuse_empty_record(part, seen, "")
        reason = str(error).split(" (line")[0].rstrip(".")
        line = _line_of_record(part, max(seen - 1, 0))
        raise FastaError(
            f"{path}: reading broke off after the record that starts at line {line}: {reason}; "
            "the file is damaged or cut short, fetch it again."
        ) from None


def _refuse_missing(path: Path) -> None:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise FastaError(f"A FASTA file is needed, but {path} is {what}; name an existing file.")


def _records(part: FastaPart) -> Iterator[needletail.Record]:
    if part.end is None:
        with _readable_by_needletail(Path(part.path)) as file:
            yield from needletail.parse_fastx_file(str(file))
        return
    with (
        Path(part.path).open("rb") as plain,
        mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        start = _next_record(data, part.start)
        while start < part.end:
            end = _next_record(data, min(start + PIECE_BYTES, part.end))
            yield from needletail.parse_fastx_string(data[start:end].decode("utf-8", "replace"))
            start = end


def _next_record(data: mmap.mmap, place: int) -> int:
    """Where the first record at or after `place` starts, or the end of the data."""
    if place == 0:
        return 0
    found = data.find(b"\n>", place - 1)
    return len(data) if found < 0 else found + 1


@contextmanager
def _readable_by_needletail(path: Path) -> Iterator[Path]:
    """The file itself, or a plain copy: of bz2 and xz, needletail reads the first stream alone."""
    with path.open("rb") as file:
        if not file.read(6).startswith((b"BZh", b"\xfd7zXZ\0")):
            yield path
            return
    with tempfile.NamedTemporaryFile(prefix="raptide-", suffix=".fasta") as plain:
        try:
            with xopen(path, "rb", threads=0) as packed:
                shutil.copyfileobj(packed, plain, 1 << 20)
        except (OSError, EOFError, ValueError) as error:
            raise _not_decompressed(path, error) from None
        plain.flush()
        yield Path(plain.name)


def _refuse_other_files(path: Path) -> None:
    """Refuse what is no FASTA at all, by the file's first line."""
    try:
        with xopen(path, "rb", threads=0) as file:
            line = file.readline()
    except (OSError, EOFError, ValueError) as error:
        raise _not_decompressed(path, error) from None
    shown = line[:20].decode("utf-8", "replace").strip()
    if not line:
        problem = "the file is empty; a FASTA file starts with a > line"
    elif line.startswith(b">"):
        if b"\r" not in line.rstrip(b"\r\n"):
            return
        problem = "lines end with CR alone, as on old Macs; convert them to LF"
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


def _not_decompressed(path: Path, error: Exception) -> FastaError:
    return FastaError(f"{path}: cannot be decompressed ({error}); fetch it again.")


def _refuse_nucleotides(part: FastaPart, records: list[tuple[str, str]]) -> None:
    letters = "".join(seq for _, seq in records).encode("ascii", "replace")
    letters = letters.translate(None, b" \t\r\n")
    others = len(letters.translate(None, NUCLEOTIDES))
    if len(letters) >= 20 and others < (1 - NUCLEOTIDE_SHARE) * len(letters):
        raise FastaError(
            f"{part.path}:{_line_of_record(part, 0)}: these are nucleotides "
            f"({1 - others / len(letters):.0%} A, C, G, T, U or N), but proteins are needed; "
            "translate the genes first."
        )


def _refuse_empty_record(part: FastaPart, index: int, name: str) -> None:
    raise FastaError(
        f"{part.path}:{_line_of_record(part, index)}: the record {name!r} has no "
        "residues; give it a sequence or remove it."
    )


def _encode(part: FastaPart, first: int, records: list[tuple[str, str]]) -> FastaBatch:
    """Letters to residue ids, a lookup per byte; `first` is the index of the first record."""
    names, descriptions = [], []
    for index, (header, _) in enumerate(records, first):
        name, description = [*header.split(maxsplit=1), "", ""][:2]
        if not name:
            line = _line_of_record(part, index)
            raise FastaError(f"{part.path}:{line}: a record needs a name; write one after the >.")
        names.append(name)
        descriptions.append(description)
    residues, lengths = translate_batch([letters for _, letters in records])
    if not lengths.all():
        index = int(lengths.argmin())
        _refuse_empty_record(part, first + index, names[index])
    if lengths.max() > LONGEST:
        index = int(lengths.argmax())
        raise FastaError(
            f"{part.path}:{_line_of_record(part, first + index)}: the record {names[index]!r} has "
            f"{lengths[index]:,} residues, but {LONGEST:,} are the most; remove it."
        )
    if (bad := residues.find(BAD_RESIDUE)) >= 0:
        ends = np.cumsum(lengths)
        index = int(np.searchsorted(ends, bad, side="right"))
        place = bad - int(ends[index] - lengths[index])
        raise FastaError(
            f"{part.path}:{_line_of_record(part, first + index)}: record {names[index]!r}: "
            f"{describe_bad_residue(records[index][1], place)}"
        )
    return FastaBatch(names, descriptions, residues, lengths)


def _line_of_record(part: FastaPart, index: int) -> int:
    """The line on which a part's `index`-th record starts; read again, since only errors ask."""
    position = 0
    with xopen(part.path, "rb", threads=0) as file:
        for number, line in enumerate(file, 1):
            if line.startswith(b">") and position >= part.start:
                if index == 0:
                    return number
                index -= 1
            position += len(line)
    return 0
