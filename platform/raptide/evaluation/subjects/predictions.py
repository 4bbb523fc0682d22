"""Anyone's scores of variants as subjects: the columns of a table, a subject each.

A table is CSV or Parquet with `mutant`, perhaps `assay`, and columns of numbers; a table without
`assay` is of the assay that its file is named after, as ProteinGym's score files are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from raptide.errors import InputError
from raptide.evaluation.datasets.assays import Assay, read_columns
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

    def __init__(self, name: str, scores: Mapping[tuple[str, str], float]) -> None:
        self.name = name
        lines = (f"{assay} {mutant} {scores[assay, mutant]!r}" for assay, mutant in sorted(scores))
        self.digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        self._scores = scores

    def scores(self, assay: Assay) -> np.ndarray | None:
        """Of all its variants, [n] float64; None if the table has none of them.

        Raises:
            InputError: it has some, but not all.
        """
        found = [self._scores.get((assay.name, mutant), math.nan) for mutant in assay.mutants]
        lacking = np.isnan(found)
        if lacking.all():
            return None
        if lacking.any():
            raise InputError(
                f"Predictions {self.name!r} must score every variant of {assay.name}, but "
                f"{lacking.sum():,} have no number, {assay.mutants[int(lacking.argmax())]} among "
                "them; score them, or take them out of the assay."
            )
        return np.array(found)

    @contextmanager
    def read(self, ask: Ask) -> Iterator[Readings]:
        yield self

    def get(self, request: Request) -> np.ndarray:
        raise KeyError(request)


def read_predictions(files: Sequence[Path]) -> list[Predictions]:
    """The columns of some tables; those of one name are one subject.

    Raises:
        InputError: a table has no `mutant` or no column of scores, or a cell is no number.
    """
    found: dict[str, dict[tuple[str, str], float]] = {}
    for file in files:
        columns, _ = read_columns(file)
        names = [name for name in columns if name not in NO_SCORES]
        if "mutant" not in columns or not names:
            raise InputError(
                f"{file} needs a column mutant and columns of scores, but has "
                f"{', '.join(columns)[:200] or 'none'}; add them."
            )
        assays = columns.get("assay", [file.name.split(".")[0]] * len(columns["mutant"]))
        mutants = [_in_order(str(mutant)) for mutant in columns["mutant"]]
        keys = list(zip(assays, mutants, strict=True))
        for name in names:
            scores = found.setdefault(name, {})
            for row, (key, cell) in enumerate(zip(keys, columns[name], strict=True)):
                scores[key] = _number(file, row, name, cell)
    return [Predictions(name, scores) for name, scores in found.items()]


def _in_order(mutant: str) -> str:
    """As assays spell it: upper case, positions rising."""
    parts = [part.strip().upper() for part in mutant.split(":")]
    return ":".join(sorted(parts, key=lambda part: int("0" + part[1:-1].strip("-")) if part else 0))


def _number(file: Path, row: int, name: str, cell: Any) -> float:
    """NaN for an empty cell: what is not scored is told once all tables are read."""
    try:
        return float(cell) if cell not in ("", None) else math.nan
    except (TypeError, ValueError):
        raise InputError(
            f"{file}, row {row + 1}: {name!r} must hold numbers, but {cell!r} stands there; mend "
            "it, or leave the column out."
        ) from None
