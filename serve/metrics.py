"""What Prometheus sees. Ray exports every name with `ray_` before it, on each node's metrics port.

Serve's own metrics (replicas, health, HTTP latency) stand beside these. A time is in seconds, a
count of tokens or residues is what it says. Batches are packed; what one leaves unused of its
budget is in `raptide_batch_fill_ratio`.
"""

from __future__ import annotations

import time
from collections import deque

from ray.serve import metrics

SPEED_S = 30.0

SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
TOKENS = [64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0]
SHARES = [0.1, 0.25, 0.5, 0.75, 0.9, 0.99]


class GatewayMetrics:
    """Requests as clients see them."""

    def __init__(self) -> None:
        call = ("model", "call")
        self.requests = _counter("raptide_requests_total", "Requests by status", (*call, "status"))
        self.errors = _counter("raptide_errors_total", "Requests refused or failed", ("type",))
        self.residues = _counter("raptide_residues_total", "Residues asked about", call)
        self.retries = _counter("raptide_retries_total", "Parts asked for again", ("reason",))
        self.request = _seconds("raptide_request_seconds", "From the first byte to the last", call)
        self.tokenise = _seconds("raptide_tokenise_seconds", "Reading and checking letters", ())
        self.serialise = _seconds("raptide_serialise_seconds", "Writing answers", ())

    def serialised(self, seconds: float) -> None:
        self.serialise.observe(max(seconds, 1e-6))


class ReplicaMetrics:
    """What one replica computes."""

    def __init__(self, model: str, max_batch_tokens: int) -> None:
        self._budget = max_batch_tokens
        self._tags = {"model": model}
        tags = ("model",)
        self._queue = _seconds("raptide_queue_seconds", "Waiting before computing begins", tags)
        self._compute = _seconds("raptide_compute_seconds", "Computing one batch", tags)
        self._tokens = metrics.Histogram(
            "raptide_batch_tokens", "Tokens of one batch", boundaries=TOKENS, tag_keys=tags
        )
        self._fill = metrics.Histogram(
            "raptide_batch_fill_ratio", "Of its budget", boundaries=SHARES, tag_keys=tags
        )
        self._computed = _counter("raptide_computed_tokens_total", "Tokens computed", tags)
        self._queued = metrics.Gauge("raptide_queued_tokens", "Tokens that wait", tag_keys=tags)
        self._up = metrics.Gauge("raptide_replica_up", "1 for each replica", tag_keys=tags)
        self._up.set(1, tags=self._tags)

    def request(self, queue_s: float) -> None:
        self._queue.observe(max(queue_s, 1e-6), tags=self._tags)

    def batch(self, tokens: int, compute_s: float) -> None:
        self._compute.observe(max(compute_s, 1e-6), tags=self._tags)
        self._tokens.observe(tokens, tags=self._tags)
        self._fill.observe(tokens / self._budget, tags=self._tags)
        self._computed.inc(tokens, tags=self._tags)

    def queued(self, tokens: int) -> None:
        self._queued.set(tokens, tags=self._tags)
        self._up.set(1, tags=self._tags)


class Speed:
    """How much is done a second, over the last SPEED_S."""

    def __init__(self) -> None:
        self._done: deque[tuple[int, int]] = deque()
        """Second, and how much was done in it."""

    def add(self, count: int) -> None:
        second = int(time.monotonic())
        if self._done and self._done[-1][0] == second:
            count += self._done.pop()[1]
        self._done.append((second, count))

    @property
    def per_s(self) -> float:
        while self._done and self._done[0][0] < time.monotonic() - SPEED_S:
            self._done.popleft()
        return sum(count for _, count in self._done) / SPEED_S


def _counter(name: str, description: str, tags: tuple[str, ...]) -> metrics.Counter:
    return metrics.Counter(name, description, tag_keys=tags)


def _seconds(name: str, description: str, tags: tuple[str, ...]) -> metrics.Histogram:
    return metrics.Histogram(name, f"{description}, seconds", boundaries=SECONDS, tag_keys=tags)
