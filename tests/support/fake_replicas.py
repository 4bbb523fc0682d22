"""The gateway in this process, with replicas that answer at once with random numbers."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np

from serve.calls import Done
from serve.gateway import service as service_module
from serve.gateway.api import build_api
from serve.gateway.keys import KeyRing
from serve.gateway.service import Service
from serve.gateway.sizes import Shape, count_numbers
from serve.settings import GatewaySettings, ModelSettings


@functools.cache
def draw(seed, count):
    return np.random.default_rng(seed).standard_normal(count, np.float32)


class Counted:
    """A metric that remembers what was counted or observed, by its tags."""

    def __init__(self):
        self.seen = collections.Counter()

    def inc(self, value=1, tags=None):
        self.seen[tuple((tags or {}).values())] += value

    observe = set = inc


class CountedMetrics(collections.defaultdict):
    """`GatewayMetrics` that anybody may read."""

    def __init__(self):
        super().__init__(Counted)

    def __getattr__(self, name):
        return self[name]

    def serialised(self, seconds):
        self["serialise"].observe(seconds)


class FakeReplicas:
    """A handle to the replicas of a model, whose numbers depend on a sequence's length.

    Args:
        failure: raised, or given as the answer, instead of numbers, from the run `fails_at` on.
    """

    def __init__(self, width=32, layers=4, tokens=33, failure=None, fails_at=0):
        self.shape = Shape("w1", width, layers, tokens)
        self.failure, self.fails_at = failure, fails_at
        self.described = 0
        self.works = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.run = SimpleNamespace(remote=self._run)
        self.describe = SimpleNamespace(remote=self._describe)
        self.cancelled = 0

    def options(self, **_):
        return self

    def broadcast(self, method):
        assert method == "status"
        return _Statuses(self)

    async def _describe(self):
        self.described += 1
        return self.description()

    def description(self):
        names = ["weights", "width", "layers"]
        found = {name: getattr(self.shape, name) for name in names}
        return {**found, "tokens": [""] * self.shape.tokens}

    def _run(self, work):
        self.works.append(work)
        return _Response(self, work, len(self.works) - 1)

    def answer(self, work):
        lengths = [len(sequence) for sequence in work.sequences]
        counts = count_numbers(work.ask, lengths, len(work.variants), self.shape)
        arrays = [draw(length, count).copy() for length, count in zip(lengths, counts, strict=True)]
        if work.ask.call == "embed":
            arrays = [array.reshape(-1, self.shape.width) for array in arrays]
            if work.ask.pooling == "mean" and len(work.ask.layers) == 1:
                arrays = [array[0] for array in arrays]
        elif not work.ask.brief:
            arrays = [array.reshape(n, -1) for array, n in zip(arrays, lengths, strict=True)]
        return Done(arrays, self.shape.weights, 5, 0.0, 0.0)


class _Statuses:
    def __init__(self, replicas):
        self._replicas = replicas

    async def results_async(self, timeout_s, return_exceptions):
        load = {"queued_tokens": 0, "pending_tokens": 0, "residues_per_s": 0.0}
        weights = self._replicas.shape.weights
        model = self._replicas.description()
        return [{"node": "n", "weights": weights, "step": 5, **load, "model": model}]


class _Response:
    def __init__(self, replicas, work, number):
        self._replicas, self._work, self._number = replicas, work, number
        self._replica_result_future = SimpleNamespace(done=lambda: True, cancelled=lambda: False)

    def cancel(self):
        self._replicas.cancelled += 1

    async def __aiter__(self):
        await self._replicas.gate.wait()
        if self._replicas.failure is not None and self._number >= self._replicas.fails_at:
            if isinstance(self._replicas.failure, Exception):
                raise self._replicas.failure
            yield self._replicas.failure
            return
        # Another process does it in truth; here it must not keep the gateway's loop.
        yield await asyncio.to_thread(self._replicas.answer, self._work)


@contextlib.contextmanager
def counted_metrics():
    """Services made within count in memory; Ray's metrics need a cluster."""
    real = service_module.GatewayMetrics
    service_module.GatewayMetrics = CountedMetrics
    try:
        yield
    finally:
        service_module.GatewayMetrics = real


def make_service(replicas, **settings):
    """A service of the one model `m`."""
    model = ModelSettings(name="m", path="", max_queued_tokens=2**40)
    with counted_metrics():
        return Service(GatewaySettings(max_residues=20_000, **settings), [model], {"m": replicas})


def make_app(replicas, **settings):
    """The HTTP application, and its service."""
    service = make_service(replicas, **settings)
    return build_api(service, KeyRing(None)), service


@contextlib.asynccontextmanager
async def http_client(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


def keys_file(folder: Path, line: str) -> KeyRing:
    (folder / "keys").write_text(line)
    return KeyRing(folder / "keys")
