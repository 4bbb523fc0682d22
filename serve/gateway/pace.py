"""Answers go no faster than clients read them.

Serve queues what a gateway sends without bound, and pickles a message when its proxy takes it, or,
in direct ingress, drops it once it has been written. Both are seen here, so that only a little is
made ahead of what has left.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from starlette.types import Message, Send

AHEAD_BYTES = 2**22
"""Bytes of one answer that wait to be read; at least one message."""

STALLED_S = 60.0
"""A client that reads nothing for so long is given up."""


class Stalled(Exception):
    """The client reads no further."""


class Pace:
    """`send` of one request, which waits while much of what was sent has not left."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._left = asyncio.Event()

    async def __call__(self, message: Message) -> None:
        """Send a message.

        Raises:
            Stalled: nothing has left for STALLED_S.
        """
        size = len(message.get("body", b""))
        if not size or not message.get("more_body", False):
            await self._send(message)
            return
        while self._waiting_bytes and self._waiting_bytes + size > AHEAD_BYTES:
            self._left.clear()
            try:
                await asyncio.wait_for(self._left.wait(), STALLED_S)
            except TimeoutError:
                raise Stalled from None
        self._waiting_bytes += size
        await self._send(_Leaving(message, lambda: self._leave(size)))

    def _leave(self, size: int) -> None:
        """In whatever thread it happens."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._count, size)

    def _count(self, size: int) -> None:
        self._waiting_bytes -= size
        self._left.set()


class _Leaving(dict[str, Any]):
    """A message that tells when it is pickled, or else dropped."""

    def __init__(self, message: Message, left: Callable[[], None]) -> None:
        super().__init__(message)
        self._tell: Callable[[], None] | None = left

    def __reduce__(self) -> tuple[Any, ...]:
        self._leave()
        return dict, (dict(self),)

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell()
