"""Which replica gets a piece of work: the one with the fewest tokens on its way or in its queue.

Serve's own routers count requests (CapacityQueueRouter, too, and asks one actor before every
request), but one request may be a peptide or a hundred proteins. Each gateway counts the tokens it
has sent to each replica and not had back.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from serve.calls import Work


class TokenRouter(FIFOMixin, RequestRouter):
    """Replicas in the order of their load in tokens; each alone in its rank."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sent: dict[str, tuple[ReplicaID, int]] = {}
        self._load: dict[ReplicaID, int] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:  # pause between rounds in which every replica is full
            pending_request.routing_context.should_backoff = True
        shuffled = random.sample(candidate_replicas, len(candidate_replicas))
        ranked = sorted(shuffled, key=lambda r: self._load.get(r.replica_id, 0))
        return [[replica] for replica in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        work = next((each for each in pending_request.args if isinstance(each, Work)), None)
        if work is not None:
            self._sent[pending_request.metadata.internal_request_id] = (replica_id, work.tokens)
            self._load[replica_id] = self._load.get(replica_id, 0) + work.tokens

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Also of a request that was cancelled or whose replica died."""
        _, tokens = self._sent.pop(internal_request_id, (replica_id, 0))
        left = self._load.get(replica_id, 0) - tokens
        if left > 0:
            self._load[replica_id] = left
        else:
            self._load.pop(replica_id, None)
