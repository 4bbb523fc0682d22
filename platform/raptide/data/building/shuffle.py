"""Ray Data's range shuffle, as the build uses it: every bucket in one piece, one call each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import ray
import ray.data

INPUT_BATCH_BYTES = 128 << 20
"""Bytes of rows that one task of a shuffle sorts. It needs three times as much, which makes Ray's
default, 1 GiB, too much for small machines."""

WHOLE_BUCKET = 1 << 40
"""Rows in a batch, at most: a bucket that Ray has cut into several blocks comes joined again."""


def range_bucket(hashes: pa.ChunkedArray, buckets: int) -> np.ndarray:
    """The bucket of each uint64 hash, [n] int64: ranges of equal width, in the hashes' order."""
    high = hashes.to_numpy() >> np.uint64(32)
    return ((high * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)


def shuffle(
    rows: ray.data.Dataset,
    buckets: int,
    bucket_of: Callable[[pa.Table], np.ndarray],
    function: Callable[[int, pa.Table], pa.Table],
) -> ray.data.Dataset:
    """Bring the rows of each bucket together and call the function with (bucket, rows), lazily.

    Args:
        buckets: a task holds one bucket, so their number bounds its memory.
        bucket_of: the bucket of each row, [n] int64 from 0 to buckets - 1.
    """

    def add(table: pa.Table) -> pa.Table:
        return table.append_column("bucket", pa.array(bucket_of(table)))

    # A generator: only out of those does Ray Data let our own errors through.
    def call(table: pa.Table) -> Iterator[pa.Table]:
        numbers = table["bucket"].to_numpy()
        table = table.drop_columns("bucket")
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        for start, end in pairwise(cuts):
            if end > start:
                yield function(int(numbers[start]), table.slice(start, end - start))

    rows.context.shuffle_input_batch_bytes = INPUT_BATCH_BYTES
    # Ray would keep CPUs free for the later steps, which cannot begin before the first has ended:
    # half of all on two CPUs.
    rows.context.op_resource_reservation_enabled = False
    placed = rows.map_batches(add, batch_format="pyarrow", batch_size=None, zero_copy_batch=True)
    if buckets == 1:  # nothing to shuffle, and nine seconds less of it
        together = placed.repartition(1)
    else:
        together = placed.sort("bucket", boundaries=list(range(1, buckets)))
    return together.map_batches(
        call, batch_format="pyarrow", batch_size=WHOLE_BUCKET, zero_copy_batch=True
    )
