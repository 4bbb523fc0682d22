"""What is written down of every request, by HTTP or gRPC: metrics, and one line of the log."""

from __future__ import annotations

import logging
import time
import traceback
from dataclasses import replace

from ray.serve import context

from serve.gateway.keys import Key
from serve.gateway.ledger import Lease
from serve.gateway.refusals import Refusal
from serve.gateway.terms import LONGEST_ID
from serve.metrics import GatewayMetrics

logger = logging.getLogger("ray.serve")

GONE = 499
"""The status of what the client has left before all was answered."""


class Books:
    """One request: what is known of it so far, until it is closed."""

    def __init__(self, metrics: GatewayMetrics, protocol: str) -> None:
        self._metrics = metrics
        self._protocol = protocol
        self._started = time.monotonic()
        self.call = "other"
        self.key: Key | None = None
        self.model = ""
        self.residues = 0
        self.status: int | None = None
        """As in HTTP, also of gRPC."""
        self.kind: str | None = None
        """The type of the error, if it is one."""
        self.complete = False
        """Whether the whole answer has gone out."""
        self.lease: Lease | None = None
        """Room for the answer, given back when it has gone out or will not."""
        _bound_request_id()

    def refuse(self, refusal: Refusal) -> None:
        """It ends with an error, perhaps in the middle of its answer."""
        self.status, self.kind = refusal.status, refusal.kind

    def report(self, error: BaseException) -> None:
        """Where it failed, without what the error says: that may hold sequences."""
        places = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        logger.error("A request failed with %s at %s.", type(error).__name__, " ".join(places[-4:]))

    def close(self, *, counted_only: bool = False) -> None:
        """Write it down.

        Args:
            counted_only: without a line, for what is asked all the time.
        """
        if self.lease is not None:
            self.lease.end()
        if self.kind is None and not self.complete:
            self.status, self.kind = GONE, "disconnected"
        status, seconds = self.status or GONE, time.monotonic() - self._started
        tags = {"model": self.model, "call": self.call}
        self._metrics.requests.inc(tags={**tags, "status": str(status)})
        if status >= 400:
            self._metrics.errors.inc(tags={"type": self.kind or _kind(status)})
        if counted_only:
            return
        self._metrics.request.observe(seconds, tags=tags)
        if self.residues:
            self._metrics.residues.inc(self.residues, tags=tags)
        logger.info(
            "%s %s %d %.1f ms",
            self.call,
            self.model or "-",
            status,
            1e3 * seconds,
            extra={
                "call": self.call,
                "protocol": self._protocol,
                "model": self.model,
                "status": status,
                "seconds": round(seconds, 4),
                "residues": self.residues,
                "key": self.key.name if self.key else None,
                "error": self.kind,
            },
        )


def _kind(status: int) -> str:
    """Of an error that nobody of ours has answered."""
    return "internal" if status >= 500 else "invalid_request"


def _bound_request_id() -> None:
    """Serve writes the id into every line of its log, however long it is."""
    current = context._get_serve_request_context()
    if len(current.request_id) > LONGEST_ID:
        short = current.request_id[:LONGEST_ID]
        context._serve_request_context.set(replace(current, request_id=short))
