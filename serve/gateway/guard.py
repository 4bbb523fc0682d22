"""What every HTTP request passes first: keys, the size of its body, and the books.

Plain ASGI, so that a body is refused while it streams in, and nothing is paid for what is refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.gateway.keys import KeyRing
from serve.gateway.ledger import Lease
from serve.gateway.pace import Pace
from serve.gateway.refusals import Refusal, internal, invalid
from serve.metrics import GatewayMetrics

logger = logging.getLogger("ray.serve")

OPEN = ("/healthz", "/readyz", "/docs", "/redoc", "/openapi.json", "/static-offline-docs/")
"""Paths that take no key where keys are set: health and documentation."""


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
        books = _Books(scope, send, self._metrics)
        headers = {name.lower(): value for name, value in scope["headers"]}
        scope["state"] = {"key": None, "books": books}
        try:
            body = b""
            # OPTIONS computes nothing: browsers ask by it, without a key, whether they may ask.
            # What takes no key has no use for a body either, and must not wait for one.
            if scope["method"] != "OPTIONS" and not _path(scope).startswith(OPEN):
                given = headers.get(b"authorization", b"").decode("latin-1")
                scope["state"]["key"] = self._keys.check(given)
                body = await self._read(headers, receive)
            await self._app(scope, _replay(body, receive), books.send)
        except Refusal as refusal:
            books.kind = refusal.kind
            await refusal.response()(scope, receive, books.send)
        except Exception as error:
            self._report(error)
            if books.complete:  # the application has answered it, and lets it be seen here
                return
            if books.status is not None:
                # An answer that breaks off must not look whole; its text may repeat what was sent.
                raise RuntimeError("The answer broke off.") from None
            books.kind = "internal"
            await internal().response()(scope, receive, books.send)
        finally:
            books.close()

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
                raise Refusal(400, "invalid_request", "The request ended before its body.")
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

    @staticmethod
    def _report(error: Exception) -> None:
        """Where it happened, without what it said: that may hold sequences."""
        places = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        logger.error("A request failed with %s at %s.", type(error).__name__, " ".join(places[-4:]))


class _Books:
    """What is written down of one request: metrics, and one line of the log."""

    def __init__(self, scope: Scope, send: Send, metrics: GatewayMetrics) -> None:
        self._scope = scope
        self._send = Pace(send)
        self._metrics = metrics
        self._started = time.monotonic()
        self.status: int | None = None
        self.complete = False
        """Whether the whole answer has gone out."""
        self.kind: str | None = None
        """The type of the error, if it is one."""
        self.model = ""
        self.residues = 0
        self.lease: Lease | None = None
        """Room for the answer, given back when it has gone out or will not."""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True

    def close(self) -> None:
        if self.lease is not None:
            self.lease.end()
        seconds = time.monotonic() - self._started
        path = _path(self._scope)
        call = path.rsplit("/", 1)[-1] if "route" in self._scope else "other"
        tags = {"model": self.model, "call": call}
        status = self.status or 499  # the client has left
        self._metrics.requests.inc(tags={**tags, "status": str(status)})
        if status >= 400:
            self._metrics.errors.inc(tags={"type": self.kind or str(status)})
        if path.startswith(OPEN):
            return
        self._metrics.request.observe(seconds, tags=tags)
        if self.residues:
            self._metrics.residues.inc(self.residues, tags=tags)
        key = self._scope["state"]["key"]
        logger.info(
            "%s %s %d %.1f ms",
            call,
            self.model or "-",
            status,
            1e3 * seconds,
            extra={
                "call": call,
                "model": self.model,
                "status": status,
                "seconds": round(seconds, 4),
                "residues": self.residues,
                "key": key.name if key else None,
                "error": self.kind,
            },
        )


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
