"""FASTA files of proteins: residue ids, and what becomes of records that are no proteins.

fasta_text.py reads the file; what is said here is what a protein must hold, and which line breaks
the rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from raptide.alphabet import (
    BAD_RESIDUE,
    FIRST_RESIDUE,
    RESIDUES,
    describe_bad_residue,
    drop_blanks,
    translate_batch,
)
from raptide.config import Settings
from raptide.data.fasta_text import (
    LONGEST,
    FastaPart,
    FastaStream,
    Record,
    line_of_record,
    open_fasta,
    parse,
    refuse_empty_record,
    split_header,
)
from raptide.errors import FastaError

NUCLEOTIDES = "ACGTUN"
NUCLEOTIDE_SHARE = 0.95
"""Records with a larger share of A, C, G, T, U and N are taken for nucleotides; these letters make
up a quarter of natural proteins."""

NUCLEOTIDE_LETTERS = 20
"""Fewer letters are too few to tell by."""


BATCH_LETTERS = 16 << 20
"""Letters after which a batch ends early, so that giant records do not gather in one."""


FLAWS = ("", "stop_codon", "bad_letters", "nucleotides", "empty")
"""What may be wrong with a record that is to be dropped, by number."""

SOUND, STOP_CODON, BAD_LETTERS, NUCLEOTIDE, EMPTY = range(len(FLAWS))


class ReadingRules(Settings):
    """What becomes of records that are no proteins as they stand. By default they are refused."""

    stop_codons: Literal["refuse", "drop", "split"] = "refuse"
    """Records with a stop (`*` or `.`) that is not a single `*` at the end; `split` cuts them there
    into records of their own, called NAME/START-END."""

    bad_letters: Literal["refuse", "drop"] = "refuse"
    """Records with anything else that is no residue letter."""

    nucleotides: Literal["refuse", "drop", "keep"] = "refuse"
    """Records of DNA or RNA: those whose header says `mol:na` and those of which nearly all letters
    are A, C, G, T, U or N (where `mol:protein` does not say otherwise). `refuse` judges letters by
    the file's first records together; `keep` takes every record for a protein."""

    bare: Literal["refuse", "drop"] = "refuse"
    """Records without a name or without residues. `drop` drops those without residues, and takes
    those without a name by the name ""."""


class FastaBatch(NamedTuple):
    """Some records of one file, residues joined end to end."""

    names: list[str]
    """The header's first word, [n]."""

    descriptions: list[str]
    """The rest of the header, [n]."""

    residues: bytes
    """Residue ids, one byte each, [sum of lengths]; of flawed records also BAD_RESIDUE."""

    lengths: np.ndarray
    """Residues in each record, [n] int64."""

    flaws: np.ndarray
    """Why a record is to be dropped, an index into FLAWS, [n] int8; all SOUND by default."""

    latin1: np.ndarray
    """Whether a record's header was no UTF-8, [n] bool."""

    places: np.ndarray
    """Which record of its part each one is, or is cut out of, [n] int64."""


def read_fasta(
    file: str | Path | FastaPart | FastaStream,
    batch_records: int = 4096,
    rules: ReadingRules = ReadingRules(),  # noqa: B008 (frozen)
) -> Iterator[FastaBatch]:
    """Read a FASTA file, or a part of one, in batches of up to `batch_records` records, in order.

    Standard input (`-`) and pipes are read once, as they come.

    Raises:
        FastaError: the file is no protein FASTA, or a record is to be refused; the message names
            file and line.
    """
    part = file if isinstance(file, FastaPart | FastaStream) else open_fasta(file)
    first = 0
    for records in _batches(parse(part, empty=rules.bare == "drop"), batch_records):
        batch = _encode(part, first, records, rules)
        if rules.nucleotides != "keep":
            batch = _judge_nucleotides(part, batch, rules.nucleotides)
        yield batch
        first += len(records)
        if isinstance(part, FastaStream):
            part.forget(first)


def locate(part: FastaPart, index: int, rules: ReadingRules) -> tuple[str, int]:
    """Name and line of the `index`-th record that `read_fasta` gives; reads the part again."""
    for batch in read_fasta(part, rules=rules):
        if index < len(batch.names):
            return batch.names[index], line_of_record(part, int(batch.places[index]))
        index -= len(batch.names)
    raise AssertionError("no such record")


def _batches(records: Iterator[Record], batch_records: int) -> Iterator[list[Record]]:
    batch, letters = [], 0
    for record in records:
        batch.append(record)
        letters += len(record.letters)
        if len(batch) == batch_records or letters >= BATCH_LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _encode(
    part: FastaPart | FastaStream, first: int, records: list[Record], rules: ReadingRules
) -> FastaBatch:
    """Letters to residue ids, a lookup per byte; `first` is the index of the first record."""
    names, descriptions = [], []
    for index, record in enumerate(records, first):
        name, description = split_header(record.header)
        if not name and rules.bare == "refuse":
            line = line_of_record(part, index)
            raise FastaError(f"{part.path}:{line}: a record needs a name; write one after the >.")
        names.append(name)
        descriptions.append(description)
    residues, lengths = translate_batch([record.letters for record in records])
    if rules.bare == "refuse" and not lengths.all():
        index = int(lengths.argmin())
        refuse_empty_record(part, first + index, names[index])
    if lengths.max() > LONGEST:
        index = int(lengths.argmax())
        raise FastaError(
            f"{part.path}:{line_of_record(part, first + index)}: the record {names[index]!r} has "
            f"{lengths[index]:,} residues, but {LONGEST:,} are the most; remove it."
        )
    batch = FastaBatch(
        names,
        descriptions,
        residues,
        lengths,
        np.where(lengths == 0, EMPTY, SOUND).astype(np.int8),
        np.array([record.latin1 for record in records]),
        np.arange(first, first + len(names)),
    )
    if BAD_RESIDUE in residues:
        return _judge_letters(part, records, batch, rules)
    return batch


def _judge_letters(
    part: FastaPart | FastaStream, records: list[Record], batch: FastaBatch, rules: ReadingRules
) -> FastaBatch:
    """Refuse, mark or split the records that hold something which is no residue."""
    bad = np.flatnonzero(np.frombuffer(batch.residues, np.uint8) == BAD_RESIDUE)
    ends = np.cumsum(batch.lengths)
    fragments: dict[int, list[tuple[int, str]]] = {}
    for index in np.unique(np.searchsorted(ends, bad, side="right")).tolist():
        letters = drop_blanks(records[index].letters)
        only_stops = not re.search(r"[^A-Za-z*.]", letters)
        if (rules.stop_codons if only_stops else rules.bad_letters) == "refuse":
            start = ends[index] - batch.lengths[index]
            place = int(bad[np.searchsorted(bad, start)] - start)
            option = "--stop-codons drop or split" if only_stops else "--bad-letters drop"
            raise FastaError(
                f"{part.path}:{line_of_record(part, int(batch.places[index]))}: record "
                f"{batch.names[index]!r}: {describe_bad_residue(letters, place).rstrip('.')}; "
                f"{option} does without such records."
            )
        batch.flaws[index] = STOP_CODON if only_stops else BAD_LETTERS
        if only_stops and rules.stop_codons == "split":
            cut = [(each.start(), each[0]) for each in re.finditer(r"[A-Za-z]+", letters)]
            if cut:
                fragments[index] = cut
    return _split_records(records, batch, fragments) if fragments else batch


def _split_records(
    records: list[Record], batch: FastaBatch, fragments: dict[int, list[tuple[int, str]]]
) -> FastaBatch:
    """The batch with some records replaced by their fragments: (start, letters) of each."""
    names, letters, flaws, source = [], [], [], []
    for index, name in enumerate(batch.names):
        for start, each in fragments.get(index, [(0, records[index].letters)]):
            alone = len(fragments.get(index, ())) <= 1
            names.append(name if alone else f"{name}/{start + 1}-{start + len(each)}")
            letters.append(each)
            flaws.append(SOUND if index in fragments else batch.flaws[index])
            source.append(index)
    residues, lengths = translate_batch(letters)
    return FastaBatch(
        names,
        [batch.descriptions[index] for index in source],
        residues,
        lengths,
        np.array(flaws, np.int8),
        batch.latin1[source],
        batch.places[source],
    )


IS_NUCLEOTIDE = np.zeros(256, bool)
IS_NUCLEOTIDE[[FIRST_RESIDUE + RESIDUES.index(letter) for letter in NUCLEOTIDES]] = True

MOLECULE = re.compile(r"(?:^|\s)mol:(\S+)")
"""What PDB's pdb_seqres.txt says of each chain: `mol:protein` or `mol:na`."""


def _judge_nucleotides(
    part: FastaPart | FastaStream, batch: FastaBatch, rule: Literal["refuse", "drop"]
) -> FastaBatch:
    """Refuse or mark the records that are nucleotides."""
    stated = [
        found[1] if "mol:" in description and (found := MOLECULE.search(description)) else ""
        for description in batch.descriptions
    ]
    sure = np.array([molecule == "na" for molecule in stated])
    open_ = np.array([not molecule for molecule in stated])
    first = part.start == 0 and batch.places[0] == 0
    if rule == "refuse" and not sure.any() and not first:
        return batch
    letters = IS_NUCLEOTIDE[np.frombuffer(batch.residues, np.uint8)]
    sums = np.concatenate([[0], np.cumsum(letters, dtype=np.int64)])
    ends = np.cumsum(batch.lengths)
    counts = sums[ends] - sums[ends - batch.lengths]
    if rule == "drop":
        alike = (counts > NUCLEOTIDE_SHARE * batch.lengths) & (batch.lengths >= NUCLEOTIDE_LETTERS)
        batch.flaws[(sure | (open_ & alike)) & (batch.flaws == SOUND)] = NUCLEOTIDE
        return batch
    judged = max(int(batch.lengths[open_].sum()), 1)
    share = counts[open_].sum() / judged
    if sure.any():
        index, what = int(sure.argmax()), "this chain is of nucleotides (mol:na)"
    elif judged >= NUCLEOTIDE_LETTERS and share > NUCLEOTIDE_SHARE:
        index, what = int(open_.argmax()), f"these are nucleotides ({share:.0%} A, C, G, T, U or N)"
    else:
        return batch
    raise FastaError(
        f"{part.path}:{line_of_record(part, int(batch.places[index]))}: {what}, but proteins are "
        "needed; translate the genes first, or give --nucleotides drop to leave such records out, "
        "keep to take them for proteins."
    )
