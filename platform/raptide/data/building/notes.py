"""Notes: what one pass over the input finds out about single records, kept for the next pass.

A record's number is its part's number and its place within the part. Notes lie in one small file
for each 2^18 numbers: a task that reads a part again reads its notes beside it, and no process
holds those of the whole input.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raptide.patience import patiently
from raptide.small_files import made_whole

PART_BITS = 32
CHUNK_BITS = 18


def first_number(part: int) -> int:
    """The number of a part's first record."""
    return part << PART_BITS


def record_of(number: int) -> tuple[int, int]:
    """The part of a record, and its place within."""
    return number >> PART_BITS, number & ((1 << PART_BITS) - 1)


def chunk_bucket(numbers: pa.ChunkedArray, buckets: int) -> np.ndarray:
    """The bucket of each record, [n] int64; records of one chunk share theirs."""
    chunks = numbers.to_numpy() >> CHUNK_BITS
    return (chunks + (chunks >> (PART_BITS - CHUNK_BITS))) % buckets


class Notes:
    """Notes of one kind in one folder: a column `number` and what there is to say."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        self._kind = kind
        self._at_hand: tuple[int, pa.Table | None] = (-1, None)

    def write(self, table: pa.Table) -> None:
        """Write all the notes of some chunks."""
        table = table.sort_by("number")
        chunks = table["number"].to_numpy() >> CHUNK_BITS
        cuts = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist(), len(chunks)]
        for start, end in pairwise(cuts):
            if end > start:
                notes = table.slice(start, end - start)
                patiently(partial(_write, self._file(int(chunks[start])), notes))

    def read(self, first: int, count: int) -> Iterator[pa.Table]:
        """The notes of records `first` to `first + count - 1`, by number."""
        for chunk in range(first >> CHUNK_BITS, ((first + count - 1) >> CHUNK_BITS) + 1):
            if chunk != self._at_hand[0]:
                file = self._file(chunk)
                self._at_hand = (chunk, patiently(partial(_read, file)))
            table = self._at_hand[1]
            if table is not None:
                numbers = table["number"].to_numpy()
                start, end = np.searchsorted(numbers, [first, first + count]).tolist()
                yield table.slice(start, end - start)

    def _file(self, chunk: int) -> Path:
        return self._folder / f"{self._kind}-{chunk:012x}.parquet"


def _read(file: Path) -> pa.Table | None:
    return pq.read_table(file) if file.exists() else None


def _write(file: Path, notes: pa.Table) -> None:
    with made_whole(file) as new:
        pq.write_table(notes, new)
