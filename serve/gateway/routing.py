"""Which replica gets a piece of work: the one with the fewest tokens on its way or in its queue.

Serve's own routers count requests (CapacityQueueRouter, too, and asks one actor before every
request), but one request may be a peptide or a hundred proteins. What each replica has to do is
known by loads.py.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from serve.calls import Work
from serve.gateway.loads import LOADS

LEAVING_S = 600.0
"""How long a replica that is being stopped is remembered; it says itself when it has gone."""


class TokenRouter(FIFOMixin, RequestRouter):
    """Replicas in the order of their load in tokens; each alone in its rank.

    Work that is for one version of the weights goes to replicas of that version alone. Those that
    an update is stopping finish what they have, and take more until they have nothing: so they are
    remembered for the rest of the requests that they have begun.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leaving: dict[ReplicaID, tuple[RunningReplica, float]] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:  # pause between rounds in which every replica is full
            pending_request.routing_context.should_backoff = True
        work = _work_of(pending_request)
        able = of_version(work.weights if work else "", candidate_replicas, self._gone())
        shuffled = random.sample(able, len(able))
        ranked = sorted(shuffled, key=lambda r: LOADS.of(str(r.replica_id)))
        if pending_request and work and len(ranked) > 1:
            instead = LOADS.of(str(ranked[1].replica_id))
            place = pending_request.args.index(work)
            pending_request.args[place] = replace(work, instead=instead)
        return [[replica] for replica in ranked]

    def _gone(self) -> list[RunningReplica]:
        now = time.monotonic()
        return [replica for replica, until in self._leaving.values() if until > now]

    async def _select_from_candidate_replicas(
        self, candidates: list[RunningReplica], backoff_index: int
    ) -> RunningReplica | None:
        """Serve's own looks at replicas that stay alone."""
        if candidates[0].replica_id in self._leaving:
            return candidates[0]
        return await super()._select_from_candidate_replicas(candidates, backoff_index)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Of those that are to go, the ones that stand for a version are remembered."""
        until = time.monotonic() + LEAVING_S
        stay = {replica.replica_id for replica in replicas}
        gone = {name: (r, until) for name, r in self._replicas.items() if name not in stay}
        known = {name: each for name, each in self._leaving.items() if name not in stay}
        self._leaving = {
            name: each
            for name, each in {**gone, **known}.items()
            if each[1] > time.monotonic() and each[0].replica_metadata.get("weights")
        }
        for name in gone:
            LOADS.forget(str(name))
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        self._leaving.pop(replica_id, None)
        super().on_replica_actor_died(replica_id)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        self._leaving.pop(replica_id, None)
        super().on_replica_actor_unavailable(replica_id)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        if (work := _work_of(pending_request)) is not None:
            LOADS.send(pending_request.metadata.internal_request_id, str(replica_id), work.tokens)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Also of a request that was cancelled or whose replica died."""
        LOADS.end(internal_request_id)


def of_version(
    weights: str, candidates: Sequence[RunningReplica], leaving: Sequence[RunningReplica]
) -> Sequence[RunningReplica]:
    """The replicas of a version (any, if it is empty): of the candidates, else of those leaving.
    Where there are none, all candidates: whichever it is refuses, and says what it has."""
    if not weights:
        return candidates
    for some in (candidates, leaving):
        if able := [each for each in some if each.replica_metadata.get("weights") == weights]:
            return able
    return candidates


def _work_of(request: PendingRequest | None) -> Work | None:
    """None of a probe, or where nothing is pending."""
    return next(
        (each for each in (request.args if request else ()) if isinstance(each, Work)), None
    )
