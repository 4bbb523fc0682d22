"""What is no answer: refusals of the endpoint or of a proxy, and failures on the way, in words."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from raptide.errors import ConfigError, InputError, SequenceError, ServiceError

SEQUENCE_PARAMS = ("input", "sequences", "sequence", "variants")

PASSING_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
"""How TLS breaks off when its end goes away."""


class BrokenAnswer(Exception):
    """An answer that ended early: its sender died while it was sent."""


def may_pass(answer: httpx.Response) -> bool:
    """Whether the same request may succeed in a while."""
    status, detail = answer.status_code, _detail(answer)
    if status in (429, 502, 503):
        return True
    if status == 504:
        return detail.get("type") != "deadline"
    if status == 404:  # Serve's proxy says so, in plain text, before an application is there
        return not detail and answer.headers.get("Content-Type", "").startswith("text/plain")
    return status == 500 and not detail


def is_gone(answer: httpx.Response) -> bool:
    """Whether the endpoint says that the weights it was asked for do not answer any more."""
    return answer.status_code in (409, 410)


def retry_after_s(answer: httpx.Response) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 without one."""
    value = answer.headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        pass
    else:
        return seconds if 0 <= seconds < float("inf") else 0.0
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def describe_refusal(answer: httpx.Response) -> InputError | ServiceError:
    """An answer that is no success, as an error of one sentence."""
    status, detail = answer.status_code, _detail(answer)
    message = " ".join(str(detail.get("message") or "").split())
    if status in (401, 403):
        return ConfigError(
            f"The endpoint refuses the API key ({message or status}); give a valid one as `key` or "
            "in RAPTIDE_API_KEY."
        )
    if answer.has_redirect_location:
        place = answer.headers["Location"]
        return ServiceError(
            f"{answer.url} answered {status}: it has moved to {place}; give the URL it has now."
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


def is_lasting(error: Exception) -> bool:
    """Whether a failure on the way is a mistake that no waiting puts right."""
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError | httpx.ProxyError):
        return True
    return any(_is_wrong_tls(each) or _is_wrong_name(each) for each in _causes(error))


def what_broke(error: Exception) -> str:
    """A failure on the way in a few words, with the remedy where there is one."""
    for each in _causes(error):
        if isinstance(each, ssl.SSLCertVerificationError):
            return (
                f"its certificate is refused: {each.verify_message}; give verify=FILE with its CA"
            )
        if _is_wrong_tls(each):
            reason = getattr(each, "reason", None) or str(each)
            return f"TLS fails: {reason}; is it http:// instead?"
        if _is_wrong_name(each):
            return "there is no host of that name; look at the URL"
    return str(error) or type(error).__name__


def _is_wrong_tls(error: BaseException) -> bool:
    return isinstance(error, ssl.SSLError) and not isinstance(error, PASSING_TLS)


def _is_wrong_name(error: BaseException) -> bool:
    return isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _detail(answer: httpx.Response) -> dict[str, Any]:
    """What the application says is wrong; {} where it was not the application that answered."""
    try:
        detail = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return detail if isinstance(detail, dict) and detail.get("message") else {}
