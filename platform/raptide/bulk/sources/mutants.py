"""What a row of a table says: its protein and its variant.

The protein is told by the first of these columns that a table has:

    id                 with --fasta: the record of that name
    sequence           the protein
    mutated_sequence   the protein with the variant in it, as in ProteinGym's files: put back
    (none)             a Parquet file may name one for all rows, `target_sequence` in its metadata
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from raptide.alphabet import decode_residues
from raptide.bulk.sources.tables import read_letters
from raptide.bulk.units import Source
from raptide.bulk.variants import write_item
from raptide.calls.variants import apply_variant, parse_variant, spell_variant
from raptide.errors import ConfigError, InputError, SequenceError

Column = Literal["id", "sequence", "mutated_sequence", "target_sequence"]

MUTANT = "mutant"

WILD_TYPE = ("", "wt", "_wt")
"""Variants, in lower case, that are none."""

MOST_LOOKUP_RESIDUES = 1 << 27
"""Of all proteins in --fasta, which are held in memory."""

LONGEST_REASON = 300


@dataclass(frozen=True)
class Proteins:
    """What `id` refers to: the records of some FASTA files or tables."""

    sources: tuple[Source, ...]

    @cached_property
    def digest(self) -> str:
        surveys = (source.survey(0, _Plain()) for source in self.sources)
        return hashlib.sha256("".join(each.digest for each in surveys).encode()).hexdigest()

    @cached_property
    def by_name(self) -> dict[str, str]:
        """Sequences; "" where records of one name differ, or are none.

        Raises:
            InputError: they are too many.
        """
        found: dict[str, str] = {}
        residues = 0
        for source in self.sources:
            for stretch in source.stretches(source.survey(0, _Plain()).units):
                for records in source.read(stretch):
                    for name, sequence in zip(records.ids, records.items, strict=True):
                        known = found.setdefault(name, sequence)
                        found[name] = sequence if known == sequence else ""
                    residues += sum(records.lengths)
                    if residues > MOST_LOOKUP_RESIDUES:
                        raise InputError(
                            f"--fasta holds more than {MOST_LOOKUP_RESIDUES:,} residues; give "
                            "files of the proteins that the tables name."
                        )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"sources": self.sources}  # each process reads them anew


class _Plain:
    """Sizes of records that are only read."""

    def tokens(self, residues: np.ndarray) -> np.ndarray:
        return residues

    def output_bytes(self, residues: np.ndarray) -> np.ndarray:
        return residues


@dataclass(frozen=True)
class Meaning:
    """How a row names its protein and its variant."""

    by: Column
    offset: int = 0
    target: str = ""
    """The protein of all rows, where there is one."""
    proteins: Proteins | None = None

    def choose(self, columns: Sequence[str]) -> list[str]:
        """Those that are looked at: the variant, the protein, and the name if there is one."""
        mine = [] if self.by == "target_sequence" else [self.by]
        return list(dict.fromkeys([MUTANT, *mine, *(["id"] if "id" in columns else [])]))

    def letters(self, given: str) -> str:
        """A row's protein, still with its variant where the column has it so."""
        if self.by == "target_sequence":
            return self.target
        return self.proteins.by_name.get(given, "") if self.proteins else given

    def judge(self, given: str, mutant: str) -> tuple[str, int, str]:
        """A row's item, its residues, and why nothing can be computed of it or ""."""
        letters = self.letters(given)
        if self.proteins and not letters:
            known = given in self.proteins.by_name
            what = "several, or no protein, are" if known else "no record of --fasta is"
            return "", 0, f"unknown id: {what} called {given!r}"[:LONGEST_REASON]
        residues, flaw = _read(letters)
        if flaw:
            return "", len(letters), flaw[:LONGEST_REASON]
        if mutant.strip().lower() in WILD_TYPE:
            return write_item(decode_residues(residues), ""), len(residues), ""
        try:
            if self.by == "mutated_sequence":
                residues = revert(mutant, residues, self.offset)
            variant = spell_variant(parse_variant(mutant, residues, self.offset))
        except SequenceError as error:
            return "", len(residues), f"misfit: {error}"[:LONGEST_REASON]
        return write_item(decode_residues(residues), variant), len(residues), ""


_read = lru_cache(64)(read_letters)


def revert(mutant: str, residues: np.ndarray, offset: int) -> np.ndarray:
    """The wild type of a sequence in which a variant is already, [L] uint8.

    Raises:
        SequenceError: it is not in there.
    """
    turned = ":".join(part.strip()[::-1] for part in mutant.split(":"))
    turned = re.sub("[0-9]+", lambda digits: digits[0][::-1], turned)
    try:
        return apply_variant(residues, parse_variant(turned, residues, offset))
    except SequenceError as error:
        raise SequenceError(f"mutated_sequence does not hold {mutant!r} ({error})") from None


def choose_meaning(
    name: str, columns: Sequence[str], target: str, offset: int, proteins: Proteins | None
) -> Meaning:
    """How the rows of a table with some columns are to be read.

    Raises:
        ConfigError: they name no protein, or no variant.
    """
    wanted = (*(("id",) if proteins else ()), "sequence", "mutated_sequence")
    there = [each for each in wanted if each in columns] or ["target_sequence"] * bool(target)
    if MUTANT in columns and there:
        by: Any = there[0]
        return Meaning(by, offset, target, proteins if by == "id" else None)
    lacking = " or ".join(wanted) if MUTANT in columns else MUTANT
    raise ConfigError(
        f"{name} has no column {lacking} among {', '.join(columns)[:200]}; tables of variants have "
        "mutant and sequence, mutant and mutated_sequence, or mutant and id with --fasta."
    )
