"""What Ray Train (2.60) does for every run, and nobody here has a use for, is left out.

Its own list of checkpoints, which it writes into the storage after every save, once, in the process
that leads the workers: a storage that stumbles then ends the whole run. And an actor for each group
of workers that hands out Ray Data's datasets, of which a run passes none.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager


class Lean(WorkerGroupCallback):
    """Leaves it out, in the process that leads the workers, from before they start."""

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        CheckpointManager._write_state_to_storage = _write_nothing
        DatasetsCallback.before_init_train_context = _hand_out_nothing


def _write_nothing(manager: CheckpointManager) -> None:
    pass


def _hand_out_nothing(callback: DatasetsCallback, workers: Any) -> dict[str, Any]:
    return {}
