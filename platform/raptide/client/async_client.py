"""The client for event loops: `Client`'s methods, to be awaited.

    async with AsyncClient("http://127.0.0.1:8000") as client:
        await client.embed(["MKTAYIAKQR", "GSHM"])        # [2, D]
        async for vector in client.embed(read(file)):     # generators, async ones too
            ...

Several calls may run at once; together they send no more requests than `parallel`.
"""

from __future__ import annotations

from typing import Any, TypeVar

from raptide.client.connection import Connection
from raptide.client.methods import is_lazy
from raptide.client.runner import Call
from raptide.client.signatures import AsyncMethods
from raptide.client.transport import AsyncTransport

T = TypeVar("T")


class AsyncClient(Connection, AsyncMethods):
    """One endpoint, called from one event loop; close it, or use it in an `async with` block."""

    _opens = AsyncTransport
    _transport: AsyncTransport

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    @property
    def detailed(self) -> DetailedAsyncClient:
        """The same methods, which give an `Answer`: the result with what answered, and how."""
        return DetailedAsyncClient(self)

    async def models(self) -> list[dict[str, Any]]:
        """As `Client.models`."""
        return await self._runner.models()

    def _run(self, call: Call[T]) -> Any:
        if is_lazy(call.given):
            return self._runner.generate(call)
        return self._runner.collect(call)


class DetailedAsyncClient(AsyncMethods):
    """A client's methods, each with an `Answer` around what it gives; all are awaited."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def _run(self, call: Call[T]) -> Any:
        given = self._client._run(call)
        call.answer.result = given if is_lazy(call.given) else await given
        return call.answer
