"""Ray Train's own list of checkpoints is not written: nobody reads it, and runs ended with it.

Ray Train (2.60) writes it into the storage after every save, once, in the process that leads the
workers; a storage that stumbles then ends the whole run.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager


class NoSnapshot(WorkerGroupCallback):
    """Leaves it out, in the process that would write it, from before workers start."""

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        CheckpointManager._write_state_to_storage = _write_nothing


def _write_nothing(manager: CheckpointManager) -> None:
    pass
