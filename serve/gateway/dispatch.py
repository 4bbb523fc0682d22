"""From a gateway to a replica: one hop, tried again when the replica goes away.

Answers depend on nothing but the request and the weights, so asking twice is harmless.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from grpc.aio import AioRpcError
from ray.exceptions import (
    ObjectLostError,
    RayActorError,
    RpcError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve.calls import Begun, Done, Refused, Status, Taken, Work
from serve.gateway.loads import LOADS
from serve.gateway.nodes import is_leaving
from serve.gateway.refusals import (
    Refusal,
    absent,
    deadly,
    internal,
    invalid,
    overloaded,
    too_late,
)

logger = logging.getLogger("ray.serve")

DIED = (RayActorError, AioRpcError)
"""What is raised when a replica has gone away with work that it had taken."""

GONE = (*DIED, ObjectLostError, RpcError, WorkerCrashedError, TaskCancelledError)
"""What is raised when a replica, or the node that holds its answer, has gone away."""

MAX_DEATHS = 2
"""Replicas that may die while they compute a piece of work until it is refused: it is what kills
them, as it was alone in its batch from the first of them on."""

UNEXPLAINED = 3
"""Replicas that may die with a piece of work in their queue until it is computed alone: one that
kills in an instant may be faster than the word that it has begun."""

MISSES = 6
"""Refusals by replicas of other versions until one counts as gone. The router sends work to its own
version where it knows one: what is missed is what a gateway has not heard of yet."""

MOVES = 3
"""How often work may be sent back by a replica because another has less to do."""

SILENT_S = 10.0
"""No word from any replica for so long: there is none."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0


class VersionGone(Exception):
    """Work is for weights that no replica has any more.

    Args:
        served: the digest of weights that are served in their place.
    """

    def __init__(self, served: str) -> None:
        super().__init__(served)
        self.served = served


class _Trip:
    """One piece of work, and what has become of it so far."""

    def __init__(self, work: Work, on_taken: Callable[[Taken], None]) -> None:
        self.work = replace(work, movable=True)
        self.deaths = 0
        """Replicas that died while they computed it."""
        self.node: str | None = None
        """Of the replica that is computing it; None while it is none."""
        self.is_routed = False
        """Whether a replica has it, or had it last."""
        self._on_taken = on_taken
        self._unexplained = 0
        self._misses = 0
        self._moves = 0
        self._pause_s = FIRST_PAUSE_S
        self._full: set[str] = set()
        """Replicas that had no room."""

    def hear(self, note: Taken | Begun) -> None:
        """Once it is taken, others of its request go by its version, and so must itself."""
        if isinstance(note, Begun):
            self.node = note.node
            return
        self.work = replace(self.work, weights=note.weights, admitted=True)
        self._on_taken(note)

    def count_death(self) -> None:
        """Of its replica: while it was computed, or waited."""
        if self.node is None:
            self._unexplained += 1
        else:
            self.deaths += 1
        if self.deaths or self._unexplained >= UNEXPLAINED:
            self.work = replace(self.work, alone=True)

    def goes_on(self, refused: Refused) -> bool:
        """Whether a refusal is not the last word.

        Raises:
            VersionGone: it is, as the weights are nowhere.
        """
        if refused.reason == "busier":
            self._moves += 1
            self._pause_s = 0.0
            self.work = replace(self.work, movable=self._moves < MOVES)
            return True
        if refused.reason == "full":
            return self._may_find_room(refused.load.replica if refused.load else "")
        if refused.reason != "version":
            return refused.reason == "stopped"
        self._misses += 1
        if self._misses >= MISSES:
            raise VersionGone(refused.message)
        return True

    async def pause(self) -> None:
        """Before it is sent again; none where another replica is known to have room."""
        await asyncio.sleep(self._pause_s * random.uniform(0.5, 1.0))
        self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)

    def _may_find_room(self, replica: str) -> bool:
        """A newcomer asks each replica once; what is admitted waits its turn."""
        if self.work.admitted:
            return True
        known = replica in self._full
        self._full.add(replica)
        return not known


class Dispatcher:
    """Sends work to the replicas of one model.

    Args:
        on_retry: called with the reason before work is sent again.
        cold: whether there may be no replica while nobody asks.
    """

    def __init__(
        self, handle: DeploymentHandle, on_retry: Callable[[str], None], *, cold: bool = False
    ) -> None:
        self._handle = handle
        self._cold = cold
        self._heard_at = -math.inf
        # Of a stream the router hears at once that a replica has taken the work, and counts it.
        self._by_store = handle.options(stream=True)
        self._by_message = handle.options(stream=True, _by_reference=False)
        self._on_retry = on_retry

    async def run(
        self,
        work: Work,
        deadline: float,
        param: str,
        first: int = 0,
        on_taken: Callable[[Taken], None] = lambda taken: None,
    ) -> Done:
        """The answers to `work`.

        Args:
            deadline: as `time.monotonic()`.
            param: the request's field, for errors.
            first: index in it of the first sequence.
            on_taken: called when a replica has it in its queue, if it `leads`.

        Raises:
            VersionGone: it is for weights that no replica has any more.
            Refusal: there are no answers, and why.
        """
        trip = _Trip(work, on_taken)
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                answer = await self._ask(trip, left_s)
            except TimeoutError:
                break
            except BackPressureError:
                raise self._crowded(work.timeout_s) from None
            except (*GONE, RayServeException) as error:
                await self._count_death(trip, error)
            except Exception as error:
                # Without its message: it may repeat what was sent.
                logger.error("%r failed in the replica with %s.", work, type(error).__name__)
                raise internal() from None
            else:
                if isinstance(answer, Done):
                    return answer
                if not trip.goes_on(answer):
                    raise self._refusal(answer, work, param, first)
            await trip.pause()
        if trip.is_routed or self._is_answered():
            raise too_late(work.timeout_s)
        raise absent(work.timeout_s, cold=self._cold)

    def _crowded(self, timeout_s: float) -> Refusal:
        """So many requests wait here already that no other may; are there replicas at all?"""
        return overloaded(1.0) if self._is_answered() else absent(timeout_s, cold=self._cold)

    def _is_answered(self) -> bool:
        return time.monotonic() - self._heard_at < SILENT_S

    async def _count_death(self, trip: _Trip, error: Exception) -> None:
        self._on_retry(type(error).__name__)
        trip.is_routed, self._heard_at = False, -math.inf  # it may have been the last one
        if not isinstance(error, DIED) or (trip.node and await is_leaving(trip.node)):
            return
        trip.count_death()
        if trip.deaths >= MAX_DEATHS:
            logger.error("%r was refused: %d replicas died over it.", trip.work, trip.deaths)
            raise deadly()

    async def describe(self, timeout_s: float) -> dict[str, Any]:
        """What the model is.

        Raises:
            Refusal: no replica says so in time.
        """
        return await self._call("describe", timeout_s)

    async def probe(self, timeout_s: float) -> None:
        """Returns once a replica has computed an answer, past its queue.

        Raises:
            Refusal: none does in time.
        """
        await self._call("probe", timeout_s)

    async def statuses(self, timeout_s: float) -> list[Status]:
        """How each replica stands that says so in time; none is started for it."""
        try:
            response = self._handle.broadcast("status")
            found = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
        except (TimeoutError, RayServeException, *GONE):  # there is none
            return []
        return [each for each in found if not isinstance(each, BaseException)]

    async def _call(self, method: str, timeout_s: float) -> Any:
        until = time.monotonic() + timeout_s
        while (left_s := until - time.monotonic()) > 0:
            try:
                return await asyncio.wait_for(getattr(self._handle, method).remote(), left_s)
            except TimeoutError:
                break
            except GONE:
                await asyncio.sleep(FIRST_PAUSE_S)
            except Exception as error:
                logger.warning("%s: %s of a replica failed.", method, type(error).__name__)
                await asyncio.sleep(LONGEST_PAUSE_S)
        raise absent(timeout_s, cold=self._cold)

    async def _ask(self, trip: _Trip, left_s: float) -> Done | Refused:
        """Small answers come in one gRPC message, which is soonest; large ones through Ray's
        object store, which copies nothing and knows no limit."""
        handle = self._by_message if trip.work.ask.brief else self._by_store
        trip.node, trip.is_routed = None, False
        response = handle.run.remote(replace(trip.work, timeout_s=left_s))
        answer: Done | Refused | None = None
        try:
            async with asyncio.timeout(left_s):
                async for each in response:
                    self._heard_at = time.monotonic()
                    if isinstance(each, Done | Refused):
                        answer = each
                        if each.load is not None:
                            LOADS.hear(each.load, ended=trip.work.tokens)
                    else:
                        trip.hear(each)
        except (TimeoutError, asyncio.CancelledError):
            trip.is_routed = _is_routed(response)
            response.cancel()  # it leaves the replica's queue at once
            raise
        if answer is None:
            raise RayServeException("A replica ended without an answer.")
        trip.is_routed = True
        return answer

    @staticmethod
    def _refusal(answer: Refused, work: Work, param: str, first: int) -> Refusal:
        if answer.reason == "full":
            return overloaded(answer.retry_after_s)
        if answer.reason == "deadline":
            return too_late(work.timeout_s)
        if answer.reason == "failed":
            return internal()
        if answer.reason in ("layers", "model"):
            return invalid(answer.reason, answer.message)
        if work.ask.call == "variants" and work.variants:
            return invalid("variants", answer.message)
        if param == "sequence":
            return invalid(param, answer.message)
        return invalid(param, f"Sequence {first + answer.index}: {answer.message}")


def _is_routed(response: Any) -> bool:
    """Whether a replica has taken a request; Serve says so by no public name."""
    future = response._replica_result_future
    return bool(future.done() and not future.cancelled())
