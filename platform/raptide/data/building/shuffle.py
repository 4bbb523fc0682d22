"""The build's shuffle: every bucket in one piece, one call each.

    rows ─ cut ─> ranges of buckets ─ cut, a range at a time ─> buckets ─> one call each

A task that cuts its rows makes an object for each piece. All of them are known to the driver, a
kilobyte each, and pieces below 100 kB lie in its heap, because Ray keeps small objects with their
owner. Tasks times buckets would be two million for the paper's proteins. So where there are many
buckets, rows go to ranges of some of them first: tasks times twice the root of the buckets.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data

INPUT_BATCH_BYTES = 128 << 20
"""Bytes of rows that one task cuts. It needs three times as much."""

MAX_PIECES = 64
"""With more buckets than this, rows pass through ranges of buckets: once more through the object
store, which is cheaper than thousands of pieces a task."""

TASKS_PER_CPU = 2
"""Tasks that are at work or wait for a CPU. What comes behind them is not read yet."""


class Piece(NamedTuple):
    """Rows in the object store."""

    rows: ray.ObjectRef
    bytes: int


def range_bucket(hashes: pa.ChunkedArray, buckets: int) -> np.ndarray:
    """The bucket of each uint64 hash, [n] int64: ranges of equal width, in the hashes' order."""
    high = hashes.to_numpy() >> np.uint64(32)
    return ((high * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)


def shuffle(
    rows: ray.data.Dataset,
    buckets: int,
    bucket_of: Callable[[pa.Table], np.ndarray],
    function: Callable[[int, pa.Table], pa.Table],
) -> list[ray.ObjectRef]:
    """Bring the rows of each bucket together and call the function with (bucket, rows).

    Args:
        buckets: a task holds one bucket, so their number bounds its memory.
        bucket_of: the bucket of each row, [n] int64 from 0 to buckets - 1.

    Returns:
        What the function made of each bucket that has rows, by bucket.
    """
    place, call = ray.put(bucket_of), ray.put(function)
    pieces: dict[int, Iterable[Piece]] = {0: _blocks(rows)}
    if buckets > MAX_PIECES:
        width = math.isqrt(buckets - 1) + 1
        pieces = _cut_all(pieces, lambda first: range(0, buckets, width), place)
        pieces = _cut_all(pieces, lambda first: range(first, min(first + width, buckets)), place)
    elif buckets > 1:
        pieces = _cut_all(pieces, lambda first: range(buckets), place)
    tasks = (
        (*_call.remote(call, bucket, *(piece.rows for piece in found)), bucket)
        for bucket in sorted(pieces)
        if (found := list(pieces.pop(bucket)))
    )
    made = {bucket: result for _, result, bucket in _in_turn(tasks)}
    return [made[bucket] for bucket in sorted(made)]


def _blocks(rows: ray.data.Dataset) -> Iterator[Piece]:
    for bundle in rows.iter_internal_ref_bundles():
        for block in bundle.blocks:
            if block.metadata.num_rows:
                yield Piece(block.ref, block.metadata.size_bytes or 0)


def _cut_all(
    pieces: dict[int, Iterable[Piece]], firsts_of: Callable[[int], Sequence[int]], place: Any
) -> dict[int, Iterable[Piece]]:
    """Cut the pieces of each range of buckets into those of smaller ranges.

    Args:
        pieces: by their range's first bucket. They are taken out, so that nobody holds them longer
            than the task that cuts them.
        firsts_of: the first bucket of each smaller range in a range.
        place: object reference of `bucket_of`.
    """

    def tasks() -> Iterator[tuple[Any, ...]]:
        for range_first in sorted(pieces):
            firsts = firsts_of(range_first)
            for batch in _batches(pieces.pop(range_first)):
                cut = _cut.options(num_returns=1 + len(firsts))
                sizes, *parts = cut.remote(place, firsts, *batch)
                yield sizes, firsts, parts

    smaller: dict[int, list[Piece]] = defaultdict(list)
    for sizes, firsts, parts in _in_turn(tasks()):
        for first, part, size in zip(firsts, parts, sizes, strict=True):
            if size:
                smaller[first].append(Piece(part, size))
    return dict(smaller)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[ray.ObjectRef]]:
    """The pieces by as many as one task is to cut."""
    batch: list[ray.ObjectRef] = []
    held = 0
    for piece in pieces:
        batch.append(piece.rows)
        held += piece.bytes
        if held >= INPUT_BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _in_turn(tasks: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Start tasks as others end; once one has failed, those that are under way are awaited.

    They are not cancelled: where a task ends while Ray cancels it, Ray 2.60 aborts the driver
    ("Tried to complete task that was not pending"), and tasks of one kind fail together.

    Args:
        tasks: starts one at each step, and gives the reference of a small result and whatever
            belongs to it.

    Yields:
        The small result and whatever belongs to it, in the order of their ends.
    """
    running: dict[ray.ObjectRef, tuple[Any, ...]] = {}

    def next_ended() -> tuple[Any, ...]:
        (ended,), _ = ray.wait(list(running), num_returns=1)
        return ray.get(ended), *running.pop(ended)

    try:
        for result, *rest in tasks:
            running[result] = tuple(rest)
            while len(running) >= _most_at_once():
                yield next_ended()
        while running:
            yield next_ended()
    except Exception:
        if running:
            ray.wait(list(running), num_returns=len(running))
        raise


def _most_at_once() -> int:
    return TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))


@ray.remote
def _cut(
    bucket_of: Callable[[pa.Table], np.ndarray], firsts: Sequence[int], *tables: pa.Table
) -> Iterator[Any]:
    """The bytes of each range's rows, [len(firsts)], and then these rows, a table each."""
    table = _joined(tables)
    ranges = np.searchsorted(firsts, bucket_of(table), side="right") - 1
    counts = np.bincount(ranges, minlength=len(firsts))
    table = table.take(pa.array(np.argsort(ranges, kind="stable")))
    pieces = [
        table.slice(end - count, count)
        for count, end in zip(counts.tolist(), np.cumsum(counts).tolist(), strict=True)
    ]
    yield [piece.nbytes if piece.num_rows else 0 for piece in pieces]
    yield from pieces


@ray.remote(num_returns=2)
def _call(
    function: Callable[[int, pa.Table], pa.Table], bucket: int, *tables: pa.Table
) -> tuple[None, pa.Table]:
    """The result that is waited for is not the table, which may be large, and stays where it is."""
    return None, function(bucket, _joined(tables))


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables, promote_options="permissive")
