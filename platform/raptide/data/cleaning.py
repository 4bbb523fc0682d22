"""What is dropped from the input of a corpus, and why; every record is accounted for.

Dropped records stay in the table without their residues, marked with the reason, until they are
counted.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from raptide.alphabet import FIRST_RESIDUE, RESIDUES
from raptide.config import Settings

KEPT = ""
TOO_SHORT, TOO_LONG, UNKNOWN = "too_short", "too_long", "too_many_unknown"
DUPLICATE, ALSO_HELDOUT = "duplicate", "also_heldout"

UNKNOWN_ID = FIRST_RESIDUE + RESIDUES.index("X")


class CleaningSettings(Settings):
    """Which records a corpus leaves out. By default only what would leak into the evaluation."""

    min_residues: int = Field(1, ge=1)
    """Shorter sequences are dropped."""

    max_residues: int | None = Field(None, ge=1)
    """Longer sequences are dropped; None keeps all (training crops them)."""

    max_unknown_fraction: float = Field(1.0, ge=0.0, le=1.0)
    """Sequences with a larger share of X (and J, which reads as X) are dropped."""

    drop_duplicates: bool = False
    """Of sequences that are equal letter for letter, keep one: a held-out one if there is one, else
    the first in corpus order."""

    @model_validator(mode="after")
    def _some_length_is_left(self) -> CleaningSettings:
        if self.max_residues is not None and self.max_residues < self.min_residues:
            raise ValueError(
                f"max_residues ({self.max_residues}) must be at least min_residues "
                f"({self.min_residues})"
            )
        return self


def reasons_by_content(
    residues: np.ndarray, lengths: np.ndarray, settings: CleaningSettings
) -> np.ndarray:
    """Why each record goes, or KEPT, [n] str.

    Args:
        residues: ids of all records end to end, uint8.
        lengths: residues of each record, [n], none 0.
    """
    starts = np.cumsum(lengths) - lengths
    unknown = np.add.reduceat(residues == UNKNOWN_ID, starts, dtype=np.int64)
    longest = settings.max_residues or np.iinfo(np.int64).max
    return np.select(
        [
            lengths < settings.min_residues,
            lengths > longest,
            unknown > settings.max_unknown_fraction * lengths,
        ],
        [TOO_SHORT, TOO_LONG, UNKNOWN],
        KEPT,
    )


def drop(records: pa.Table, reasons: np.ndarray) -> pa.Table:
    """Mark records with the reason they go (KEPT where they stay) and empty what goes."""
    reason = pa.array(reasons, pa.string())
    residues = pc.if_else(pc.equal(reason, KEPT), records["residues"], pa.scalar(b""))
    index = records.schema.get_field_index
    records = records.set_column(index("residues"), "residues", residues)
    return records.set_column(index("dropped"), "dropped", reason)


def drop_equal(records: pa.Table, drop_duplicates: bool) -> pa.Table:
    """Among records that hold all copies of their sequences, drop what is there twice.

    A training copy of a held-out sequence always goes. With `drop_duplicates` only one copy stays.

    Args:
        records: with columns content (hash of the residues), heldout, order, cluster, id, dropped.
    """
    records = records.take(
        pc.sort_indices(
            records,
            [
                ("dropped", "ascending"),
                ("content", "ascending"),
                ("heldout", "descending"),
                ("order", "ascending"),
                ("cluster", "ascending"),
                ("id", "ascending"),
            ],
        )
    )
    reasons = records["dropped"].to_numpy(zero_copy_only=False).astype(object)
    kept = reasons == KEPT
    content = records["content"].to_numpy(zero_copy_only=False)
    heldout = records["heldout"].to_numpy(zero_copy_only=False).astype(bool)
    first = np.ones(len(content), bool)
    first[1:] = content[1:] != content[:-1]
    heldout_first = heldout[np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))]
    if drop_duplicates:
        reasons[kept & ~first] = DUPLICATE
    reasons[kept & ~heldout & heldout_first] = ALSO_HELDOUT
    return drop(records, reasons)


def count_reasons(records: pa.Table) -> dict[str, int]:
    """How many records there are of each reason, KEPT among them."""
    counts = pc.value_counts(records["dropped"])
    return {entry["values"]: entry["counts"] for entry in counts.to_pylist()}
