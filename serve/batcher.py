"""Batch sequences of many requests by token budget: oldest first, nobody overtaken for long.

A batch begins with the oldest waiting sequence and is filled with the next ones in line that still
fit, so that a long sequence is never pushed back by short ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from raptide.errors import RaptideError

Kind = tuple[str, str]
"""What is asked of a sequence: the call and its option, e.g. ("embed", "mean")."""


class QueueFull(RaptideError):
    """The replica has as many tokens waiting as it may; try again later."""


@dataclass(eq=False)
class Waiting:
    """One sequence of one request."""

    sequence: str
    tokens: int
    """Tokens it takes to compute, over all its forward passes."""
    kind: Kind
    """What is asked of it; only sequences of one kind share a batch."""
    answer: asyncio.Future[Any] = field(repr=False)


class TokenBatcher:
    """Runs `compute(kind, sequences) -> answers`, one batch at a time, for many callers.

    Args:
        max_batch_tokens: tokens in a batch; a longer sequence goes alone.
        max_queued_tokens: waiting tokens beyond which `submit` refuses.
    """

    def __init__(
        self,
        compute: Callable[[Kind, list[str]], Awaitable[list[Any]]],
        max_batch_tokens: int,
        max_queued_tokens: int,
    ) -> None:
        self._compute = compute
        self._max_batch_tokens = max_batch_tokens
        self._max_queued_tokens = max_queued_tokens
        self._queue: list[Waiting] = []
        self._arrived = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None

    @property
    def queued_tokens(self) -> int:
        return sum(item.tokens for item in self._queue)

    async def submit(self, kind: Kind, sequences: list[str]) -> list[Any]:
        """Answers in the order of `sequences`.

        Raises:
            QueueFull: too many tokens wait already.
        """
        costs = [tokens_to_compute(kind[1], len(sequence)) for sequence in sequences]
        needed = sum(costs)
        if self._queue and self.queued_tokens + needed > self._max_queued_tokens:
            raise QueueFull("Too many residues are waiting; try again in a second.")
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        loop = asyncio.get_running_loop()
        items = [
            Waiting(sequence, cost, kind, loop.create_future())
            for sequence, cost in zip(sequences, costs, strict=True)
        ]
        self._queue += items
        self._arrived.set()
        try:
            return await asyncio.gather(*(item.answer for item in items))
        finally:  # a caller that left, or whose neighbour failed, leaves the queue
            gone = set(items)
            self._queue = [item for item in self._queue if item not in gone]

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            try:
                answers = await self._compute(batch[0].kind, [item.sequence for item in batch])
            except Exception as error:
                for item in batch:
                    if not item.answer.done():
                        item.answer.set_exception(error)
                continue
            for item, answer in zip(batch, answers, strict=True):
                if not item.answer.done():
                    item.answer.set_result(answer)

    def _next_batch(self) -> list[Waiting]:
        """The oldest sequence and those behind it that fit; taken off the queue."""
        if not self._queue:
            return []
        kind = self._queue[0].kind
        room = max(self._max_batch_tokens, self._queue[0].tokens)
        batch = []
        for item in self._queue:
            if item.kind == kind and item.tokens <= room:
                batch.append(item)
                room -= item.tokens
            if room <= 0:
                break
        taken = set(batch)
        self._queue = [item for item in self._queue if item not in taken]
        return batch


def tokens_to_compute(option: str, residues: int) -> int:
    """Tokens of one pass, times a pass per residue where each is masked in turn (pseudo-ppl)."""
    return (residues + 2) * (residues if option == "pseudo-ppl" else 1)
