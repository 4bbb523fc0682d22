"""One level of load on an endpoint, and what became of each request.

Closed loop: so many clients, each of which sends its next request when the last is answered. The
load adapts to the endpoint; this finds what it can do at most.

Open loop: requests leave at random times (a Poisson process of the given rate), answered or not, as
those of many independent users do. Latency counts from the moment a request was due, so a generator
that falls behind, or an endpoint that does, is not flattered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import aiohttp
import numpy as np

PAUSE_S = 0.1
"""What a client of the closed loop waits after an error that names no Retry-After."""

LONGEST_PAUSE_S = 2.0

MAX_OUTSTANDING = 4096
"""Open requests beyond which the open loop sends no more, and counts them as `not sent`."""


@dataclass(frozen=True)
class Level:
    """So many clients (closed loop) or so many requests a second (open loop); the other is None."""

    clients: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g}/s"
        return "1 client" if self.clients == 1 else f"{self.clients} clients"


@dataclass(frozen=True)
class Request:
    """One request, ready to be sent."""

    path: str
    body: dict
    residues: int
    accept: str = "application/json"


@dataclass(frozen=True)
class Outcome:
    """One request that was sent. Times are of `time.perf_counter`."""

    due_s: float
    end_s: float
    problem: str | None
    """None if it was answered, else a status ("429") or what went wrong ("timeout")."""

    residues: int
    answer_bytes: int
    pause_s: float = 0.0
    """What the endpoint asks to wait before the next one."""


@dataclass
class Measured:
    """A level, its window of time, and the requests that fall into it."""

    level: Level
    begin_s: float
    end_s: float
    outcomes: list[Outcome] = field(default_factory=list)
    generator_cpu: float = 0.0
    """CPU seconds of this process per second: near 1, the generator is what was measured."""


class LoadGenerator:
    """Sends requests to one endpoint.

    Args:
        requests: what to send, without end.
        key: sent as a bearer token; None sends none.
        timeout_s: seconds after which a request counts as lost.
    """

    def __init__(
        self, url: str, requests: Iterator[Request], key: str | None, timeout_s: float
    ) -> None:
        self._url = url
        self._requests = requests
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout_s = timeout_s

    def run(
        self,
        level: Level,
        *,
        duration_s: float,
        warmup_s: float,
        seed: int = 1,
        tick: Callable[[float], object] = lambda seconds: None,
    ) -> Measured:
        """Load the endpoint for `warmup_s + duration_s` and wait for what is still open.

        The first `warmup_s` do not count. Neither does the end: a request of the closed loop counts
        if it ended, one of the open loop if it was due, within `duration_s`.

        Args:
            tick: called with the seconds that have passed, twice a second.
        """
        return asyncio.run(self._run(level, duration_s, warmup_s, seed, tick))

    async def _run(
        self,
        level: Level,
        duration_s: float,
        warmup_s: float,
        seed: int,
        tick: Callable[[float], object],
    ) -> Measured:
        begin = time.perf_counter() + warmup_s
        measured = Measured(level, begin, begin + duration_s)
        everything: list[Outcome] = []
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            self._url, headers=self._headers, timeout=timeout, connector=connector
        ) as session:
            watch = asyncio.create_task(_watch(measured, warmup_s + duration_s, tick))

            async def send(due_s: float | None = None) -> Outcome:
                outcome = await _send(session, next(self._requests), due_s)
                everything.append(outcome)
                return outcome

            if level.rate is None:
                assert level.clients is not None
                clients = (_client(send, measured.end_s) for _ in range(level.clients))
                await asyncio.gather(*clients)
            else:
                everything += await _open_loop(send, level.rate, measured.end_s, seed)
            await watch
        for outcome in everything:
            counted = outcome.end_s if level.rate is None else outcome.due_s
            if begin <= counted < measured.end_s:
                measured.outcomes.append(outcome)
        return measured


async def _client(send: Callable[[], Awaitable[Outcome]], end_s: float) -> None:
    while time.perf_counter() < end_s:
        outcome = await send()
        if outcome.problem is not None:
            await asyncio.sleep(min(outcome.pause_s or PAUSE_S, LONGEST_PAUSE_S))


async def _open_loop(
    send: Callable[[float], Awaitable[Outcome]], rate: float, end_s: float, seed: int
) -> list[Outcome]:
    """Send at random times; returns what could not be sent."""
    rng = np.random.default_rng(seed)
    open_requests: set[asyncio.Task] = set()
    unsent = []
    due = time.perf_counter()
    while (due := due + rng.exponential(1 / rate)) < end_s:
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        if len(open_requests) >= MAX_OUTSTANDING:
            unsent.append(Outcome(due, due, "not sent", 0, 0))
            await asyncio.sleep(0)
            continue
        task = asyncio.ensure_future(send(due))
        open_requests.add(task)
        task.add_done_callback(open_requests.discard)
    await asyncio.gather(*open_requests)
    return unsent


async def _send(session: aiohttp.ClientSession, request: Request, due_s: float | None) -> Outcome:
    due = time.perf_counter() if due_s is None else due_s
    problem: str | None = None
    size, pause_s = 0, 0.0
    try:
        async with session.post(
            request.path, json=request.body, headers={"Accept": request.accept}
        ) as answer:
            size = len(await answer.read())
            if answer.status != 200:
                problem = str(answer.status)
                after = answer.headers.get("Retry-After", "")
                pause_s = float(after) if after.isdecimal() else 0.0
    except TimeoutError:
        problem = "timeout"
    except aiohttp.ClientError:
        problem = "connection"
    return Outcome(due, time.perf_counter(), problem, request.residues, size, pause_s)


async def _watch(measured: Measured, seconds: float, tick: Callable[[float], object]) -> None:
    """Report progress, and take the time this process computes within the window."""
    start = measured.end_s - seconds
    await asyncio.sleep(measured.begin_s - time.perf_counter())
    cpu, began = time.process_time(), time.perf_counter()
    while (now := time.perf_counter()) < measured.end_s:
        tick(now - start)
        await asyncio.sleep(min(0.5, measured.end_s - now))
    elapsed = time.perf_counter() - began
    measured.generator_cpu = (time.process_time() - cpu) / elapsed
    tick(seconds)
