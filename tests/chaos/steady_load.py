"""Clients that ask without a pause, and what they were told, while a test breaks things."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx
import pyarrow as pa

BODY = {"input": ["MKTAYIAKQR" * 5] * 3, "encoding_format": "base64"}

ARROW = "application/vnd.apache.arrow.stream"

REFUSED = (503, 404, "UNAVAILABLE", "NOT_FOUND")
"""What a client is told where nothing new is taken, and once the application is gone."""


@dataclass(frozen=True)
class Kind:
    """Requests for embeddings of some proteins, by one way."""

    runs: int
    how: str
    """`json`, `arrow` or `grpc`."""

    def __str__(self) -> str:
        return f"{self.runs} by {self.how}"

    def sequences(self, residues: int) -> list[str]:
        """A run each, if so many residues are more than half a batch."""
        return [("MKTAYIAKQR" * residues)[:residues]] * self.runs


KINDS = [Kind(runs, how) for runs in (1, 3, 8, 64) for how in ("json", "arrow", "grpc")]


@dataclass
class Told:
    """One answer."""

    status: int | str
    """HTTP's, gRPC's name of one, or the name of what was raised; 200 of a whole answer alone."""
    step: str | None
    weights: str | None
    done: float
    seconds: float
    kind: str = ""


class SteadyLoad:
    """`clients` threads, each with a connection of its own, for the length of a `with` block.

    Args:
        kinds: what each client asks, one after the other, in place of one body again and again.
        residues: of each protein of those.
        grpc: the address of the proxy's gRPC, where `kinds` need it.
        until_refused: whether a client stops once it is told that nothing new is taken.
        pause_s: between an answer and what a client asks next.
    """

    def __init__(
        self,
        url: str,
        clients: int = 4,
        body: dict | None = None,
        *,
        kinds: Sequence[Kind] = (),
        residues: int = 50,
        grpc: str = "",
        application: str = "",
        until_refused: bool = False,
        pause_s: float = 0.0,
        **headers: str,
    ) -> None:
        self._url = url
        self._body = body or BODY
        self._kinds = kinds
        self._residues = residues
        self._grpc = grpc
        self._application = application
        self._until_refused = until_refused
        self._pause_s = pause_s
        self._headers = headers
        self._stop = threading.Event()
        self.answers: list[Told] = []
        self._threads = [threading.Thread(target=self._ask, args=[n]) for n in range(clients)]

    def __enter__(self) -> SteadyLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with (
            httpx.Client(base_url=self._url, timeout=120.0, headers=self._headers) as client,
            channel(self._grpc) as stub,
        ):
            for turn in itertools.count(5 * number):  # so that few ask the same at a time
                if self._stop.is_set():
                    return
                kind = self._kinds[turn % len(self._kinds)] if self._kinds else None
                told = self._one(client, stub, kind)
                self.answers.append(told)
                if self._until_refused and told.status in REFUSED:
                    return
                self._stop.wait(self._pause_s)

    def _one(self, client: httpx.Client, stub: Any, kind: Kind | None) -> Told:
        started = time.monotonic()
        status: int | str
        step = weights = None
        try:
            if kind is not None and kind.how == "grpc":
                status, step, weights = self._by_grpc(stub, kind)
            else:
                status, step, weights = self._by_http(client, kind)
        except httpx.TransportError as error:
            status = type(error).__name__
            time.sleep(0.05)
        now = time.monotonic()
        return Told(status, step, weights, now, now - started, str(kind or ""))

    def _by_http(self, client: httpx.Client, kind: Kind | None) -> tuple[int | str, Any, Any]:
        body, accept, rows = self._body, "application/json", None
        if kind is not None:
            body = {"input": kind.sequences(self._residues), "encoding_format": "base64"}
            rows = kind.runs
        if kind is not None and kind.how == "arrow":
            accept = ARROW
        answer = client.post("/v1/embeddings", json=body, headers={"Accept": accept})
        status: int | str = answer.status_code
        if status == 200 and rows is not None and _rows(answer, accept) != rows:
            status = "short"
        headers = answer.headers
        return status, headers.get("X-Raptide-Step"), headers.get("X-Raptide-Weights")

    def _by_grpc(self, stub: Any, kind: Kind) -> tuple[int | str, Any, Any]:
        import grpc

        from serve.rpc import raptide_pb2 as pb

        metadata = [(name.lower(), value) for name, value in self._headers.items()]
        request = pb.EmbedRequest(sequences=kind.sequences(self._residues))
        try:
            parts = list(
                stub.Embed(
                    request, metadata=[*metadata, ("application", self._application)], timeout=120
                )
            )
        except grpc.RpcError as error:
            time.sleep(0.05)
            return error.code().name, None, None
        sources = {(str(part.source.step), part.source.weights) for part in parts}
        if len(sources) != 1 or sum(len(part.arrays) for part in parts) != kind.runs:
            return "short", None, None
        return 200, *sources.pop()

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


@contextmanager
def channel(address: str) -> Iterator[Any]:
    """A stub of the gRPC service; None without an address."""
    if not address:
        yield None
        return
    import grpc

    from serve.rpc.raptide_pb2_grpc import RaptideStub

    with grpc.insecure_channel(address) as connection:
        yield RaptideStub(connection)


def _rows(answer: httpx.Response, accept: str) -> int:
    """How many proteins an answer is about; 0 where it breaks off."""
    if accept != ARROW:
        return len(answer.json()["data"])
    try:
        return pa.ipc.open_stream(answer.content).read_all().num_rows
    except (pa.ArrowInvalid, OSError):
        return 0


def by_kind(answers: list[Told]) -> dict[str, str]:
    """Of each kind of request: how many were asked, how many failed and how."""
    found = {}
    for kind in dict.fromkeys(sorted(told.kind for told in answers)):
        some = [told for told in answers if told.kind == kind]
        wrong = Counter(str(told.status) for told in some if told.status != 200)
        told_wrong = ", ".join(f"{count} x {status}" for status, count in wrong.items())
        found[kind] = f"{len(some)} asked, {told_wrong or '0 failed'}"
    return found


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
