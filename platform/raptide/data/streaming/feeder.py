"""The feeder: one light actor walks the stream and hands every worker the same global batches.

Protein tokens are tiny (the paper's global batch is 131 kB), so each batch is put into the object
store once, whole; workers fetch it by reference and cut their share themselves.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from raptide.data.streaming.batch import Cursor, GlobalBatch
from raptide.data.streaming.stream import StreamPlan, global_batches
from raptide.errors import StreamStalled, plain_errors

MOST_A_CALL = 8
"""Batches in one call, once a worker has its first: of many workers' calls the feeder would soon
have too many. The first calls ask for 1, 2, 4, so that nobody waits for eight to begin."""

IN_FLIGHT = 2
"""Calls of a worker that are on their way or waiting."""


class Feeder:
    """Serves `count` batches from a cursor on, each to `num_readers` readers."""

    def __init__(self, plan: StreamPlan, cursor: Cursor, count: int, num_readers: int) -> None:
        self._batches = global_batches(plan, cursor, count)
        self._num_readers = num_readers
        self._produced = 0
        self._kept: dict[int, tuple[Any, int]] = {}
        self._failure: Exception | None = None

    def fetch(self, first: int, count: int) -> list[Any]:
        """References of `count` batches from `first` on; each reader asks once, in order.

        What goes wrong is raised in place of the batch that it struck: the ones before it come.
        """
        references: list[Any] = []
        for index in range(first, first + count):
            try:
                references.append(self._take(index))
            except Exception:
                if not references:
                    raise
                break  # the next call raises it again
        return references

    def _take(self, index: int) -> Any:
        while self._produced <= index:
            self._kept[self._produced] = (ray.put(self._next()), 0)
            self._produced += 1
        reference, readers = self._kept.pop(index)
        if readers + 1 < self._num_readers:
            self._kept[index] = (reference, readers + 1)
        return reference

    def _next(self) -> GlobalBatch:
        if self._failure is None:
            try:
                with plain_errors():
                    return next(self._batches).counted()
            except Exception as error:
                self._failure = error
        raise self._failure  # the same for every reader


FeederActor = ray.remote(num_cpus=0)(Feeder)


class BatchReader:
    """One worker's view of the feeder: keeps requests in flight and measures its waiting."""

    def __init__(self, feeder: Any, timeout_s: float) -> None:
        self._feeder = feeder
        self._timeout_s = timeout_s
        self.last_wait_s = 0.0
        """Seconds spent waiting for the batch at hand."""

    def batches(self, count: int) -> Iterator[GlobalBatch]:
        """The next `count` global batches.

        Raises:
            StreamStalled: a batch took longer than the timeout.
            CorpusError: a block could not be read.
        """
        calls: deque[Any] = deque()
        asked, size = 0, 1
        while asked < count or calls:
            while len(calls) < IN_FLIGHT and asked < count:
                size = min(size, count - asked)
                calls.append(self._feeder.fetch.remote(asked, size))
                asked, size = asked + size, min(2 * size, MOST_A_CALL)
            started = time.perf_counter()
            for reference in self._get(calls.popleft()):
                batch = self._get(reference)
                self.last_wait_s = time.perf_counter() - started
                yield batch
                started = time.perf_counter()

    def _get(self, reference: Any) -> Any:
        try:
            with plain_errors():
                return ray.get(reference, timeout=self._timeout_s)
        except GetTimeoutError:
            raise StreamStalled(
                f"No batch came within {self._timeout_s:.0f} s: a data stall, not a slow model; "
                "check that the cluster has free logical CPUs for the data tasks."
            ) from None
