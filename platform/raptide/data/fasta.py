"""FASTA files of proteins, plain or compressed (gz, bz2, xz, zst; told by content, not by name).

needletail parses (440 M residues/s on one Zen 5 core, 60 letters a line); what is said here is what
a protein file must hold, and which line breaks the rule.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import needletail
import numpy as np
from xopen import xopen

from raptide.alphabet import BAD_RESIDUE, describe_bad_residue, translate_letters
from raptide.errors import FastaError

NUCLEOTIDES = b"ACGTUNacgtun"
NUCLEOTIDE_SHARE = 0.95
"""A file whose first batch has a larger share of A, C, G, T, U and N is taken for nucleotides;
these letters make up a quarter of natural proteins."""


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


def read_fasta(path: str | Path, batch_records: int = 4096) -> Iterator[FastaBatch]:
    """Read a FASTA file in batches of up to `batch_records` records, in file order.

    Raises:
        FastaError: the file is no protein FASTA; the message names file and line.
    """
    path = Path(path)
    records = _parse(path)
    first = 0
    while batch := list(islice(records, batch_records)):
        if first == 0:
            _refuse_nucleotides(path, batch)
        yield _encode(path, first, batch)
        first += len(batch)


def _parse(path: Path) -> Iterator[tuple[str, str]]:
    """(header, letters) of each record, without any check of the letters."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise FastaError(f"A FASTA file is needed, but {path} is {what}; name an existing file.")
    _refuse_other_files(path)
    seen = 0
    try:
        with _readable_by_needletail(path) as file:
            for record in needletail.parse_fastx_file(str(file)):
                yield record.id, record.seq
                seen += 1
    except needletail.NeedletailError as error:
        if "end of input" in str(error):
            _refuse_empty_record(path, seen, "")
        reason = str(error).split(" (line")[0].rstrip(".")
        line = _line_of_record(path, max(seen - 1, 0))
        raise FastaError(
            f"{path}: reading broke off after the record that starts at line {line}: {reason}; "
            "the file is damaged or cut short, fetch it again."
        ) from None


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


def _refuse_nucleotides(path: Path, records: list[tuple[str, str]]) -> None:
    letters = "".join(seq for _, seq in records).encode("ascii", "replace")
    letters = letters.translate(None, b" \t\r\n")
    others = len(letters.translate(None, NUCLEOTIDES))
    if len(letters) >= 20 and others < (1 - NUCLEOTIDE_SHARE) * len(letters):
        raise FastaError(
            f"{path}:{_line_of_record(path, 0)}: these are nucleotides "
            f"({1 - others / len(letters):.0%} A, C, G, T, U or N), but proteins are needed; "
            "translate the genes first."
        )


def _refuse_empty_record(path: Path, index: int, header: str) -> None:
    raise FastaError(
        f"{path}:{_line_of_record(path, index)}: the record {header.split(' ')[0]!r} has no "
        "residues; give it a sequence or remove it."
    )


def _encode(path: Path, first: int, records: list[tuple[str, str]]) -> FastaBatch:
    """Letters to residue ids, a lookup per byte; `first` is the index of the first record."""
    names, descriptions, chunks = [], [], []
    for offset, (header, letters) in enumerate(records):
        name, description = [*header.split(maxsplit=1), "", ""][:2]
        ids = translate_letters(letters)
        if not ids:
            _refuse_empty_record(path, first + offset, header)
        if not name:
            line = _line_of_record(path, first + offset)
            raise FastaError(f"{path}:{line}: a record needs a name; write one after the >.")
        names.append(name)
        descriptions.append(description)
        chunks.append(ids)
    joined = b"".join(chunks)
    if BAD_RESIDUE in joined:
        index, ids = next((i, ids) for i, ids in enumerate(chunks) if BAD_RESIDUE in ids)
        problem = describe_bad_residue(records[index][1], ids.find(BAD_RESIDUE))
        line = _line_of_record(path, first + index)
        raise FastaError(f"{path}:{line}: record {names[index]!r}: {problem}")
    lengths = np.fromiter(map(len, chunks), np.int64, len(chunks))
    return FastaBatch(names, descriptions, joined, lengths)


def _line_of_record(path: Path, index: int) -> int:
    """The line on which the `index`-th record starts: read again, since only errors need it."""
    with xopen(path, "rb", threads=0) as file:
        starts = (number for number, line in enumerate(file, 1) if line.startswith(b">"))
        return next(islice(starts, index, None), 0)
