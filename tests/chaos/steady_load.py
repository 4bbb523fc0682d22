"""Clients that ask without a pause, and what they were told, while a test breaks things."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx

BODY = {"input": ["MKTAYIAKQR" * 5] * 3, "encoding_format": "base64"}


@dataclass
class Told:
    """One answer."""

    status: int | str
    """HTTP's, or the name of what was raised."""
    step: str | None
    weights: str | None
    done: float
    seconds: float


class SteadyLoad:
    """`clients` threads, each with a connection of its own, for the length of a `with` block."""

    def __init__(
        self, url: str, clients: int = 4, body: dict | None = None, **headers: str
    ) -> None:
        self._url = url
        self._body = body or BODY
        self._headers = headers
        self._stop = threading.Event()
        self.answers: list[Told] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> SteadyLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120.0, headers=self._headers) as client:
            while not self._stop.is_set():
                started = time.monotonic()
                status: int | str
                headers: httpx.Headers | dict[str, str] = {}
                try:
                    answer = client.post("/v1/embeddings", json=self._body)
                    status, headers = answer.status_code, answer.headers
                except httpx.TransportError as error:
                    status = type(error).__name__
                    time.sleep(0.05)
                now = time.monotonic()
                step, weights = headers.get("X-Raptide-Step"), headers.get("X-Raptide-Weights")
                self.answers.append(Told(status, step, weights, now, now - started))

    def wait_for(self, holds: Callable[[list[Told]], bool], seconds: float = 90.0) -> None:
        until = time.monotonic() + seconds
        while not holds(self.answers):
            assert time.monotonic() < until, self.answers[-3:]
            time.sleep(0.1)

    def wait_for_more(self, count: int) -> None:
        """Until `count` more answers have come."""
        seen = len(self.answers)
        self.wait_for(lambda answers: len(answers) >= seen + count)

    @property
    def failed(self) -> list[Told]:
        return [told for told in self.answers if told.status != 200]


def longest_stall(answers: list[Told]) -> float:
    """Longest time in which no client at all got an answer, seconds."""
    times = sorted(told.done for told in answers if told.status == 200)
    return max((b - a for a, b in pairwise(times)), default=0.0)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def summary(answers: list[Told]) -> dict[str, Any]:
    times = sorted(told.seconds for told in answers if told.status == 200)
    return {
        "requests": len(answers),
        "failed": sum(told.status != 200 for told in answers),
        "p50_s": round(statistics.median(times), 4),
        "p99_s": round(times[int(0.99 * (len(times) - 1))], 4),
        "longest_stall_s": round(longest_stall(answers), 3),
    }
