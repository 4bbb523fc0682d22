"""Batches pieces of work of many requests by token budget: oldest first, nobody starves.

A batch begins with the oldest waiting piece and is filled with the next ones of its kind that still
fit. So a long protein is never pushed back by short ones: it waits for what was queued before it,
and at most one batch more.

Batches are formed and computed in one thread of the batcher's own, so that the next batch is ready
the moment one ends, however busy the event loop is with answers.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from raptide.errors import RaptideError

Kind = Hashable
"""What is asked of a piece; only pieces of one kind share a batch."""

LOOKAHEAD = 64
"""Pieces that may be passed over for being too large before a batch is closed."""


class QueueFull(RaptideError):
    """As many tokens wait as may; try again later."""


class DeadlinePassed(RaptideError):
    """The time allowed was over before the answer was computed."""


@dataclass(eq=False)
class Waiting:
    """One piece of one request."""

    kind: Kind
    payload: Any
    tokens: int
    deadline: float
    """`time.monotonic()` after which nobody wants the answer."""
    order: int
    answer: asyncio.Future[Any] = field(repr=False)


@dataclass
class Batch:
    """What was computed together, for the metrics."""

    tokens: int
    pieces: int
    seconds: float


@dataclass
class Answers:
    """The answers to one `submit`, in order, and where the time went."""

    values: list[Any]
    queue_s: float
    """From `submit` until the first piece was taken up."""
    compute_s: float
    """From then until the last piece was done, other requests' batches in between included."""


class TokenBatcher:
    """Runs `compute(kind, payloads) -> answers`, one batch at a time, for many callers.

    Args:
        compute: called in the batcher's thread.
        max_batch_tokens: tokens in a batch; a larger piece goes alone.
        max_queued_tokens: waiting tokens beyond which `submit` refuses.
        observe: called with each batch after it was computed.
    """

    def __init__(
        self,
        compute: Callable[[Any, list[Any]], Sequence[Any]],
        max_batch_tokens: int,
        max_queued_tokens: int,
        observe: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self._compute = compute
        self._max_batch_tokens = max_batch_tokens
        self._max_queued_tokens = max_queued_tokens
        self._observe = observe
        self._lines: dict[Kind, OrderedDict[int, Waiting]] = {}
        self._changed = threading.Condition()
        self._arrivals = 0
        self._queued_tokens = 0
        self._running_tokens = 0
        self._tokens_per_s = 0.0
        self.computed_tokens = 0
        """Tokens of all batches so far."""
        self._closed = False
        threading.Thread(target=self._run, name="batcher", daemon=True).start()

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait; those being computed do not count."""
        return self._queued_tokens

    @property
    def pending_tokens(self) -> int:
        """Tokens that wait or are being computed."""
        return self._queued_tokens + self._running_tokens

    @property
    def drain_s(self) -> float:
        """Seconds until what waits now will be done, at the recent speed; 0 before any."""
        return self.pending_tokens / self._tokens_per_s if self._tokens_per_s else 0.0

    async def submit(
        self, kind: Kind, pieces: Sequence[tuple[Any, int]], deadline: float = float("inf")
    ) -> Answers:
        """Answers to `pieces` (payload, tokens), in order. Cancelled callers leave at once.

        Raises:
            QueueFull: too many tokens wait already.
            DeadlinePassed: `deadline` (as `time.monotonic()`) came first.
        """
        arrived = time.monotonic()
        loop = asyncio.get_running_loop()
        items = self._enqueue(kind, pieces, deadline, loop)
        try:
            async with asyncio.timeout(max(0.0, min(deadline - arrived, 1e9))):
                results = await asyncio.gather(*(item.answer for item in items))
        except TimeoutError:
            raise DeadlinePassed("The time allowed was over; allow more, or send less.") from None
        finally:
            self._leave(items)
        started = [start for start, _ in results] or [arrived]
        return Answers(
            [value for _, value in results],
            queue_s=min(started) - arrived,
            compute_s=time.monotonic() - min(started),
        )

    def close(self) -> None:
        """Stop after the batch being computed; what waits is never answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _enqueue(
        self,
        kind: Kind,
        pieces: Sequence[tuple[Any, int]],
        deadline: float,
        loop: asyncio.AbstractEventLoop,
    ) -> list[Waiting]:
        if not pieces:
            return []
        needed = sum(tokens for _, tokens in pieces)
        with self._changed:
            if self._queued_tokens and self._queued_tokens + needed > self._max_queued_tokens:
                raise QueueFull("Too many residues are waiting; try again shortly.")
            line = self._lines.setdefault(kind, OrderedDict())
            items = []
            for payload, tokens in pieces:
                self._arrivals += 1
                item = Waiting(
                    kind, payload, tokens, deadline, self._arrivals, loop.create_future()
                )
                line[item.order] = item
                items.append(item)
            self._queued_tokens += needed
            self._changed.notify()
        return items

    def _leave(self, items: list[Waiting]) -> None:
        """Take out what still waits: its caller has left, or a neighbour has failed."""
        with self._changed:
            for item in items:
                self._remove(item)

    def _remove(self, item: Waiting) -> None:
        """Take an item off its line, if it is still there."""
        line = self._lines.get(item.kind)
        if line is None or line.pop(item.order, None) is None:
            return
        self._queued_tokens -= item.tokens
        if not line:
            del self._lines[item.kind]

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                batch = self._next_batch()
                self._running_tokens = sum(item.tokens for item in batch)
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[Waiting]) -> None:
        started = time.monotonic()
        outcome: Exception | Sequence[Any]
        try:
            outcome = self._compute(batch[0].kind, [item.payload for item in batch])
        except Exception as error:
            outcome = error
        seconds = time.monotonic() - started
        tokens, self._running_tokens = self._running_tokens, 0  # before anyone has an answer
        self.computed_tokens += tokens
        speed = tokens / max(seconds, 1e-6)
        self._tokens_per_s += (speed - self._tokens_per_s) * (0.1 if self._tokens_per_s else 1.0)
        try:
            loop = batch[0].answer.get_loop()
            loop.call_soon_threadsafe(_deliver, batch, outcome, started)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return
        self._observe(Batch(tokens, len(batch), seconds))

    def _next_batch(self) -> list[Waiting]:
        """The oldest piece and those of its kind behind it that fit; taken off the queue."""
        now = time.monotonic()
        line = min(self._lines.values(), key=lambda line: next(iter(line)))
        batch: list[Waiting] = []
        late: list[Waiting] = []
        room, passed_over = 0, 0
        for item in line.values():
            if item.deadline < now:
                late.append(item)
            elif not batch:
                batch.append(item)
                room = self._max_batch_tokens - item.tokens
            elif item.tokens <= room:
                batch.append(item)
                room -= item.tokens
            else:
                passed_over += 1
            if room <= 0 < len(batch) or passed_over > LOOKAHEAD:
                break
        for item in (*late, *batch):  # the callers of the late ones time out by themselves
            self._remove(item)
        return batch


def _deliver(batch: list[Waiting], outcome: Exception | Sequence[Any], started: float) -> None:
    """Runs in the event loop, once a batch."""
    for index, item in enumerate(batch):
        if item.answer.done():
            continue
        if isinstance(outcome, Exception):
            item.answer.set_exception(outcome)
        else:
            item.answer.set_result((started, outcome[index]))
