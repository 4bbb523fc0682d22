"""What is dropped from the input of a corpus, and why; every record is accounted for."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from raptide.alphabet import FIRST_RESIDUE, RESIDUES
from raptide.config import Settings
from raptide.data.fasta import FLAWS, SOUND

_OWN = ("", "too_short", "too_long", "too_many_unknown", "unclustered", "duplicate", "also_heldout")

KEPT, TOO_SHORT, TOO_LONG, UNKNOWN, UNCLUSTERED, DUPLICATE, ALSO_HELDOUT = range(len(_OWN))

REASONS = (*_OWN, *FLAWS[1:])
"""Why a record is dropped, by number; KEPT is none, and the last ones are a reader's FLAWS."""

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
    """Why each record goes, or KEPT, [n] int8.

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
    ).astype(np.int8)


def reasons_by_reading(flaws: np.ndarray) -> np.ndarray:
    """The reasons that a reader's FLAWS stand for, or KEPT, [n] int8."""
    return np.where(flaws == SOUND, KEPT, flaws + len(_OWN) - 1).astype(np.int8)


def reasons_by_copies(records: pa.Table, drop_duplicates: bool) -> np.ndarray:
    """Why each record goes, or KEPT, [n] int8, among records that hold all copies of a sequence.

    A training copy of a held-out sequence always goes. With `drop_duplicates` only one copy stays:
    a held-out one if there is one, else the first in corpus order.

    Args:
        records: columns content, heldout, order, name_hash, and reason so far.
    """
    content, heldout, order, names, reasons = (
        records[name].to_numpy() for name in ("content", "heldout", "order", "name_hash", "reason")
    )
    dropped = reasons != KEPT
    sorted_by = np.lexsort((names, order, ~heldout, content, dropped))
    content, heldout = content[sorted_by], heldout[sorted_by]
    kept = ~dropped[sorted_by]
    first = np.ones(len(content), bool)
    first[1:] = content[1:] != content[:-1]
    heldout_first = heldout[np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))]
    found = reasons[sorted_by]
    if drop_duplicates:
        found[kept & ~first] = DUPLICATE
    found[kept & ~heldout & heldout_first] = ALSO_HELDOUT
    result = np.empty_like(found)
    result[sorted_by] = found
    return result
