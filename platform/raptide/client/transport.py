"""Requests to an endpoint that come back: retried while it restarts or is full, refused in words.

Every call of the endpoint is a pure function of its request, so repeating one is always safe.

What is tried again: broken connections, answers that end early, 429 (after its Retry-After), 502,
503, 504, and a 500 that does not come from the application (a proxy says so when the process behind
it dies). What is not: the application's own errors, and requests that took longer than they may.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from raptide.errors import ConfigError, InputError, SequenceError, ServiceError

T = TypeVar("T")

CONNECT_S = 10.0
GRACE_S = 5.0
"""Seconds beyond a request's deadline in which the endpoint's own word about it may arrive."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
"""Pauses double from the first to the longest; each is shortened at random by up to a half."""

SEQUENCE_PARAMS = ("input", "sequences", "sequence", "variants")


class BrokenAnswer(Exception):
    """An answer that ended early: its sender died while it was sent."""


class Transport:
    """One endpoint. Safe to use from several threads.

    Args:
        url: where the endpoint is, with or without `/v1`.
        key: sent as a bearer token; None sends none.
        timeout_s: seconds one request may take.
        retry_s: seconds to go on trying, counted from the first failure of a request or from the
            last answer any request got, whichever is later.
        connections: requests at once.
    """

    def __init__(
        self, url: str, key: str | None, timeout_s: float, retry_s: float, connections: int
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"The endpoint's URL begins with http:// or https://, but {url!r} was given."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._last_answer = float("-inf")
        headers = {"X-Raptide-Timeout-S": f"{timeout_s:g}"}
        if key is not None:
            if not (key.isascii() and key.isprintable()) or not key.strip():
                raise ConfigError("An API key is plain printable text, but the one given is not.")
            headers["Authorization"] = f"Bearer {key.strip()}"
        try:
            if not httpx.URL(self.url).host:
                raise ConfigError(f"{url!r} names no host.")
            self._http = httpx.Client(
                base_url=self.url,
                headers=headers,
                timeout=httpx.Timeout(timeout_s + GRACE_S, connect=CONNECT_S, pool=None),
                limits=httpx.Limits(max_connections=connections),
            )
        except httpx.InvalidURL as error:
            raise ConfigError(f"{url!r} is no URL ({error}).") from None

    def close(self) -> None:
        self._http.close()

    def ask(
        self,
        method: str,
        path: str,
        read: Callable[[httpx.Response], T],
        body: dict[str, Any] | None = None,
        accept: str = "application/json",
        stop: threading.Event | None = None,
    ) -> T:
        """Send a request until it is answered; `read` makes the result of the answer.

        Args:
            stop: set when nobody wants the answer any more, so that it is not tried again.

        Raises:
            SequenceError: the endpoint refuses a sequence or a variant.
            ConfigError: it refuses the key, the model or another argument.
            ServiceError: it cannot be reached, stays full or fails.
        """
        stop = stop or threading.Event()
        first_failure = None
        pause_s = FIRST_PAUSE_S
        while True:
            least_s = 0.0
            try:
                answer = self._http.request(method, path, json=body, headers={"Accept": accept})
                if answer.is_success:
                    result = read(answer)
                    self._last_answer = time.monotonic()
                    return result
                error = describe_refusal(answer)
                if not may_pass(answer):
                    raise error
                least_s = retry_after_s(answer)
            except (httpx.ReadTimeout, httpx.WriteTimeout):
                raise ServiceError(
                    f"{self.url}{path} did not answer within {self._timeout_s:g} s; send less at "
                    "once, or allow more with timeout_s."
                ) from None
            except (httpx.RequestError, BrokenAnswer) as broken:
                error = ServiceError(f"{self.url} cannot be reached ({_reason(broken)})")
            now = time.monotonic()
            first_failure = first_failure or now
            wait_s = least_s + pause_s * random.uniform(0.5, 1.0)
            if now + wait_s > max(first_failure, self._last_answer) + self._retry_s:
                raise self._given_up(error, now - first_failure)
            if stop.wait(wait_s):
                raise error
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _given_up(self, error: InputError | ServiceError, tried_s: float) -> ServiceError:
        sentence = str(error).rstrip(".")
        if not self._retry_s:
            return ServiceError(f"{sentence}.")
        return ServiceError(f"{sentence}; given up after {tried_s:.0f} s of trying.")


def may_pass(answer: httpx.Response) -> bool:
    """Whether the same request may succeed in a while."""
    if answer.status_code in (429, 502, 503):
        return True
    detail = _detail(answer)
    if answer.status_code == 504:
        return detail.get("type") != "deadline"
    return answer.status_code == 500 and not detail


def retry_after_s(answer: httpx.Response) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 without one."""
    value = answer.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def describe_refusal(answer: httpx.Response) -> InputError | ServiceError:
    """An answer that is no success, as an error of one sentence."""
    status = answer.status_code
    detail = _detail(answer)
    message = " ".join(str(detail.get("message") or "").split())
    if status in (401, 403):
        return ConfigError(
            f"The endpoint refuses the API key ({message or status}); give a valid one as `key` or "
            "in RAPTIDE_API_KEY."
        )
    if not detail:
        return ServiceError(
            f"{answer.url} answered {status} {answer.reason_phrase} without saying why; is it a "
            "Raptide endpoint?"
        )
    if status == 429 or status >= 500:
        return ServiceError(f"The endpoint answered {status}: {message}")
    if detail.get("param") in SEQUENCE_PARAMS:
        return SequenceError(message)
    if detail.get("param"):
        return ConfigError(message)
    return ConfigError(f"{answer.url} answered {status}: {message}")


def _detail(answer: httpx.Response) -> dict[str, Any]:
    """What the application says is wrong; {} where it was not the application that answered."""
    try:
        detail = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return detail if isinstance(detail, dict) and detail.get("message") else {}


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
