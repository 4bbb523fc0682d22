"""Deep mutational scans: what was measured of many variants of one protein.

Two forms are read, told by the first bytes:

Parquet   `mutant`, `score` and perhaps `bin`; in the schema's metadata `target_sequence`, `assay`
          and perhaps `uniprot_id` and `selection_type`
CSV       ProteinGym's: `mutant`, `DMS_score`, perhaps `DMS_score_bin`. The protein is `target_seq`
          of the reference file (DMS_substitutions.csv); without one, `mutated_sequence` with the
          variant put back

Variants are written as A42G, counted from 1, several substitutions as A42G:K50R. What is called
`WT`, or nothing, or changes no residue, is the protein itself and is left out.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from raptide.alphabet import FIRST_RESIDUE, RESIDUES, STANDARD, decode_residues, encode_residues
from raptide.bulk.sources.mutants import WILD_TYPE, revert
from raptide.bulk.sources.tables import PARQUET
from raptide.calls.variants import Substitution, apply_variant, parse_variant, spell_variant
from raptide.errors import InputError, SequenceError

ALL = "all"
"""The dataset of what is averaged over assays."""

COLUMNS = np.array([STANDARD.find(letter) for letter in RESIDUES])
"""Residue id less FIRST_RESIDUE to column of STANDARD, -1 for none, [27]."""


class Changes(NamedTuple):
    """The substitutions of all variants, end to end, [s] each."""

    variant: np.ndarray
    """Index of the variant that each belongs to, rising."""
    position: np.ndarray
    """Counted from 0."""
    wild_type: np.ndarray
    """Column of STANDARD, as `mutant`."""
    mutant: np.ndarray


@dataclass(frozen=True)
class Assay:
    """One scan; n variants."""

    name: str
    target: str
    mutants: list[str]
    """[n], each once, positions rising."""
    scores: np.ndarray
    """[n] float64; the higher, the fitter."""
    bins: np.ndarray | None
    """[n] bool, whether fit; None where the file does not say."""
    changes: Changes
    protein: str
    """UniProt id, or the assay's name."""
    selection: str
    """What was selected for: `Activity`, `Binding`, ..., or ""."""

    @property
    def fit(self) -> np.ndarray:
        """[n] bool: `bins`, or what is not below the median score."""
        return self.scores >= np.median(self.scores) if self.bins is None else self.bins

    @property
    def positions(self) -> np.ndarray:
        """Those that any variant changes, rising."""
        return np.unique(self.changes.position)

    @cached_property
    def units(self) -> np.ndarray:
        """Number of the set of positions that each variant changes, [n] int64: variants of one
        position stand or fall together, and so do those of one pair of positions."""
        ends = np.searchsorted(self.changes.variant, np.arange(len(self.mutants) + 1))
        known: dict[bytes, int] = {}
        places = [self.changes.position[a:b].tobytes() for a, b in pairwise(ends)]
        return np.array([known.setdefault(each, len(known)) for each in places], np.int64)

    def take(self, kept: np.ndarray) -> Assay:
        """Some of the variants, by rising index."""
        new = np.full(len(self.mutants), -1)
        new[kept] = np.arange(len(kept))
        there = new[self.changes.variant] >= 0
        changes = Changes(*(each[there] for each in self.changes))
        return Assay(
            self.name,
            self.target,
            [self.mutants[i] for i in kept],
            self.scores[kept],
            None if self.bins is None else self.bins[kept],
            changes._replace(variant=new[changes.variant]),
            self.protein,
            self.selection,
        )

    def sequence(self, variant: int) -> str:
        """The protein with the `variant`-th variant in it."""
        letters = list(self.target)
        first, last = np.searchsorted(self.changes.variant, [variant, variant + 1])
        for position, column in zip(
            self.changes.position[first:last], self.changes.mutant[first:last], strict=True
        ):
            letters[position] = STANDARD[column]
        return "".join(letters)


def find_files(pattern: str) -> list[Path]:
    """Files of a path or glob, in the order of their names.

    Raises:
        InputError: there is none.
    """
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    files = [path for path in found if path.is_file()]
    if not files:
        raise InputError(
            f"`assays` must name files of variants, but nothing matches {pattern}; put them there, "
            "or give another path."
        )
    return files


def read_assays(files: Sequence[Path], reference: Path | None = None) -> list[Assay]:
    """All scans, each name once.

    Args:
        reference: ProteinGym's DMS_substitutions.csv: `DMS_id`, `target_seq`, and perhaps
            `DMS_filename`, `UniProt_ID`, `coarse_selection_type`. CSV files must stand in it.

    Raises:
        InputError: a column is missing, a variant does not fit its protein, a letter is not one
            of the 20 standard ones, a score is no number; in one sentence with file and row.
    """
    known = _read_reference(reference) if reference else None
    assays: dict[str, Assay] = {}
    for file in files:
        assay = read_assay(file, known)
        if assay.name == ALL:
            raise InputError(
                f"{ALL!r} is what the mean over assays is called, but {file} is an assay of that "
                "name; give it another one."
            )
        if assay.name in assays:
            raise InputError(
                f"Each assay has a name of its own, but {file} is another {assay.name!r}; leave "
                "one of the two files out."
            )
        assays[assay.name] = assay
    return list(assays.values())


def read_assay(file: Path, reference: Mapping[str, dict[str, str]] | None = None) -> Assay:
    """One scan; raises as `read_assays` does."""
    table = read_table(file)
    metadata = table.schema.metadata or {}
    facts = {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, value in metadata.items()
    }
    if reference is not None and not facts.get("target_sequence"):
        facts = _look_up(file, reference)
    mutants = _column(file, table, "mutant")
    scores = _column(file, table, "score", "DMS_score")
    binned = {"bin", "DMS_score_bin"} & {*table.column_names}
    bins = table[min(binned)].to_pylist() if binned else None
    rows = [i for i, each in enumerate(mutants) if str(each or "").strip().lower() not in WILD_TYPE]
    target = _read_target(file, facts, table, rows)
    found: dict[str, int] = {}
    changes: list[list[Substitution]] = []
    for row in rows:
        changed = _parse(file, row, mutants[row], target)
        if not changed:
            continue
        name = spell_variant(changed)
        if name in found:
            raise InputError(
                f"Each variant stands in a file once, but {file}, row {row + 1} has {name} again "
                f"after row {found[name] + 1}; keep one of them, or their mean."
            )
        found[name] = row
        changes.append(changed)
    if not found:
        raise InputError(f"{file} holds no variant; give one row at least, or leave it out.")
    kept = list(found.values())
    name = facts.get("assay") or file.name.split(".")[0]
    return Assay(
        name,
        decode_residues(target),
        list(found),
        np.array([_number(file, row, scores[row]) for row in kept], np.float64),
        None if bins is None else np.array([_bit(file, row, bins[row]) for row in kept]),
        _flatten(changes),
        facts.get("uniprot_id") or name,
        facts.get("selection_type") or "",
    )


def read_table(file: Path) -> pa.Table:
    """A table of Parquet, or of CSV, plain or compressed, whose cells are then all strings.

    Raises:
        InputError: it is neither, or cannot be read.
    """
    try:
        with file.open("rb") as opened:
            parquet = opened.read(len(PARQUET)) == PARQUET
        table = pq.read_table(file) if parquet else _read_csv(file)
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror or error}); give an existing file."
        ) from None
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{file} is neither a whole Parquet file nor CSV ({reason}); write it again."
        ) from None
    names = table.column_names
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"{file} has more than one column {twice[0]!r}; columns have names of their own."
        )
    return table


def _read_csv(file: Path) -> pa.Table:
    serial = pa_csv.ReadOptions(use_threads=False)  # what is wrong then comes with its row
    with pa_csv.open_csv(file, serial) as opened:
        names = opened.schema.names
    strings = pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    return pa_csv.read_csv(file, serial, None, strings)


def _read_reference(file: Path) -> dict[str, dict[str, str]]:
    """What the reference says of each assay, by id and by file name."""
    table = read_table(file)
    ids = _column(file, table, "DMS_id")
    columns = {"assay": ids, "target_sequence": _column(file, table, "target_seq")}
    for name, theirs in (("uniprot_id", "UniProt_ID"), ("selection_type", "coarse_selection_type")):
        if theirs in table.column_names:
            columns[name] = table[theirs].to_pylist()
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    found = dict(zip(ids, rows, strict=True))
    if "DMS_filename" in table.column_names:
        found |= dict(zip(table["DMS_filename"].to_pylist(), rows, strict=True))
    return found


def _look_up(file: Path, reference: Mapping[str, dict[str, str]]) -> dict[str, str]:
    for key in (file.name, file.name.split(".")[0]):
        if key in reference:
            return reference[key]
    raise InputError(
        f"{file} has no row in `reference`, whose DMS_id or DMS_filename would name it; add one, "
        "or leave the file out."
    )


def _column(file: Path, table: pa.Table, *names: str) -> list[Any]:
    for name in names:
        if name in table.column_names:
            return list(table[name].to_pylist())
    there = ", ".join(table.column_names)[:200]
    raise InputError(
        f"{file} needs a column {' or '.join(names)}, but has {there or 'none'}; rename one."
    )


def _read_target(
    file: Path, facts: Mapping[str, str], table: pa.Table, rows: list[int]
) -> np.ndarray:
    """The protein's residues, [L] uint8."""
    letters = facts.get("target_sequence", "")
    try:
        if letters:
            return encode_residues(letters)
        if "mutated_sequence" in table.column_names and rows:
            mutants, sequences = table["mutant"].to_pylist(), table["mutated_sequence"].to_pylist()
            return _revert_all(file, mutants, sequences, rows)
    except SequenceError as error:
        raise InputError(f"{file}: the target sequence is none ({error})") from None
    raise InputError(
        f"{file} does not say which protein its variants are of: it has no `target_sequence` in "
        "its metadata, no column mutated_sequence, and no `reference` was given; give one of them."
    )


def _revert_all(
    file: Path, mutants: Sequence[Any], sequences: Sequence[Any], rows: list[int]
) -> np.ndarray:
    """The one protein that all mutated sequences come of."""
    for row in rows:
        if not isinstance(sequences[row], str):
            raise InputError(
                f"{file}, row {row + 1}: mutated_sequence must be text, but {sequences[row]!r} was "
                "given; write the letters of the protein with the variant in it."
            )
    first = rows[0]
    target = revert(mutants[first], encode_residues(sequences[first]), 0)
    for row in rows:
        changed = apply_variant(target, _parse(file, row, mutants[row], target))
        if decode_residues(changed) != sequences[row].upper():
            raise InputError(
                f"{file}, row {row + 1}: mutated_sequence is not the protein of row {first + 1} "
                f"with {mutants[row]} in it; give each protein a file of its own."
            )
    return target


def _parse(file: Path, row: int, mutant: Any, target: np.ndarray) -> list[Substitution]:
    try:
        changed = [each for each in parse_variant(mutant, target) if each.wild_type != each.mutant]
    except SequenceError as error:
        raise InputError(f"{file}, row {row + 1}: {error}") from None
    for each in changed:
        for residue in (each.wild_type, each.mutant):
            if COLUMNS[residue - FIRST_RESIDUE] < 0:
                raise InputError(
                    f"{file}, row {row + 1}: variants are of the letters {STANDARD}, but {mutant} "
                    f"has {RESIDUES[residue - FIRST_RESIDUE]}; leave it out."
                )
    return sorted(changed, key=lambda each: each.position)


def _number(file: Path, row: int, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"{file}, row {row + 1}: a score is a finite number, but {value!r} was given; leave "
            "out variants that were not measured."
        )
    return number


def _bit(file: Path, row: int, value: Any) -> bool:
    number = _number(file, row, value)
    if number not in (0, 1):
        raise InputError(
            f"{file}, row {row + 1}: a bin is 1 (fit) or 0, but {value!r} was given; mend it, or "
            "leave the column out."
        )
    return bool(number)


def _flatten(changes: list[list[Substitution]]) -> Changes:
    flat = [
        (index, each.position, each.wild_type, each.mutant)
        for index, changed in enumerate(changes)
        for each in changed
    ]
    variant, position, wild_type, mutant = np.array(flat, np.int64).T
    return Changes(
        variant, position, COLUMNS[wild_type - FIRST_RESIDUE], COLUMNS[mutant - FIRST_RESIDUE]
    )
