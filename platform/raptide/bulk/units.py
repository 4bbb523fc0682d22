"""Units of work: ranges of a source's records, cut by what the source holds and by nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

LEAST_TOKENS = 1 << 13
MOST_TOKENS = 1 << 24
GROWTH = 64
"""A unit computes a 64th of the tokens before it in its source, within these bounds: small inputs
have enough units for all workers, and large ones not too many parts."""

MOST_RECORDS = 4096
MOST_OUTPUT_BYTES = 128 << 20
MOST_INPUT_BYTES = 32 << 20
"""Where a unit ends at the latest, so that it fits in memory; a larger record is one alone."""


def prefix_of(source: int) -> str:
    """What the names of all units of the `source`-th source begin with."""
    return f"{source:07d}-"


class Unit(NamedTuple):
    """Some consecutive records of one source."""

    source: int
    """Index of the source among the job's."""

    digest: str
    """Of the whole source, 64 hex digits."""

    first: int
    """Index of the first record."""

    records: int
    residues: int
    """Letters, before any is found to be none."""

    start: int
    stop: int
    """Bytes of a FASTA file, as it is when decompressed; 0 elsewhere."""

    line: int
    """Of the first record."""

    @property
    def name(self) -> str:
        """Names of parts, when sorted, have the order of the input."""
        return f"{prefix_of(self.source)}{self.digest[:16]}-{self.first:012d}"


class Records(NamedTuple):
    """The records of one unit, n of them."""

    ids: list[str]
    items: list[str]
    """What is computed on: sequences, or whatever the work understands; "" where flawed."""

    lengths: list[int]
    """Residues."""

    lines: list[int]
    """Where each stands in its file; the row of a table."""

    flaws: list[str]
    """Why nothing can be computed of a record, or "", [n]."""

    kept: pa.Table | None = None
    """Columns that pass through, n rows, also those that nothing is computed of."""


class Sizes(Protocol):
    """What a record of some length costs; arrays of one number a record, int64."""

    def tokens(self, residues: np.ndarray) -> np.ndarray: ...

    def output_bytes(self, residues: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Survey:
    """What a source holds."""

    digest: str
    units: list[Unit]

    @property
    def records(self) -> int:
        return sum(unit.records for unit in self.units)

    @property
    def residues(self) -> int:
        return sum(unit.residues for unit in self.units)


class Source(Protocol):
    """One file, or one corpus. Small, and safe to pickle."""

    @property
    def name(self) -> str:
        """What people call it."""

    def survey(self, index: int, sizes: Sizes) -> Survey:
        """Read it once: its digest, and its units as the `index`-th source of a job."""

    def stretches(self, units: list[Unit]) -> Iterator[list[Unit]]:
        """Units that one task should read: all in turn where a file cannot be read from within."""

    def read(self, units: Sequence[Unit]) -> Iterator[Records]:
        """The records of some units, in order."""


STRETCH = 16
"""Units that one task reads where any place can be read from."""


def short_stretches(units: list[Unit]) -> Iterator[list[Unit]]:
    return (units[start : start + STRETCH] for start in range(0, len(units), STRETCH))


class Cutter:
    """Finds where units end, given the records' sizes piece by piece."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._before = 0
        self._held = np.zeros(4, np.int64)
        """Tokens, records, bytes out and bytes in of the unit that is open."""

    def ends(
        self, residues: np.ndarray, input_bytes: np.ndarray, tokens: np.ndarray | None = None
    ) -> list[int]:
        """Indices of this piece's records at which a new unit begins.

        Args:
            residues: of each record of the piece, [n] int64.
            input_bytes: that it takes in its source, [n] int64.
            tokens: that it costs, [n] int64, where more than its residues tells.
        """
        columns = (
            self._sizes.tokens(residues) if tokens is None else tokens,
            np.ones(len(residues), np.int64),
            self._sizes.output_bytes(residues),
            input_bytes,
        )
        sums = np.stack([np.cumsum(column) for column in columns])
        most = np.array([0, MOST_RECORDS, MOST_OUTPUT_BYTES, MOST_INPUT_BYTES])
        found, start = [], 0
        taken = np.zeros(4, np.int64)
        while True:
            most[0] = min(max(self._before // GROWTH, LEAST_TOKENS), MOST_TOKENS)
            room = most - self._held + taken
            stop = min(
                int(np.searchsorted(row, limit, side="right"))
                for row, limit in zip(sums, room, strict=True)
            )
            if not self._held[1] and stop == start:
                stop = start + 1  # a record that is too large for a unit is one alone
            if stop >= len(residues):
                break
            inside = (sums[:, stop - 1] if stop else np.zeros(4, np.int64)) - taken
            self._before += int(self._held[0] + inside[0])
            taken = taken + inside
            self._held[:] = 0
            found.append(stop)
            start = stop
        self._held += sums[:, -1] - taken if len(residues) else 0
        return found
