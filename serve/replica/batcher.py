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
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from raptide.errors import RaptideError

Kind = Hashable
"""What is asked of a piece; only pieces of one kind share a batch."""

TELL_S, LONGEST_TELL_S = 0.02, 2.0
"""How long the event loop has to send word of a piece that is under suspicion, once it comes to it,
and how long that may take in all."""

ADMITTED_SHARE = 2
"""Times as many tokens may wait until what belongs to an admitted request is refused."""

LOOKAHEAD = 64
"""Pieces that may be passed over for being too large before a batch is closed."""


class QueueFull(RaptideError):
    """As many tokens wait as may; try again later."""


class Stopped(RaptideError):
    """The batcher's thread has ended: nothing is computed any more."""


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
    answer: asyncio.Future[Any] = field(repr=False)
    begun: asyncio.Event = field(repr=False)
    """Of all pieces of its caller: set when the first of them is about to be computed."""
    alone: bool = False
    """Shares no batch with anybody."""
    order: int = 0
    """Of arrival."""


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


class Place:
    """One caller's pieces in the queue."""

    def __init__(self, items: list[Waiting], begun: asyncio.Event, deadline: float) -> None:
        self.items = items
        self._begun = begun
        self._deadline = deadline
        self._arrived = time.monotonic()

    async def begun(self) -> None:
        """Until the first piece is being computed.

        Raises:
            DeadlinePassed: the deadline came first.
        """
        async with self._in_time():
            await self._begun.wait()

    async def is_over(self, within_s: float) -> bool:
        """Whether all answers are there so soon."""
        if not self.items:
            return True
        _, left = await asyncio.wait([item.answer for item in self.items], timeout=within_s)
        return not left

    async def answers(self) -> Answers:
        """The answers, once all are there.

        Raises:
            DeadlinePassed: the deadline came first.
            Stopped: they will never come.
        """
        async with self._in_time():
            results = await asyncio.gather(*(item.answer for item in self.items))
        started = min([start for start, _ in results], default=self._arrived)
        return Answers(
            [value for _, value in results],
            queue_s=started - self._arrived,
            compute_s=time.monotonic() - started,
        )

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        left_s = max(0.0, min(self._deadline - time.monotonic(), 1e9))
        try:
            async with asyncio.timeout(left_s):
                yield
        except TimeoutError:
            raise DeadlinePassed("The time allowed was over; allow more, or send less.") from None


class TokenBatcher:
    """Runs `compute(kind, payloads) -> answers`, one batch at a time, for many callers.

    Args:
        compute: called in the batcher's thread.
        max_batch_tokens: tokens in a batch; a larger piece goes alone.
        max_queued_tokens: waiting tokens from which on newcomers are refused, large or small alike:
            a large one would never get in, were there to be room for all of it.
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
        self._current: list[Waiting] = []
        self._thread = threading.Thread(target=self._live, name="batcher", daemon=True)
        self._thread.start()

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
        with self.enter(kind, pieces, deadline) as place:
            return await place.answers()

    @contextmanager
    def enter(
        self,
        kind: Kind,
        pieces: Sequence[tuple[Any, int]],
        deadline: float = float("inf"),
        *,
        admitted: bool = False,
        alone: bool = False,
    ) -> Iterator[Place]:
        """A place in the queue for `pieces`; what still waits leaves it with the caller.

        Args:
            admitted: of a request that others of its pieces have been taken of; it goes before
                newcomers where there is little room.
            alone: each piece is a batch of its own.

        Raises:
            QueueFull: too many tokens wait already.
            Stopped: nothing is computed any more.
        """
        loop, begun = asyncio.get_running_loop(), asyncio.Event()
        items = [
            Waiting(kind, payload, tokens, deadline, loop.create_future(), begun, alone)
            for payload, tokens in pieces
        ]
        if not items:
            begun.set()
        self._enqueue(kind, items, admitted)
        try:
            yield Place(items, begun, deadline)
        finally:
            self._leave(items)

    def check(self) -> None:
        """Raises Stopped if nothing is computed any more."""
        if self._closed or not self._thread.is_alive():
            raise Stopped("The batcher's thread has ended; this process is to be replaced.")

    def close(self) -> None:
        """Stop after the batch being computed; what waits is never answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _enqueue(self, kind: Kind, items: list[Waiting], admitted: bool) -> None:
        limit = self._max_queued_tokens * (ADMITTED_SHARE if admitted else 1)
        with self._changed:
            self.check()
            if self._queued_tokens >= limit:
                raise QueueFull("Too many residues are waiting; try again shortly.")
            for item in items:
                self._arrivals += 1
                item.order = self._arrivals
                self._lines.setdefault(kind, OrderedDict())[item.order] = item
                self._queued_tokens += item.tokens
            self._changed.notify()

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

    def _live(self) -> None:
        """However the thread ends, nobody is left to wait for it."""
        try:
            self._run()
        finally:
            with self._changed:
                self._closed = True
                left = [item for line in self._lines.values() for item in line.values()]
            self._hand_over([*self._current, *left], Stopped("This replica computes no more."), 0.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                batch = self._current = self._next_batch()
                self._running_tokens = sum(item.tokens for item in batch)
            if batch:
                self._answer(batch)
            self._current = []

    def _answer(self, batch: list[Waiting]) -> None:
        self._tell_begun(batch)
        started = time.monotonic()
        outcomes = self._outcomes(batch)
        seconds = time.monotonic() - started
        tokens, self._running_tokens = self._running_tokens, 0  # before anyone has an answer
        self.computed_tokens += tokens
        speed = tokens / max(seconds, 1e-6)
        self._tokens_per_s += (speed - self._tokens_per_s) * (0.1 if self._tokens_per_s else 1.0)
        self._hand_over(batch, outcomes, started)
        self._observe(Batch(tokens, len(batch), seconds))

    def _outcomes(self, batch: list[Waiting]) -> list[Any]:
        """An answer or an exception for each piece. A batch that fails is split and tried again, so
        that the piece it fails for is found, and fails alone."""
        try:
            return list(self._compute(batch[0].kind, [item.payload for item in batch]))
        except Exception as error:
            if len(batch) == 1:
                return [error]
        half = len(batch) // 2
        return self._outcomes(batch[:half]) + self._outcomes(batch[half:])

    def _tell_begun(self, batch: list[Waiting]) -> None:
        """Their callers hear that they are being computed."""
        self._in_loop(batch, _set_begun, batch)
        self._let_word_out(batch)

    def _hand_over(self, batch: list[Waiting], outcomes: Any, started: float) -> None:
        self._in_loop(batch, _deliver, batch, outcomes, started)
        self._let_word_out(batch)

    def _let_word_out(self, batch: list[Waiting]) -> None:
        """Of a piece that may kill this process, what is said before and after it is computed is to
        have left before anything else is computed: by it one is told from another."""
        if batch and batch[0].alone:
            out = threading.Event()
            loop = batch[0].answer.get_loop()
            self._in_loop(batch, loop.call_later, TELL_S, out.set)
            out.wait(LONGEST_TELL_S)

    @staticmethod
    def _in_loop(batch: list[Waiting], call: Callable[..., object], *args: Any) -> None:
        with suppress(RuntimeError, IndexError):  # the loop is closed, or there is nobody
            batch[0].answer.get_loop().call_soon_threadsafe(call, *args)

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
                room = 0 if item.alone else self._max_batch_tokens - item.tokens
            elif item.tokens <= room and not item.alone:
                batch.append(item)
                room -= item.tokens
            else:
                passed_over += 1
            if room <= 0 < len(batch) or passed_over > LOOKAHEAD:
                break
        for item in (*late, *batch):  # the callers of the late ones time out by themselves
            self._remove(item)
        return batch


def _set_begun(batch: list[Waiting]) -> None:
    for item in batch:
        item.begun.set()


def _deliver(batch: list[Waiting], outcomes: Exception | Sequence[Any], started: float) -> None:
    """Runs in the event loop, once a batch.

    Args:
        outcomes: one a piece, or the one of all.
    """
    for index, item in enumerate(batch):
        outcome = outcomes if isinstance(outcomes, Exception) else outcomes[index]
        item.begun.set()
        if item.answer.done():
            continue
        if isinstance(outcome, Exception):
            item.answer.set_exception(outcome)
        else:
            item.answer.set_result((started, outcome))
