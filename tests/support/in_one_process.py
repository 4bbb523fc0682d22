"""An endpoint in one process: real replicas and a real gateway, without Serve between them."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from serve.calls import Work
from serve.gateway.api import build_api
from serve.gateway.keys import KeyRing
from serve.gateway.routing import of_version
from serve.gateway.rpc import RpcMethods
from serve.gateway.service import Service
from serve.rpc import raptide_pb2 as pb
from serve.settings import GatewaySettings, ModelSettings

Choose = Callable[[list[Any]], Any]


def in_turn() -> Choose:
    """Replicas one after the other, where there is a choice."""
    numbers = itertools.count()
    return lambda replicas: replicas[next(numbers) % len(replicas) if len(replicas) > 1 else 0]


def at_random(seed: int) -> Choose:
    return random.Random(seed).choice


class Response:
    """What a handle returns for a stream."""

    def __init__(self, stream: AsyncIterator[Any], *, routed: bool = True) -> None:
        self._stream = stream
        self._cancelled = asyncio.Event()
        self._replica_result_future = SimpleNamespace(done=lambda: routed, cancelled=lambda: False)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._stream.__aiter__()

    def cancel(self) -> None:
        self._cancelled.set()


class Handle:
    """A deployment's handle: as Serve's, with the version filter of our router.

    Args:
        replicas: may be changed at any time.
        choose: which of those that may answer does.
        on_sent: called with the number of works sent so far before each one.
    """

    def __init__(
        self,
        replicas: list[Any],
        choose: Choose,
        on_sent: Callable[[int], None] = lambda sent: None,
    ) -> None:
        self.replicas = replicas
        self.works: list[Work] = []
        self._choose = choose
        self._on_sent = on_sent
        self.run = SimpleNamespace(remote=self._run)
        self.probe = SimpleNamespace(remote=lambda: self._choose(self.replicas).probe())
        self.describe = SimpleNamespace(remote=lambda: self._choose(self.replicas).describe())

    def options(self, **options: Any) -> Handle:
        return self

    def _run(self, work: Work) -> Response:
        self._on_sent(len(self.works))
        self.works.append(work)
        known = [
            SimpleNamespace(replica=replica, replica_metadata={"weights": replica._weights})
            for replica in self.replicas
        ]
        able = [each.replica for each in of_version(work.weights, known, [])]
        return Response(self._choose(able).run(work))


class Scripted:
    """A handle whose replicas do as they are told: say something, or die."""

    def __init__(self, *scripts: list[Any]) -> None:
        self._scripts = iter(scripts)
        self.works: list[Work] = []
        self.run = SimpleNamespace(remote=self._run)

    def options(self, **options: Any) -> Scripted:
        return self

    def _run(self, work: Work) -> Response:
        self.works.append(work)

        async def stream() -> AsyncIterator[Any]:
            for step in next(self._scripts):
                if isinstance(step, Exception):
                    raise step
                yield step

        return Response(stream())


class Endpoint:
    """A gateway over one model."""

    def __init__(self, handle: Any, model: ModelSettings, **settings: Any) -> None:
        gateway = GatewaySettings(**settings)
        self.keys = KeyRing(Path(gateway.keys_file) if gateway.keys_file else None)
        self.service = Service(gateway, [model], {model.name: handle})
        self.api = build_api(self.service, self.keys)
        self.rpc = RpcMethods()
        self.rpc._service, self.rpc._keys = self.service, self.keys

    async def http(self, path: str, body: dict[str, Any] | None, **headers: str) -> httpx.Response:
        """A POST, or a GET without a body."""
        method = "GET" if body is None else "POST"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        transport = httpx.ASGITransport(self.api, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, json=body, headers=named)

    async def embed(self, how: str, sequences: list[str], **headers: str) -> tuple[str, np.ndarray]:
        """The version that answered, and its vectors.

        Raises:
            AssertionError: it was refused.
        """
        if how == "grpc":
            return await self._embed_by_grpc(sequences, **headers)
        body = {"input": sequences, "encoding_format": "float"}
        if how == "arrow":
            headers["Accept"] = "application/vnd.apache.arrow.stream"
        answer = await self.http("/v1/embeddings", body, **headers)
        assert answer.status_code == 200, answer.text
        weights = answer.headers["X-Raptide-Weights"]
        if how == "json":
            return weights, np.array([row["embedding"] for row in answer.json()["data"]])
        table = pa.ipc.open_stream(answer.content).read_all()
        return weights, np.array(table["values"].to_pylist())

    async def _embed_by_grpc(self, sequences: list[str], **headers: str) -> tuple[str, np.ndarray]:
        context = Context(headers)
        request = pb.EmbedRequest(sequences=sequences)
        parts = [part async for part in self.rpc.Embed(request, context)]
        assert context.code is None, context.details
        (weights,) = {part.source.weights for part in parts}
        found = [array for part in parts for array in part.arrays]
        return weights, np.array([np.frombuffer(each.values, "<f4") for each in found])


class Context:
    """Of a gRPC call."""

    def __init__(self, headers: dict[str, str]) -> None:
        self._headers = headers
        self.code: Any = None
        self.details = ""
        self.trailing: dict[str, str] = {}

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [(name.lower().replace("_", "-"), value) for name, value in self._headers.items()]

    def set_code(self, code: Any) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, pairs: Any) -> None:
        self.trailing = dict(pairs)
