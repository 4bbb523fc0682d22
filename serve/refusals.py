"""Errors as clients see them: a status and `{"error": {"type", "message", "param"}}`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from serve.schemas import ErrorDetail, ErrorResponse

RETRY_AFTER_S = 1


def refusal(param: str, message: str, status: int = 422) -> HTTPException:
    """What to raise for a request that breaks a rule."""
    detail = {"type": "invalid_request", "message": message, "param": param}
    return HTTPException(status, detail=detail)


def overloaded() -> HTTPException:
    """What to raise when the queue is full."""
    return HTTPException(
        429,
        detail={"type": "overloaded", "message": "The queue is full; try again shortly."},
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )


def register(api: FastAPI) -> None:
    """Give every error of `api` the one shape."""

    @api.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        detail: Any = error.detail
        if not isinstance(detail, dict):
            detail = {"type": "error", "message": str(detail)}
        return _answer(error.status_code, detail, error.headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problem: Any = error.errors()[0]
        # The last parts of a place may be pydantic's names for the branches of a union.
        if problem["type"] == "json_invalid":
            problem = {"loc": ("body",), "msg": f"broken JSON ({problem['ctx']['error']})"}
        field = str([*problem["loc"], "body"][1])
        message = f"`{field}`: {problem['msg'][:1].lower()}{problem['msg'][1:]}."
        return _answer(422, {"type": "invalid_request", "message": message, "param": field})

    @api.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        message = "The request failed inside the server; try again, and report it if it persists."
        return _answer(500, {"type": "internal", "message": message})


def _answer(status: int, detail: dict[str, Any], headers: Any = None) -> JSONResponse:
    body = ErrorResponse(error=ErrorDetail(**detail))
    return JSONResponse(body.model_dump(), status, headers=headers)
