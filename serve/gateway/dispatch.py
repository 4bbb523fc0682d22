"""From a gateway to a replica: one hop, tried again when the replica goes away.

Answers depend on nothing but the request and the weights, so asking twice is harmless.
"""

from __future__ import annotations

import asyncio
import logging
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

from serve.calls import Done, Refused, Status, Work
from serve.gateway.refusals import Refusal, internal, invalid, overloaded, too_late, unavailable

logger = logging.getLogger("ray.serve")

DIED = (RayActorError, AioRpcError)
"""What is raised when a replica has gone away with work that it had taken."""

GONE = (*DIED, ObjectLostError, RpcError, WorkerCrashedError, TaskCancelledError)
"""What is raised when a replica, or the node that holds its answer, has gone away."""

MAX_DEATHS = 4
"""Replicas that may die over one piece of work before it is refused: it may be what kills them."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0


class Dispatcher:
    """Sends work to the replicas of one model.

    Args:
        on_retry: called with the reason before work is sent again.
    """

    def __init__(self, handle: DeploymentHandle, on_retry: Callable[[str], None]) -> None:
        self._handle = handle
        # Of a stream the router hears at once that a replica has taken the work, and counts it.
        self._by_store = handle.options(stream=True)
        self._by_message = handle.options(stream=True, _by_reference=False)
        self._on_retry = on_retry

    async def run(self, work: Work, deadline: float, param: str, first: int = 0) -> Done:
        """The answers to `work`.

        Args:
            deadline: as `time.monotonic()`.
            param: the request's field, for errors.
            first: index in it of the first sequence.

        Raises:
            Refusal: there are none, and why.
        """
        deaths = 0
        pause_s = FIRST_PAUSE_S
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                answer = await self._ask(replace(work, timeout_s=left_s), left_s)
            except TimeoutError:
                break
            except BackPressureError:
                raise overloaded(1.0) from None
            except (*GONE, RayServeException) as error:
                deaths += isinstance(error, DIED)
                self._on_retry(type(error).__name__)
            except Exception as error:
                # Without its message: it may repeat what was sent.
                logger.error("%r failed in the replica with %s.", work, type(error).__name__)
                raise internal() from None
            else:
                if isinstance(answer, Done):
                    return answer
                raise self._refusal(answer, work, param, first)
            if deaths >= MAX_DEATHS:
                logger.error("%r was refused: %d replicas died over it.", work, deaths)
                raise internal()
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise too_late(work.timeout_s)

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
        raise unavailable()

    async def _ask(self, work: Work, left_s: float) -> Done | Refused:
        """Small answers come in one gRPC message, which is soonest; large ones through Ray's
        object store, which copies nothing and knows no limit."""
        handle = self._by_message if work.ask.brief else self._by_store
        response = handle.run.remote(work)
        try:
            async with asyncio.timeout(left_s):
                [answer] = [each async for each in response]
                return answer
        except (TimeoutError, asyncio.CancelledError):
            response.cancel()  # it leaves the replica's queue at once
            raise

    @staticmethod
    def _refusal(answer: Refused, work: Work, param: str, first: int) -> Refusal:
        if answer.reason == "full":
            return overloaded(answer.retry_after_s)
        if answer.reason == "deadline":
            return too_late(work.timeout_s)
        if answer.reason in ("layers", "model"):
            return invalid(answer.reason, answer.message)
        if work.ask.call == "variants" and work.variants:
            return invalid("variants", answer.message)
        if param == "sequence":
            return invalid(param, answer.message)
        return invalid(param, f"Sequence {first + answer.index}: {answer.message}")
