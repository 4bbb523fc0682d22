"""A rank's share of global batches, as it travels: its own rows, and what all must know of all.

The shares of several batches in a row are one run of bytes, field by field: objects packed one by
one would cost more than the rows themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raptide.data.streaming.batch import Cursor, GlobalBatch, PackedRows


@dataclass(frozen=True)
class BatchShare:
    """A rank's rows of a global batch, which may be none; the counts are those of all rows."""

    rows: PackedRows
    row_ids: np.ndarray
    """(epoch, block, row) of each of these rows, [R, 3] int64."""

    next_cursor: Cursor
    num_places: int
    num_tokens: int
    num_targets: int
    squared_lengths: float


def rows_of_rank(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """First and last row (exclusive) of a rank's share of a batch: as even as can be."""
    return rows * rank // ranks, rows * (rank + 1) // ranks


def pack_shares(batches: Sequence[GlobalBatch], first: int, last: int) -> bytes:
    """Rows `first` to `last` (exclusive) of each of B batches, all of them equally large.

    Every byte of a row is copied once, from the batch into what is returned.
    """
    segments = [each for batch in batches for each in batch.rows.segments[first:last]]
    tokens = [batch.rows.tokens[first:last] for batch in batches]
    shape = (len(batches), *tokens[0].shape)
    fields: list[np.ndarray] = [
        np.array(shape, np.int64),
        np.array([_numbers(batch) for batch in batches], np.float64),
        *(np.ascontiguousarray(batch.row_ids[first:last], np.int64) for batch in batches),
        np.array([len(each) for each in segments], np.int32),
        *segments,
        *tokens,
        *(batch.rows.targets[first:last] for batch in batches),
    ]
    return b"".join(field.data for field in fields if field.size)


def _numbers(batch: GlobalBatch) -> tuple[float, ...]:
    """What is no array: whole numbers below 2^53, or floats."""
    cursor = batch.next_cursor
    counts = (batch.num_places, batch.num_tokens, batch.num_targets, batch.squared_lengths)
    return (cursor.epoch, cursor.block, cursor.row, *counts)


def unpack_shares(packed: bytes) -> list[BatchShare]:
    """What `pack_shares` has packed, a share for each batch; its arrays are views."""
    place = 0

    def take(kind: type, *shape: int) -> np.ndarray:
        nonlocal place
        flat: np.ndarray = np.frombuffer(packed, kind, math.prod(shape), place)
        place += flat.nbytes
        return flat.reshape(shape)

    batches, rows, width = take(np.int64, 3).tolist()
    numbers = take(np.float64, batches, 7).tolist()
    row_ids = take(np.int64, batches, rows, 3)
    segments = [take(np.int32, count) for count in take(np.int32, batches * rows).tolist()]
    tokens, targets = take(np.uint8, batches, rows, width), take(np.uint8, batches, rows, width)
    shares = []
    for i, (*whole, squares) in enumerate(numbers):
        epoch, block, row, num_places, num_tokens, num_targets = map(int, whole)
        share = BatchShare(
            PackedRows(tokens[i], targets[i], segments[i * rows : (i + 1) * rows]),
            row_ids[i],
            Cursor(epoch, block, row),
            num_places,
            num_tokens,
            num_targets,
            squares,
        )
        shares.append(share)
    return shares
