"""Protein domains with their place in SCOPe or CATH.

A table, Parquet or CSV, a row a domain:

    id          string, each once
    scop_class  class.fold.superfamily.family of SCOPe, `a.1.2.3`; or
    cath        class.architecture.topology.superfamily of CATH, `3.40.50.720`
    sequence    residues

CATH's topology is what SCOPe calls a fold. CATH's numbers name no family below the homologous
superfamily. Family 0 of SCOPe (`a.1.2.0`, automated matches) counts as a family like others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from raptide.alphabet import decode_residues, encode_residues
from raptide.errors import InputError, SequenceError

Scheme = Literal["SCOPe", "CATH"]

COLUMNS: dict[Scheme, str] = {"SCOPe": "scop_class", "CATH": "cath"}
FORMS: dict[Scheme, tuple[re.Pattern[str], str]] = {
    "SCOPe": (re.compile(r"[a-z](\.\d+){3}"), "a.1.2.3"),
    "CATH": (re.compile(r"\d+(\.\d+){3}"), "3.40.50.720"),
}
DEPTHS: dict[Scheme, dict[str, int]] = {
    "SCOPe": {"fold": 2, "superfamily": 3, "family": 4},
    "CATH": {"fold": 3, "superfamily": 4},
}
"""How many numbers name a domain at each level."""


@dataclass(frozen=True)
class Domains:
    """Domains in the order of their file."""

    scheme: Scheme
    ids: list[str]
    classes: list[str]
    """As in the file."""
    sequences: list[str]
    """In the letters of the alphabet."""

    def labels(self, level: str) -> list[str] | None:
        """Each domain's `fold`, `superfamily` or `family` by its full number; None without it."""
        depth = DEPTHS[self.scheme].get(level)
        if depth is None:
            return None
        return [".".join(label.split(".")[:depth]) for label in self.classes]


def read_domains(path: Path) -> Domains:
    """Read a table of domains.

    Raises:
        InputError: it cannot be read, lacks a column or has no rows, or in some row the id is empty
            or that of another row, the class is none, or a letter is no residue's.
    """
    table = _read_table(path)
    names = table.column_names
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"{path} has more than one column {twice[0]!r}; columns have names of their own."
        )
    scheme: Scheme = "SCOPe" if COLUMNS["SCOPe"] in table.column_names else "CATH"
    lacking = [c for c in ("id", COLUMNS[scheme], "sequence") if c not in table.column_names]
    if lacking:
        name = "scop_class or cath" if lacking[0] == "cath" else lacking[0]
        raise InputError(
            f"{path} needs the columns id, scop_class or cath, and sequence, but has no {name} "
            f"among {', '.join(table.column_names)[:200] or 'none'}; rename its columns."
        )
    ids, classes, letters = (
        ["" if value is None else str(value).strip() for value in table[name].to_pylist()]
        for name in ("id", COLUMNS[scheme], "sequence")
    )
    if not ids:
        raise InputError(f"{path} holds no domains; give a table with at least one row.")
    _check_ids(path, ids)
    _check_classes(path, scheme, classes)
    return Domains(scheme, ids, classes, _residues(path, letters))


def _read_table(path: Path) -> pa.Table:
    wanted = ["id", *COLUMNS.values(), "sequence"]
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PAR1":
                whole = pq.ParquetFile(path)
                there = [name for name in whole.schema_arrow.names if name in wanted]
                # Without those wanted, all are read for the error to name.
                return whole.read(there if len(there) >= 3 else None)
        texts: dict[str, Any] = dict.fromkeys(wanted, pa.string())
        return pc.read_csv(path, convert_options=pc.ConvertOptions(column_types=texts))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path} cannot be read ({reason}); give a table of domains.") from None
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} is neither a whole Parquet file nor CSV ({reason}); write it again."
        ) from None


def _check_ids(path: Path, ids: list[str]) -> None:
    rows: dict[str, int] = {}
    for row, name in enumerate(ids, 1):
        if not name:
            raise InputError(f"A domain needs an id, but row {row} of {path} has none; add one.")
        if name in rows:
            raise InputError(
                f"Each domain has an id of its own, but rows {rows[name]} and {row} of {path} are "
                f"both {name!r}; remove or rename one."
            )
        rows[name] = row


def _check_classes(path: Path, scheme: Scheme, classes: list[str]) -> None:
    pattern, example = FORMS[scheme]
    for row, label in enumerate(classes, 1):
        if not pattern.fullmatch(label):
            raise InputError(
                f"{COLUMNS[scheme]} has four parts, as in {example}, but row {row} of {path} holds "
                f"{label!r}; correct it, or remove the row."
            )


def _residues(path: Path, letters: list[str]) -> list[str]:
    sequences = []
    for row, sequence in enumerate(letters, 1):
        try:
            sequences.append(decode_residues(encode_residues(sequence)))
        except SequenceError as error:
            raise InputError(f"Row {row} of {path}: {error}") from None
    return sequences
