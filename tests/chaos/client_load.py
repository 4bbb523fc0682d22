"""Both of Raptide's clients at work while a test breaks things: what failed, what was mixed.

Every call embeds the same few proteins many times over, in many requests. Within one version of the
weights equal proteins have equal vectors; a call in which they differ has mixed two models.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np

from raptide import AsyncClient, Client

PROTEINS = ["MKTAYIAKQR" * 5, "GSHMLEDPVA" * 3, "MNQWKVSTFY"]
TIMES = 40
CLOSE = 1e-4
"""Batches differ in their last bits; two models' vectors in the first."""


class ClientLoad:
    """A `Client` in each of two threads and two calls of one `AsyncClient` side by side, for the
    length of a `with` block: lists, and a generator every third time."""

    def __init__(self, url: str, key: str | None = None, pause_s: float = 0.0) -> None:
        """
        Args:
            pause_s: between the calls of each.
        """
        self._url, self._key, self._pause_s = url, key, pause_s
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._block) for _ in range(2)]
        self._threads.append(threading.Thread(target=lambda: asyncio.run(self._await())))
        self.calls: list[str] = []
        """The weights of each call that was answered."""
        self.failed: list[str] = []
        self.updated: int = 0
        """Generators that were told that their weights are gone."""
        self.mixed: int = 0
        self.slowest_s: float = 0.0

    def __enter__(self) -> ClientLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "calls": len(self.calls),
            "failed": len(self.failed),
            "reasons": sorted(set(self.failed))[:5],
            "mixed": self.mixed,
            "generators_told_of_an_update": self.updated,
            "weights": len(set(self.calls)),
            "slowest_s": round(self.slowest_s, 2),
        }

    def _block(self) -> None:
        with Client(self._url, self._key, chunk_sequences=3) as client:
            number = 0
            while not self._stop.is_set():
                number += 1
                lazy = number % 3 == 0
                given = PROTEINS * TIMES
                started = time.monotonic()
                try:
                    answer = client.detailed.embed(iter(given) if lazy else given)
                    vectors = np.stack(list(answer.result))
                except Exception as error:
                    self._fail(error, lazy)
                else:
                    self._note(vectors, answer.weights or "", started)
                self._stop.wait(self._pause_s)

    async def _await(self) -> None:
        async with AsyncClient(self._url, self._key, chunk_sequences=3) as client:
            await asyncio.gather(self._await_one(client), self._await_one(client))

    async def _await_one(self, client: AsyncClient) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                answer = await client.detailed.embed(PROTEINS * TIMES)
            except Exception as error:
                self._fail(error, lazy=False)
            else:
                self._note(answer.result, answer.weights or "", started)
            await asyncio.sleep(self._pause_s)

    def _fail(self, error: Exception, lazy: bool) -> None:
        if lazy and "The endpoint was updated" in str(error):
            self.updated += 1
        else:
            self.failed.append(f"{type(error).__name__}: {error}")
            time.sleep(0.1)

    def _note(self, vectors: np.ndarray, weights: str, started: float) -> None:
        per_protein = vectors.reshape(TIMES, len(PROTEINS), -1)
        self.mixed += bool(np.abs(per_protein - per_protein[0]).max() > CLOSE)
        self.calls.append(weights)
        self.slowest_s = max(self.slowest_s, time.monotonic() - started)
