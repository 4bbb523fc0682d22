"""The feeder: one light actor walks the stream and hands each worker its share of every batch.

A share is small (2 to 4 kB where 1,024 workers train), so it travels by value within the answer,
several batches at a time. What limits the feeder is the number of answers, not their bytes, so it
is the kind of actor that costs the least of each (docs/scaling.md).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from raptide.data.streaming.batch import Cursor, GlobalBatch
from raptide.data.streaming.pace import claim_as
from raptide.data.streaming.shares import BatchShare, pack_shares, rows_of_rank, unpack_shares
from raptide.data.streaming.stream import StreamPlan, global_batches
from raptide.errors import StreamStalled, plain_errors
from raptide.heap import trim_heap

MOST_A_CALL = 12
"""Batches in one answer, once a worker has its first. The first calls ask for 1, 2, 4, 8, so that
nobody waits for many to begin."""

MOST_HELD = 2 * MOST_A_CALL
"""Batches that the feeder holds: those that the last worker has not taken, and as many that the
first one asks for meanwhile. Workers train in step, so none is ever further ahead; should one be,
it waits."""

ANSWER_BYTES = 96 << 10
"""Of an answer with several batches: Ray sends up to 100 KiB along with the reply, more than that
through the object store."""

GATHER_S = 1.0
"""Seconds after which an answer goes without the batches that have not come yet."""

PAUSE_S = 0.05
"""Before a worker that is too far ahead asks again."""


@dataclass
class _Held:
    batch: GlobalBatch
    readers: int
    """That have not taken their share yet."""

    @property
    def num_rows(self) -> int:
        return len(self.batch.row_ids)


class Feeder:
    """Serves `count` batches from a cursor on, cut up among readers."""

    def __init__(
        self,
        plan: StreamPlan,
        cursor: Cursor,
        count: int,
        readers: int,
        *,
        first: int = 0,
        blind: bool = False,
        run: str | None = None,
    ) -> None:
        """
        Args:
            first: the number of the first batch in the whole stream.
            run: in whose name it claims CPUs; what an earlier feeder of that name claimed ends.
            blind: the model does not see what it predicts, so it is shown and asked everything.
        """
        if run is not None:
            claim_as(run)
        self._lock = threading.Lock()
        self._blind = blind
        self._batches = global_batches(plan, cursor, count, first=first)
        self._readers = readers
        self._taken = [0] * readers
        self._held: deque[_Held] = deque()
        self._produced = 0
        self._failure: Exception | None = None

    def fetch(self, reader: int, first: int, most: int) -> bytes:
        """A reader's shares of the batches from `first` on, packed: at least one and at most `most`
        of them, or no bytes at all while another reader is too far behind.

        What goes wrong is raised in place of the batch that it struck: the ones before it come.
        """
        with self._lock:
            return self._fetch(reader, first, most)

    def _fetch(self, reader: int, first: int, most: int) -> bytes:
        expected = self._taken[reader]
        assert first == expected, f"rank {reader} asks for batch {first}, but {expected} is next"
        oldest = self._produced - len(self._held)
        end = min(first + most, oldest + MOST_HELD)
        if end <= first:
            return b""
        self._produce(first, end)
        end = min(end, self._produced)
        held = [self._held[index - oldest] for index in range(first, end)]
        rows = held[0].num_rows  # where batches grow, only as many as are equally large
        held = list(takewhile(lambda each: each.num_rows == rows, held))
        bounds = rows_of_rank(rows, reader, self._readers)
        packed = pack_shares([each.batch for each in held], *bounds)
        self._taken[reader] = first + len(held)
        for each in held:
            each.readers -= 1
        while self._held and not self._held[0].readers:
            self._held.popleft()
        return packed

    def _produce(self, first: int, end: int) -> None:
        """Batch `first`, and those up to `end` (exclusive) that come soon."""
        until = time.monotonic() + GATHER_S
        while self._produced < end and self._failure is None:
            if self._produced > first and time.monotonic() > until:
                return
            try:
                with plain_errors():
                    batch = next(self._batches)
                    batch = (batch.uncovered() if self._blind else batch).counted()
            except Exception as error:
                self._failure = error
                break
            self._held.append(_Held(batch, self._readers))
            self._produced += 1
            trim_heap(self._produced)
        if self._produced <= first:
            assert self._failure is not None
            raise self._failure  # the same for every reader


ACTOR: dict[str, Any] = {"num_cpus": 0, "enable_task_events": False, "max_concurrency": 4}
"""How a feeder is made an actor. Ray spends a fifth less on a call that comes in a thread, and a
tenth less on one that its dashboard does not show."""

FeederActor = ray.remote(**ACTOR)(Feeder)


class BatchReader:
    """One worker's view of the feeder: asks for the next shares while it hands out the last."""

    def __init__(self, feeder: Any, rank: int, timeout_s: float) -> None:
        self._feeder, self._rank = feeder, rank
        self._timeout_s = timeout_s

    def shares(self, count: int) -> Iterator[BatchShare]:
        """This rank's shares of the next `count` global batches.

        Raises:
            StreamStalled: a batch took longer than the timeout.
            CorpusError: a block could not be read.
        """
        got, most, call = 0, 1, None
        while got < count:
            packed = self._answer(call or self._ask(got, 1), got, most)
            shares = unpack_shares(packed)
            got += len(shares)
            most = min(2 * most, MOST_A_CALL, max(1, ANSWER_BYTES * len(shares) // len(packed)))
            most = min(most, count - got)
            call = self._ask(got, most) if got < count else None
            yield from shares

    def _ask(self, first: int, most: int) -> Any:
        return self._feeder.fetch.remote(self._rank, first, most)

    def _answer(self, call: Any, first: int, most: int) -> bytes:
        """What comes of a call, which is made again while this rank is too far ahead."""
        until = time.monotonic() + self._timeout_s
        while not (packed := self._get(call)):
            if time.monotonic() > until:
                raise StreamStalled(
                    f"Rank {self._rank} waited {self._timeout_s:.0f} s for a rank that has not "
                    f"taken batch {first - MOST_HELD}; look for a worker that hangs."
                )
            time.sleep(PAUSE_S)
            call = self._ask(first, most)
        return packed

    def _get(self, reference: Any) -> Any:
        try:
            with plain_errors():
                return ray.get(reference, timeout=self._timeout_s)
        except GetTimeoutError:
            raise StreamStalled(
                f"No batch came within {self._timeout_s:.0f} s: a data stall, not a slow model; "
                "check that the cluster has free logical CPUs for the data tasks."
            ) from None
