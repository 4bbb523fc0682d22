"""Anyone's scores of variants as subjects: the columns of a table, a subject each.

A table is CSV or Parquet with `mutant`, perhaps `assay`, and columns of numbers; a table without
`assay` is of the assay that its file is named after, as ProteinGym's score files are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raptide.errors import InputError
from raptide.evaluation.datasets.assays import Assay, read_table
from raptide.evaluation.requests import Kind, Readings, Request
from raptide.evaluation.subjects.subject import Ask

NO_SCORES = (
    *("assay", "mutant", "mutated_sequence", "sequence", "DMS_id"),
    *("score", "bin", "DMS_score", "DMS_score_bin"),
)
"""Columns that are no prediction."""


class Predictions:
    """One column of scores. Nothing is read off it; the task of variants takes `scores`."""

    baseline = False
    layers = 0
    kinds: frozenset[Kind] = frozenset({"scores"})

    def __init__(self, name: str, columns: Mapping[str, tuple[dict[str, int], np.ndarray]]) -> None:
        """
        Args:
            columns: by assay, the place of each variant and the scores by place.
        """
        self.name = name
        self._columns = columns
        digest = hashlib.sha256()
        for assay, (places, scores) in sorted(columns.items()):
            mutants = sorted(places)
            digest.update("\n".join([assay, *mutants]).encode())
            digest.update(scores[[places[mutant] for mutant in mutants]].tobytes())
        self.digest = digest.hexdigest()

    def scores(self, assay: Assay) -> np.ndarray | None:
        """Of all its variants, [n] float64; None if the table has none of them.

        Raises:
            InputError: it has some, but not all.
        """
        places, scores = self._columns.get(assay.name, ({}, np.empty(0)))
        padded = np.append(scores, np.nan)
        found = padded[[places.get(mutant, -1) for mutant in assay.mutants]]
        lacking = np.isnan(found)
        if lacking.all():
            return None
        if lacking.any():
            raise InputError(
                f"Predictions {self.name!r} must score every variant of {assay.name}, but "
                f"{lacking.sum():,} have no number, {assay.mutants[int(lacking.argmax())]} among "
                "them; score them, or take them out of the assay."
            )
        return found

    @contextmanager
    def read(self, ask: Ask) -> Iterator[Readings]:
        yield self

    def get(self, request: Request) -> np.ndarray:
        raise KeyError(request)


def read_predictions(files: Sequence[Path]) -> list[Predictions]:
    """The columns of some tables; those of one name are one subject.

    Raises:
        InputError: a table has no `mutant`, no column of scores or no row, a variant twice, a cell
            that is no number, or two tables score one assay under one name.
    """
    found: dict[str, dict[str, tuple[dict[str, int], np.ndarray]]] = {}
    for file in files:
        table = read_table(file)
        names = [name for name in table.column_names if name not in NO_SCORES]
        if "mutant" not in table.column_names or not names:
            there = ", ".join(table.column_names)[:200]
            raise InputError(
                f"{file} needs a column mutant and columns of scores, but has {there or 'none'}; "
                "add them."
            )
        if not table.num_rows:
            raise InputError(f"{file} scores no variant; give one row at least, or leave it out.")
        rows = _rows_by_assay(file, table)
        for name in names:
            numbers = _numbers(file, name, table[name])
            for assay, (places, chosen) in rows.items():
                if assay in found.setdefault(name, {}):
                    raise InputError(
                        f"{file} scores {assay} as {name!r}, which another table has done; rename "
                        "the column, or leave one out."
                    )
                found[name][assay] = (places, numbers[chosen])
    return [Predictions(name, columns) for name, columns in found.items()]


def _rows_by_assay(file: Path, table: pa.Table) -> dict[str, tuple[dict[str, int], np.ndarray]]:
    """By assay, its variants' places among its rows, and these rows."""
    mutants = [_in_order(str(mutant)) for mutant in table["mutant"].to_pylist()]
    assays = [file.name.split(".")[0]] * len(mutants)
    if "assay" in table.column_names:
        assays = [str(assay) for assay in table["assay"].to_pylist()]
    rows: dict[str, dict[str, int]] = {}
    for row, (assay, mutant) in enumerate(zip(assays, mutants, strict=True)):
        mine = rows.setdefault(assay, {})
        if mutant in mine:
            raise InputError(
                f"Each variant of an assay is scored once, but {file}, row {row + 1} has {mutant} "
                f"of {assay} again after row {mine[mutant] + 1}; keep one of them."
            )
        mine[mutant] = row
    return {
        assay: ({mutant: place for place, mutant in enumerate(mine)}, np.array([*mine.values()]))
        for assay, mine in rows.items()
    }


def _in_order(mutant: str) -> str:
    """As assays spell it: upper case, positions rising."""
    parts = [part.strip().upper() for part in mutant.split(":")]
    return ":".join(sorted(parts, key=lambda part: int("".join(re.findall("[0-9]", part)) or 0)))


def _numbers(file: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A column as float64; NaN for an empty cell, which is told of once all tables are read."""
    if pa.types.is_string(column.type):
        column = pc.if_else(pc.equal(column, ""), None, column)
    try:
        return np.array(pc.cast(column, pa.float64()).fill_null(np.nan).to_numpy())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        cells = column.to_pylist()
    row = next(row for row, cell in enumerate(cells) if not _is_number(cell))
    raise InputError(
        f"{file}, row {row + 1}: {name!r} must hold numbers, but {cells[row]!r} stands there; mend "
        "it, or leave the column out."
    )


def _is_number(cell: Any) -> bool:
    try:
        pa.scalar(cell).cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True
