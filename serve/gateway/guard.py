"""What every HTTP request passes first: keys, the size of its body, and the books.

Plain ASGI, so that a body is refused while it streams in, and nothing is paid for what is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.calls import PATHS
from serve.gateway.books import Books
from serve.gateway.keys import KeyRing
from serve.gateway.pace import Pace, Stalled
from serve.gateway.refusals import Refusal, internal, invalid
from serve.metrics import GatewayMetrics

OPEN = ("/healthz", "/readyz", "/docs", "/redoc", "/openapi.json", "/static-offline-docs/")
"""Paths that take no key where keys are set: health and documentation."""

KNOWN = {f"/v1/{path}" for path in (*PATHS.values(), "models", "status")}
"""Paths that take keys and have a name in the books."""


class Guard:
    """An ASGI application around another one."""

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing,
        max_body_bytes: int,
        max_body_s: float,
        metrics: GatewayMetrics,
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._max_body_s = max_body_s
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError("Only HTTP is served here.")
        books = Books(self._metrics, "http")
        wire = _Wire(send, books)
        headers = {name.lower(): value for name, value in scope["headers"]}
        scope["state"] = {"books": books}
        try:
            body = b""
            # OPTIONS computes nothing: browsers ask by it, without a key, whether they may ask.
            # What takes no key has no use for a body either, and must not wait for one.
            if scope["method"] != "OPTIONS" and not _path(scope).startswith(OPEN):
                given = headers.get(b"authorization", b"").decode("latin-1")
                books.key = self._keys.check(given)
                body = await self._read(headers, receive)
            await self._app(scope, _replay(body, receive), wire.send)
        except _Left:
            return
        except Refusal as refusal:
            books.refuse(refusal)
            await refusal.response()(scope, receive, wire.send)
        except Exception as error:
            if books.complete:  # the application has answered it, and lets it be seen here
                books.report(error)
                return
            if wire.begun:
                _break_off(books, error)
                # An answer that breaks off must not look whole; its text may repeat what was sent.
                raise RuntimeError("The answer broke off.") from None
            books.report(error)
            books.refuse(internal())
            await internal().response()(scope, receive, wire.send)
        finally:
            books.call = _called(scope)
            books.close(counted_only=_path(scope).startswith(OPEN))

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, or a refusal as soon as it is known to be too large or too slow."""
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_body_bytes:
            raise self._too_large()
        if (coding := headers.get(b"content-encoding", b"identity").lower()) != b"identity":
            shown = coding[:20].decode("ascii", "replace")
            raise invalid(
                "body",
                f"A body is read as it is, but {shown!r} was sent; send it "
                "uncompressed, without Content-Encoding.",
                415,
            )
        try:
            async with asyncio.timeout(self._max_body_s):
                return await self._gather(receive)
        except TimeoutError:
            raise invalid(
                "body",
                f"A body has to come within {self._max_body_s:g} s, but this one "
                "did not; send less at once, or faster.",
                408,
            ) from None

    async def _gather(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Left
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> Refusal:
        return invalid(
            "body",
            f"A request holds at most {self._max_body_bytes:,} bytes, but this one is larger; send "
            "fewer sequences at once.",
            413,
        )


class _Left(Exception):
    """The client is gone before its request was whole; the books say 499."""


def _called(scope: Scope) -> str:
    """What was asked for, also by what was refused before it had a route.

    By the route's template, or a path that we know: others may hold what a client has made up.
    """
    if "route" in scope:
        path = scope["route"].path
    elif (path := _path(scope)) not in KNOWN:
        return "other"
    return path.removeprefix("/v1").strip("/").split("/")[0]


class _Wire:
    """What the application sends, no faster than it is read, and with its status in the books."""

    def __init__(self, send: Send, books: Books) -> None:
        self._send = Pace(send)
        self._books = books
        self.begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self._books.status = message["status"]
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._books.complete = True


def _break_off(books: Books, error: BaseException) -> None:
    """Why an answer ends in its middle: a refusal, a client that reads no further, or a fault."""
    causes = [error]
    while causes[-1].__cause__ is not None:  # Starlette raises another one over it
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, Stalled):
            return
        if isinstance(cause, Refusal):
            books.refuse(cause)
            return
    books.report(causes[-1])
    books.refuse(internal())


def _path(scope: Scope) -> str:
    """The path below the application's prefix."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for the application behind: the body, then whatever else comes."""
    given = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
