"""How the models stand: what replicas they have, and whether they answer. Asking starts none.

A model is
    ready        if a replica answers
    idle         if it has none because it may have none (`min_replicas: 0`): a request starts one
    unavailable  otherwise
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from serve.calls import Description, Status
from serve.gateway.dispatch import Dispatcher
from serve.gateway.refusals import Refusal
from serve.settings import ModelSettings

READY_S = 10.0
"""Seconds a replica may take to show that it is ready."""

STATUS_S = 5.0
"""Seconds replicas may take to say how they stand."""

GRACE_S = 1.0
"""How much longer than the first model that is ready the others may take."""

HOLDS_S = 2.0
"""How long an answer holds: whoever asks meanwhile gets the same."""

T = TypeVar("T")


class Standing:
    """The models of one endpoint, as one gateway sees them."""

    def __init__(self, models: list[ModelSettings], dispatchers: dict[str, Dispatcher]) -> None:
        self._models = {model.name: model for model in models}
        self._dispatchers = dispatchers
        self._known: dict[str, Description] = {}
        """What each model said of itself last."""
        self._statuses = _Shared(self._ask_replicas)
        self._readiness = _Shared(self._probe_models)

    async def describe(self) -> list[dict[str, Any]]:
        """What /v1/models says of each model; of one that never answered, only how it stands."""
        statuses = await self._statuses.get()
        return [
            {"id": name, "state": self._state(name, found), **self._known.get(name, {})}
            for name, found in statuses.items()
        ]

    async def status(self) -> list[dict[str, Any]]:
        """What /v1/status says of each model."""
        statuses = await self._statuses.get()
        return [
            {
                "id": name,
                "state": self._state(name, found),
                "queued_tokens": sum(each["queued_tokens"] for each in found),
                "residues_per_s": round(sum(each["residues_per_s"] for each in found), 1),
                "versions": _versions(found),
                "replicas": [{k: v for k, v in each.items() if k != "model"} for each in found],
            }
            for name, found in statuses.items()
        ]

    async def readiness(self) -> dict[str, str]:
        """How each model stands, after a replica of it has just computed something."""
        return await self._readiness.get()

    def serves(self, states: dict[str, str]) -> bool:
        """Whether the endpoint is of use: one is ready of the models that always have a replica."""
        always = [name for name, model in self._models.items() if not model.is_cold]
        return not always or any(states[name] == "ready" for name in always)

    def _state(self, name: str, found: list[Status]) -> str:
        if found:
            return "ready"
        return "idle" if self._models[name].is_cold else "unavailable"

    async def _ask_replicas(self) -> dict[str, list[Status]]:
        asked = [self._dispatchers[name].statuses(STATUS_S) for name in self._models]
        found = dict(zip(self._models, await asyncio.gather(*asked), strict=True))
        for name, statuses in found.items():
            if statuses:
                self._known[name] = statuses[0]["model"]
        return found

    async def _probe_models(self) -> dict[str, str]:
        """A model that is slow to show itself keeps nobody waiting once another is ready."""
        probes = {name: asyncio.create_task(self._probe(name)) for name in self._models}
        until = time.monotonic() + READY_S
        waiting = set(probes.values())
        while waiting and time.monotonic() < until:
            done, waiting = await asyncio.wait(
                waiting,
                timeout=until - time.monotonic(),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if any(probe.result() == "ready" for probe in done):
                until = min(until, time.monotonic() + GRACE_S)
        for probe in waiting:
            probe.cancel()
        return {
            name: "unavailable" if probe in waiting else probe.result()
            for name, probe in probes.items()
        }

    async def _probe(self, name: str) -> str:
        dispatcher = self._dispatchers[name]
        if self._models[name].is_cold and not await dispatcher.statuses(STATUS_S):
            return "idle"
        try:
            await dispatcher.probe(READY_S)
        except Refusal:
            return "unavailable"
        return "ready"


class _Shared(Generic[T]):
    """A computation that all share who ask within HOLDS_S: probes take no key."""

    def __init__(self, compute: Callable[[], Awaitable[T]]) -> None:
        self._compute = compute
        self._found: asyncio.Future[T] | None = None
        self._began = 0.0

    async def get(self) -> T:
        now = time.monotonic()
        found = self._found
        if found is None or (found.done() and now - self._began > HOLDS_S):
            self._began = now
            found = self._found = asyncio.ensure_future(self._compute())
        return await asyncio.shield(found)


def _versions(found: list[Status]) -> list[dict[str, Any]]:
    """Which weights serve, in how many replicas each."""
    counts = Counter((each["weights"], each["step"]) for each in found)
    return [{"weights": w, "step": s, "replicas": n} for (w, s), n in counts.most_common()]
