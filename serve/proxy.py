"""What Serve's HTTP proxies say themselves, in our words: they run this around every request.

Serve's own answers are plain text: 404 while an application is not there, 503 while it has no
gateway, 500 for what was inside a gateway that died. Clients get the errors they know instead, and
what passes by itself is a 503 with Retry-After. Of a request's id, which Serve logs and returns as
it came, no more is taken than the gateways keep. RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names
`middlewares`, where Ray starts; `python -m serve` does so.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.gateway.refusals import Refusal, internal
from serve.gateway.terms import LONGEST_ID

SERVES_OWN = "/-/"
"""Paths of Serve's, answered as ever."""


def middlewares() -> list[Middleware]:
    return [Middleware(OwnWords)]


class OwnWords:
    """An ASGI application around a proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(SERVES_OWN):
            await self._app(scope, receive, send)
            return
        scope = _with_short_id(scope)
        replaced = False

        async def translate(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and (refusal := _refusal(message)):
                replaced = True
                await refusal.response()(scope, receive, send)
            if not replaced:
                await send(message)

        await self._app(scope, receive, translate)


def _with_short_id(scope: Scope) -> Scope:
    """The request with no more of its id than is kept."""
    headers = [
        (name, value[:LONGEST_ID] if name.lower() == b"x-request-id" else value)
        for name, value in scope["headers"]
    ]
    return {**scope, "headers": headers}


def _refusal(start: Message) -> Refusal | None:
    """What a plain answer of Serve's means; None of an answer by an application."""
    kind = dict(start.get("headers", ())).get(b"content-type", b"")
    if not kind.startswith(b"text/plain"):
        return None
    if start["status"] == 404:
        message = "Nothing is served at this path, or not yet; try again shortly, or see /-/routes."
        return Refusal(503, "unavailable", message, retry_after_s=1.0)
    if start["status"] == 503:
        message = "No gateway answers; try again shortly."
        return Refusal(503, "unavailable", message, retry_after_s=1.0)
    return internal() if start["status"] == 500 else None
