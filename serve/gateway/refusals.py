"""Errors as clients see them: a status and `{"error": {"type", "message", "param"}}`.

type             status
invalid_request  400 404 405 408 413 415 422   put it right
gone             410                       the weights asked for are served no more
authentication   401                       give a valid key
permission       403                       the key is not for this model
overloaded       429                       the queue is full: Retry-After says when
rate_limit       429                       the key has all it may have for now, likewise
unavailable      503                       no replica answers: try again
deadline         504                       allow more time, or send less
internal         500                       report it

`raptide_errors_total` counts by these types, and those who left before their answer as
`disconnected` (499).
"""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

LONGEST = 1000
"""Characters of a message."""

LEAST_S = 0.05
"""A request that lasts no longer than this might be too short for any replica to take it."""

COLD_S = 10.0
"""What a client is asked to wait while a model loads."""


class Refusal(Exception):
    """A request that gets no answer, and why.

    Args:
        message: one sentence; cut where it repeats too much of what a client sent.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]} [...]"
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {"error": {"type": self.kind, "message": self.message, "param": self.param}}

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 413:
            headers["Connection"] = "close"  # or the client goes on sending what nobody reads
        return headers

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers())


def invalid(param: str | None, message: str, status: int = 422) -> Refusal:
    """A request that breaks a rule."""
    return Refusal(status, "invalid_request", message, param)


def overloaded(retry_after_s: float) -> Refusal:
    return Refusal(
        429, "overloaded", "The queue is full; try again shortly.", retry_after_s=retry_after_s
    )


def too_late(timeout_s: float) -> Refusal:
    return Refusal(
        504,
        "deadline",
        f"The answer was not ready within {timeout_s:g} s; allow more, or send less at once.",
    )


def absent(waited_s: float, *, cold: bool) -> Refusal:
    """No replica has taken a request, or answered at all; unless it was too short for any."""
    if waited_s < LEAST_S:
        return too_late(waited_s)
    message = f"No replica took it within {waited_s:g} s; try again shortly."
    if cold:
        message = (
            f"No replica of this model was up, and loading one takes longer than the {waited_s:g} "
            "s that this request lasts; it goes on, so try again in a while."
        )
    return Refusal(503, "unavailable", message, retry_after_s=COLD_S if cold else 1.0)


def stopping() -> Refusal:
    message = "This endpoint is being stopped and takes nothing new; try again shortly."
    return Refusal(503, "unavailable", message, retry_after_s=1.0)


def gone(weights: str, served: str) -> Refusal:
    return Refusal(
        410,
        "gone",
        f"Weights {weights} are not served any more, {served} are; ask for those, or leave "
        "X-Raptide-Weights out.",
        "X-Raptide-Weights",
    )


def updated() -> Refusal:
    """Of an answer that has begun."""
    message = "The model was updated while its answer was on its way; ask again."
    return Refusal(503, "unavailable", message, retry_after_s=1.0)


def internal() -> Refusal:
    return Refusal(
        500,
        "internal",
        "The request failed inside the server; try again, and report it if it persists.",
    )


def deadly() -> Refusal:
    return Refusal(
        500,
        "internal",
        "Two replicas died while they computed this, so it is not tried again; send its sequences "
        "one by one to find the one it is, and report it.",
    )


def register(api: FastAPI) -> None:
    """Give every error of `api` the one shape."""

    @api.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return _answer(request, error)

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        answer = _answer(request, invalid(None, f"{error.detail}.", error.status_code))
        answer.headers.update(error.headers or {})
        return answer

    @api.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return _answer(request, internal())  # the guard writes down where it happened

    @api.exception_handler(RequestValidationError)
    async def misfit(request: Request, error: RequestValidationError) -> JSONResponse:
        return _answer(request, invalid(*describe(error.errors()[0])))


def _answer(request: Request, refusal: Refusal) -> JSONResponse:
    """Its answer, with its type in the books: alerts and dashboard go by the type."""
    request.state.books.refuse(refusal)
    return refusal.response()


def describe(problem: Any) -> tuple[str, str]:
    """The field that one of pydantic's complaints is about, and a sentence without its value."""
    if problem["type"] == "json_invalid":
        return "body", f"`body`: broken JSON ({problem['ctx']['error']})."
    if problem["type"] == "string_type" and _are_numbers(problem.get("input")):
        field = str(problem["loc"][1])
        return field, f"`{field}`: proteins are sent as letters, but token ids were given."
    if problem["type"] == "model_attributes_type":
        return "body", "`body`: send JSON, with Content-Type: application/json."
    # The last parts of a place may be pydantic's names for the branches of a union.
    field = str([*problem["loc"], "body"][1])
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    return field, f"`{field}`: {message[:1].lower()}{message[1:]}."


def _are_numbers(given: Any) -> bool:
    """Whether OpenAI's other way of asking was tried: ids of tokens, or lists of them."""
    if isinstance(given, list) and given:
        return _are_numbers(given[0])
    return isinstance(given, int)
