"""Room for all ranks where Ray Train lets them meet.

Each broadcast and each save of Ray Train (2.60) lets every rank wait in one asynchronous actor. By
Ray's default such an actor takes 1,000 calls at once: a larger group would wait there for ever.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor

SPARE = 100
"""Calls beside those of the ranks: Ray Train asks that actor for its state, too."""


class RoomForAll(WorkerGroupCallback):
    """Widens that actor, in the process that makes it, whenever workers are to start."""

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        calls = worker_group_context.num_workers + SPARE
        SynchronizationActor._default_options["max_concurrency"] = calls
