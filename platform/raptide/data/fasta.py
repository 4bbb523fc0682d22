"""FASTA files of proteins, plain or compressed (gz, bz2, xz, zst; told by content, not by name).

needletail parses (440 M residues/s on one Zen 5 core, 60 letters a line); what is said here is what
a protein file must hold, and which line breaks the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import needletail
import numpy as np
from xopen import xopen

from raptide.alphabet import BAD_RESIDUE, RESIDUE_IDS, WHITE_SPACE, describe_bad_residue
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
        for record in needletail.parse_fastx_file(str(path)):
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


def _refuse_other_files(path: Path) -> None:
    """Refuse what is no FASTA at all, by the file's first non-blank line."""
    try:
        with xopen(path, "rb", threads=0) as file:
            line_number, line = next(
                ((n, text) for n, text in enumerate(file, 1) if text.strip()), (1, b"")
            )
    except (OSError, EOFError, ValueError) as error:
        raise FastaError(f"{path}: cannot be decompressed ({error}); fetch it again.") from None
    if not line:
        raise FastaError(f"{path}:1: the file is empty; a FASTA file starts with a > line.")
    if line.startswith(b">"):
        return
    if b"\0" in line or sum(byte > 126 for byte in line) > len(line) // 4:
        raise FastaError(f"{path}:{line_number}: this is a binary file, not FASTA text.")
    if line.startswith(b"@"):
        raise FastaError(f"{path}:{line_number}: this is FASTQ (reads of DNA), not protein FASTA.")
    shown = line[:20].decode("utf-8", "replace").strip()
    raise FastaError(
        f"{path}:{line_number}: text before the first > line ({shown!r}); "
        "every record starts with a line like >name."
    )


def _refuse_nucleotides(path: Path, records: list[tuple[str, str]]) -> None:
    letters = "".join(seq for _, seq in records).encode("ascii", "replace")
    letters = letters.translate(None, WHITE_SPACE)
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
        ids = letters.encode("ascii", "replace").translate(RESIDUE_IDS, WHITE_SPACE)
        if ids.endswith(b"\xff") and letters.rstrip().endswith("*"):
            ids = ids[:-1]
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
        text = records[index][1].encode("ascii", "replace")
        problem = describe_bad_residue(text, ids.find(BAD_RESIDUE))
        line = _line_of_record(path, first + index)
        raise FastaError(f"{path}:{line}: record {names[index]!r}: {problem}")
    lengths = np.fromiter(map(len, chunks), np.int64, len(chunks))
    return FastaBatch(names, descriptions, joined, lengths)


def _line_of_record(path: Path, index: int) -> int:
    """The line on which the `index`-th record starts: read again, since only errors need it."""
    with xopen(path, "rb", threads=0) as file:
        starts = (number for number, line in enumerate(file, 1) if line.startswith(b">"))
        return next(islice(starts, index, None), 0)
