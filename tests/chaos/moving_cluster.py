"""A Ray cluster on this machine whose nodes come and go, and whose processes are killed."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRAINER = "trainer"
"""Custom resource of the nodes that train; the head has none, and is left to data tasks."""

# Before Ray is imported: it reads these once. What the caller says comes first.
os.environ |= {
    # A dead node is known after some 4 s and not 15, and its place is not waited for.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    # A head keeps 3.5 kB of each of the last 100,000 tasks: here as if it had been up for long.
    "RAY_task_events_max_num_task_in_gcs": "5000",
    "WANDB_MODE": "offline",
} | os.environ

import ray  # noqa: E402
from ray._raylet import GcsClient  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.core.generated import autoscaler_pb2  # noqa: E402
from training_processes import training_processes  # noqa: E402


class MovingCluster:
    """A head for data tasks, and one node for each training worker."""

    def __init__(self, nodes: int) -> None:
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 3, "include_dashboard": False},
        )
        self._nodes: list[Any] = []
        for _ in range(nodes):
            self.add_node()
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")
        os.environ["RAY_ADDRESS"] = self._cluster.address  # jobs join, as after `ray job submit`

    @property
    def size(self) -> int:
        return len(self._nodes)

    def add_node(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=1, resources={TRAINER: 1}))

    def remove_node(self, index: int = -1) -> None:
        """Kill a node with everything on it."""
        self._cluster.remove_node(self._nodes.pop(index), allow_graceful=False)

    def announce_preemption(self, seconds: float, index: int = -1) -> Any:
        """Let a node know that it will go away, as a cloud does; returns it, to be removed."""
        node = self._nodes.pop(index)
        accepted, reason = GcsClient(address=self._cluster.address).drain_node(
            node.node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "the spot price has risen",
            int((time.time() + seconds) * 1000),
        )
        assert accepted, reason
        return node

    def end_node(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_worker(self, which: int) -> bool:
        """SIGKILL one training process; whether there was one."""
        workers = training_processes()
        if not workers:
            return False
        os.kill(workers[which % len(workers)], signal.SIGKILL)
        return True

    def shutdown(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


@contextmanager
def moving_cluster(nodes: int) -> Iterator[MovingCluster]:
    """A cluster for the length of a block, with a token of its own."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        token = Path(scratch) / "token"
        token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        cluster = MovingCluster(nodes)
        try:
            yield cluster
        finally:
            cluster.shutdown()
