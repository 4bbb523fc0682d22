"""One request until it is answered: what to send, and what to do about each answer.

It knows no transport: whoever sends asks it for headers, and tells it what came back. Every call of
the endpoint is a pure function of its request, so repeating one is always safe.

Tried again, with pauses that double, until `retry_s` have passed without an answer to anything:
broken connections, answers that end early, 429 and 503 (after their Retry-After), 502 and 504 of a
proxy, and the plain 404 by which Serve says that an application is not there yet. A plain 500, of a
proxy whose process behind it died, is tried a few times only. What else there is stays as it is:
other refusals, certificates and names of hosts that are wrong, requests that took longer than they
may.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx

from raptide.client.details import Answer
from raptide.client.refusals import (
    BrokenAnswer,
    describe_refusal,
    is_gone,
    is_lasting,
    may_pass,
    retry_after_s,
    what_broke,
)
from raptide.errors import InputError, ServiceError

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
"""Pauses double from the first to the longest; each is shortened at random by up to a half."""

MOST_PLAIN_ERRORS = 4
"""Answers of 500 that come from no application, to one request."""

WEIGHTS = "X-Raptide-Weights"


class Gone(Exception):
    """The weights that a call has met do not answer any more."""


@dataclass
class Patience:
    """How long requests are tried. One for all of a client: each answer gives new hope to all."""

    retry_s: float
    last_answer: float = float("-inf")


@dataclass
class Pin:
    """The weights of one call: those given, or the first it meets."""

    digest: str | None = None

    def meet(self, digest: str | None) -> bool:
        """Whether these are the call's weights. Endpoints that name none are believed."""
        if self.digest is None:
            self.digest = digest
        return digest is None or digest == self.digest


@dataclass
class Exchange(Generic[T]):
    """One request, and its answer in the end."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    """Makes the result of an answer."""
    patience: Patience
    timeout_s: float
    body: dict[str, Any] | None = None
    accept: str = "application/json"
    pin: Pin = field(default_factory=Pin)
    request_id: str = ""
    answer: Answer | None = None
    """Told of what answered."""
    residues: int = 0
    """That are sent."""
    result: Any = None
    _attempts: int = 0
    _plain_errors: int = 0
    _first_failure: float | None = None
    _pause_s: float = FIRST_PAUSE_S
    _sent_pin: str | None = None

    def headers(self) -> dict[str, str]:
        """Of the next attempt."""
        self._attempts += 1
        self._sent_pin = self.pin.digest
        headers = {"Accept": self.accept, "X-Raptide-Timeout-S": f"{self.timeout_s:g}"}
        if self.request_id:
            headers["X-Request-Id"] = self.request_id
        if self._sent_pin is not None:
            headers[WEIGHTS] = self._sent_pin
        return headers

    def answered(self, response: httpx.Response) -> float | None:
        """Take an answer: None when `result` is there, else seconds to wait before the next try.

        Raises:
            SequenceError: the endpoint refuses a sequence.
            ConfigError: it refuses the key, the model or another argument.
            ServiceError: it fails, stays full, or answers with something else.
            Gone: the call's weights do not answer any more.
        """
        if response.is_success:
            return self._read(response)
        if is_gone(response) and self._sent_pin is not None:
            raise Gone(self._sent_pin)
        error = describe_refusal(response)
        self._plain_errors += response.status_code == 500
        if not may_pass(response) or self._plain_errors >= MOST_PLAIN_ERRORS:
            raise self._named(error) if response.status_code == 500 else error
        return self._wait(error, retry_after_s(response))

    def failed(self, error: httpx.HTTPError, url: str) -> float:
        """Take a failure of the transport: seconds to wait before the next try.

        Raises:
            ServiceError: trying again is of no use, or was for too long.
        """
        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
            raise ServiceError(
                f"{url}{self.path} did not answer within {self.timeout_s:g} s; send less at once, "
                "or allow more with timeout_s."
            )
        said = ServiceError(f"{url} cannot be reached ({what_broke(error)})")
        if is_lasting(error):
            raise ServiceError(f"{said}.")
        return self._wait(said, 0.0)

    def _read(self, response: httpx.Response) -> float | None:
        digest = response.headers.get(WEIGHTS)
        if not self.pin.meet(digest):
            if self._sent_pin is None:  # it met other weights before the call had any
                return 0.0
            raise Gone(self._sent_pin)
        try:
            self.result = self.read(response)
        except BrokenAnswer as broken:
            said = ServiceError(f"{response.url} cannot be reached ({broken})")
            return self._wait(said, 0.0)
        self.patience.last_answer = time.monotonic()
        if self.answer is not None:
            self.answer.add(response, self.residues, self._attempts)
        return None

    def _wait(self, error: InputError | ServiceError, least_s: float) -> float:
        now = time.monotonic()
        if self._first_failure is None:
            self._first_failure = now
        wait_s = least_s + self._pause_s * random.uniform(0.5, 1.0)
        hope = max(self._first_failure, self.patience.last_answer)
        if now + wait_s > hope + self.patience.retry_s:
            sentence = str(error).rstrip(".")
            tried = f"; given up after {now - self._first_failure:.0f} s of trying"
            raise ServiceError(f"{sentence}{tried if self.patience.retry_s else ''}.")
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return wait_s

    def _named(self, error: InputError | ServiceError) -> InputError | ServiceError:
        """A failure inside the endpoint, with the id under which its log has it."""
        if isinstance(error, ServiceError) and self.request_id:
            return ServiceError(f"{str(error).rstrip('.')} (request {self.request_id}).")
        return error
