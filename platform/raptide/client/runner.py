"""From a call to its results: pieces, requests several at a time, answers in order, started over.

Written once for both clients. A `Transport` says how to start a request and how to wait: one of an
event loop suspends there, one for threads blocks, so that what is written here as coroutines runs
to its end without ever being suspended.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import quote

import httpx
import numpy as np

from raptide.calls.inputs import read_sequence, read_sequences
from raptide.client.answers import ARROW, read_answer, read_model, read_models
from raptide.client.asks import Ask
from raptide.client.details import Answer
from raptide.client.exchange import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    Exchange,
    Gone,
    Patience,
    Pin,
)
from raptide.client.pieces import Chunker, Piece, write_body
from raptide.errors import ConfigError, SequenceError, ServiceError

T = TypeVar("T")

Model = dict[str, Any]
"""What GET /v1/models says of one."""


class Transport(Protocol):
    """How requests are sent and waited for."""

    url: str

    def start(self, exchange: Exchange[T]) -> Any:
        """Send a request until it is answered, in the background; returns a handle."""

    async def result(self, handle: Any) -> Any:
        """The result, once it is there."""

    def cancel(self, handle: Any) -> None:
        """Nobody wants it any more: the connection is closed at once."""

    async def pause(self, seconds: float) -> None: ...


@dataclass
class Call(Generic[T]):
    """One call of a method."""

    ask: Ask
    given: Iterable[Any] | AsyncIterator[Any]
    """Sequences; of a list all are checked before anything is sent."""
    finish: Callable[[list[Any]], T]
    """Makes the result of a list's."""
    empty: Callable[[int], T] | None = None
    """Makes that of an empty list, given the model's width, where it has to be known."""
    windowed: bool = False
    """Whether sequences that the model does not take whole are computed in windows."""
    timeout_s: float | None = None
    answer: Answer[Any] = field(default_factory=Answer)


@dataclass
class Runner:
    """Runs calls over a transport."""

    transport: Transport
    model: str | None
    weights: str | None
    """Digest that the user insists on."""
    timeout_s: float
    patience: Patience
    parallel: int
    chunk_sequences: int
    progress: bool
    met: str | None = None
    """Digest that answered last."""

    async def models(self, timeout_s: float | None = None) -> list[Model]:
        """What the endpoint serves."""
        return await self._get("/v1/models", read_models, timeout_s)

    async def _get(
        self, path: str, read: Callable[[httpx.Response], T], timeout_s: float | None
    ) -> T:
        exchange = Exchange("GET", path, read, self.patience, timeout_s or self.timeout_s)
        return await self.transport.result(self.transport.start(exchange))

    async def collect(self, call: Call[T]) -> T:
        """The result for a list, all of it from one version of the weights."""
        items = _Items(call.given)
        if call.empty is not None and not items.total:
            return call.empty(await self._describe(call, "width"))
        restarts = _Restarts(self.patience.retry_s)
        while True:
            try:
                return call.finish([result async for result in self._stream(call, items)])
            except Gone as gone:
                await self._restart(call, restarts, gone)

    async def generate(self, call: Call[Any]) -> AsyncGenerator[Any, None]:
        """Results for an iterator, one by one; started over as long as none has been given."""
        items = _Items(call.given)
        restarts = _Restarts(self.patience.retry_s)
        while True:
            try:
                async with aclosing(self._stream(call, items)) as stream:
                    async for result in stream:
                        items.forget()
                        yield result
                return
            except Gone as gone:
                if items.forgotten:
                    raise ServiceError(
                        f"The endpoint was updated: the weights {gone}, which answered the first "
                        "sequences, are gone; ask for all of them again."
                    ) from None
                await self._restart(call, restarts, gone)

    async def _stream(self, call: Call[Any], items: _Items) -> AsyncGenerator[Any, None]:
        """Results in order, of one version of the weights; reads two rounds of requests ahead."""
        pin = Pin(self.weights)
        joining = _Joining(call.ask)
        waiting: deque[tuple[list[Piece], Any]] = deque()
        try:
            with self._bar(items.total) as bar:
                async with aclosing(self._chunks(call, items, joining)) as chunks:
                    async for chunk in chunks:
                        waiting.append((chunk, self._start(call, chunk, pin)))
                        if len(waiting) >= 2 * self.parallel:
                            for result in joining.take(*await self._first(waiting)):
                                bar.update()
                                yield result
                while waiting:
                    for result in joining.take(*await self._first(waiting)):
                        bar.update()
                        yield result
        finally:
            self.met = pin.digest or self.met
            for _, handle in waiting:
                self.transport.cancel(handle)

    async def _chunks(
        self, call: Call[Any], items: _Items, joining: _Joining
    ) -> AsyncGenerator[list[Piece], None]:
        """What is asked in each request."""
        limit = await self._describe(call, "max_residues") if call.windowed else float("inf")
        chunker = Chunker(self.chunk_sequences)
        async for index, residues in items.read():
            pieces = list(call.ask.cut(index, residues, limit))
            joining.expect(residues, len(pieces))
            for piece in pieces:
                if full := chunker.add(piece):
                    yield full
        if rest := chunker.rest():
            yield rest

    def _start(self, call: Call[Any], chunk: list[Piece], pin: Pin) -> Any:
        answer = call.answer
        answer.sent += 1
        exchange: Exchange[list[Any]] = Exchange(
            "POST",
            chunk[0].kind.path,
            partial(read_answer, chunk=chunk),
            self.patience,
            call.timeout_s or self.timeout_s,
            write_body(chunk, self.model),
            ARROW if chunk[0].kind.large else "application/json",
            pin,
            f"{answer.request_id}-{answer.sent - 1}",
            answer,
            sum(len(piece.letters) for piece in chunk),
        )
        return self.transport.start(exchange)

    async def _first(self, waiting: deque[tuple[list[Piece], Any]]) -> tuple[list[Piece], Any]:
        """The oldest chunk and its answer; it stays until that is there, to be called off."""
        chunk, handle = waiting[0]
        try:
            values = await self.transport.result(handle)
        except SequenceError as error:
            raise SequenceError(_count_from_start(str(error), chunk)) from None
        waiting.popleft()
        return chunk, values

    async def _describe(self, call: Call[Any], name: str) -> int:
        """A number that the endpoint tells of the model that a call asks."""
        models = {model["id"]: model for model in await self.models(call.timeout_s)}
        if self.model is not None and self.model not in models:
            known = ", ".join(map(repr, models))
            raise ConfigError(f"This endpoint serves {known}, but {self.model!r} was asked for.")
        chosen = self.model or next(iter(models))
        number = models[chosen].get(name)
        if number is None:  # an idle model, which tells when it has been started
            found = await self._get(f"/v1/models/{quote(chosen)}", read_model, call.timeout_s)
            number = found.get(name)
        if not isinstance(number, int) or number < 1:
            raise ServiceError(
                f"{self.transport.url} does not say the {name} of its model; is it a Raptide "
                "endpoint?"
            )
        return number

    async def _restart(self, call: Call[Any], restarts: _Restarts, gone: Gone) -> None:
        if self.weights is not None:
            raise ServiceError(
                f"The weights {gone} that the client was given do not answer any more; leave "
                "`weights` out to take what the endpoint serves now."
            )
        await self.transport.pause(restarts.next_pause())
        call.answer.start_over()

    @contextmanager
    def _bar(self, total: int | None) -> Iterator[Any]:
        if not self.progress:
            yield _NoBar()
            return
        from tqdm import tqdm  # late: most callers see no bar

        with tqdm(total=total, unit=" results") as bar:
            yield bar


class _NoBar:
    def update(self) -> None: ...


class _Items:
    """The residues of each item with its index: of a list as often as needed, of an iterator again
    until what was read is forgotten."""

    def __init__(self, given: Any) -> None:
        self.forgotten = False
        """Whether the first ones cannot be read again."""
        self._seen: list[np.ndarray] = []
        self._rest: Any = ()
        self.total: int | None = None
        if isinstance(given, Iterator | AsyncIterator):
            self._rest = given
        else:  # a mistake in a list is found before anything is sent
            self._seen = read_sequences(given, float("inf"))
            self.total = len(self._seen)
        self._read = len(self._seen)

    def forget(self) -> None:
        self.forgotten = True
        self._seen.clear()

    async def read(self) -> AsyncIterator[tuple[int, np.ndarray]]:
        for pair in enumerate(self._seen):
            yield pair
        async for sequence in _as_async(self._rest):
            residues = read_sequence(sequence, self._read)
            if not self.forgotten:
                self._seen.append(residues)
            self._read += 1
            yield self._read - 1, residues


async def _as_async(given: Iterable[Any] | AsyncIterator[Any]) -> AsyncIterator[Any]:
    if isinstance(given, AsyncIterator):
        async for each in given:
            yield each
    else:
        for each in given:
            yield each


class _Joining:
    """Results of items, out of the answers to their pieces, in order."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._expected: deque[tuple[np.ndarray, int]] = deque()
        self._answered: list[tuple[Piece, Any]] = []

    def expect(self, residues: np.ndarray, pieces: int) -> None:
        """One more item is cut into so many pieces."""
        self._expected.append((residues, pieces))

    def take(self, chunk: list[Piece], values: list[Any]) -> Iterator[Any]:
        """The results that are whole with these."""
        for pair in zip(chunk, values, strict=True):
            self._answered.append(pair)
            residues, pieces = self._expected[0]
            if len(self._answered) == pieces:
                yield self._ask.join(residues, self._answered)
                self._expected.popleft()
                self._answered = []


class _Restarts:
    """Pauses before a call is started over, as long as that may help."""

    def __init__(self, retry_s: float) -> None:
        self._until = time.monotonic() + retry_s
        self._pause_s = FIRST_PAUSE_S

    def next_pause(self) -> float:
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        if time.monotonic() + pause_s > self._until:
            raise ServiceError(
                "The endpoint's weights went on changing while it answered, so the call was given "
                "up; ask again when its update is over."
            )
        return pause_s


def _count_from_start(message: str, chunk: list[Piece]) -> str:
    """A refusal that counts from the start of its request, counted from the start of the call."""

    def renumber(found: re.Match[str]) -> str:
        index = int(found[1])
        return f"Sequence {chunk[index].item if index < len(chunk) else index}"

    return re.sub(r"^Sequence (\d+)", renumber, message)
