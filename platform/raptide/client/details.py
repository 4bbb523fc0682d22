"""What a call gave, and where it came from."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx

T = TypeVar("T")


@dataclass
class Answer(Generic[T]):
    """The result of one call, with what the endpoint said of it.

    Of a generator the rest counts what has been answered so far.
    """

    result: Any = None
    """What the call itself returns."""

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    """Names the call in the endpoint's log; its requests are ID-0, ID-1, …"""

    model: str | None = None
    """The name of the model that answered."""

    weights: str | None = None
    """Digest of its weights: one for the whole call."""

    step: int | None = None
    """The training step they come from, if that is known."""

    residues: int = 0
    """Residues that were sent: the sum of `usage` over the requests."""

    sent: int = 0
    """Requests that were begun."""

    requests: int = 0
    """Requests that were answered."""

    attempts: int = 0
    """How often these were sent."""

    queue_s: float = 0.0
    """Seconds that requests waited in the endpoint, added up."""

    compute_s: float = 0.0
    """Seconds that they were computed, added up."""

    def add(self, response: httpx.Response, residues: int, attempts: int) -> None:
        """Count an answer about so many residues."""
        headers = response.headers
        self.model = headers.get("X-Raptide-Model", self.model)
        self.weights = headers.get("X-Raptide-Weights", self.weights)
        step = headers.get("X-Raptide-Step", "")
        self.step = int(step) if step.isdecimal() else None
        self.residues += residues
        self.requests += 1
        self.attempts += attempts
        timing = dict(re.findall(r"(\w+);dur=([0-9.]+)", headers.get("Server-Timing", "")))
        self.queue_s += float(timing.get("queue", 0.0)) / 1e3
        self.compute_s += float(timing.get("compute", 0.0)) / 1e3

    def start_over(self) -> None:
        """Forget what other weights have answered."""
        self.weights, self.step = None, None
        self.residues = self.requests = 0
        self.queue_s = self.compute_s = 0.0
