"""Keeps Ray Data's loop at the pace of its reader, and what it lists and claims in bounds.

Once as much is prepared ahead as may be, Ray Data's loop (2.60) does not wait for anything: it
asks again and again whether it may go on, and takes a whole core for as long as training lasts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import Any, TypeVar

import ray.data
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback

Item = TypeVar("Item")

MOST_QUEUED = 256
"""Inputs of tasks that wait for one, at most: each takes some 15 kB of the reader's process."""

RELEASE_S = 60.0
"""Between two inputs that Ray Data lists although it should not, for fear that nothing goes on."""

REST_S = 0.5
"""Between two steps of the loop while nobody waits for it; a step takes some milliseconds."""

_waiting = threading.Event()
"""Set while a reader of this process waits for the next item."""

_claims: Iterator[str] | None = None
"""Names under which this process's loops claim CPUs, one after the other; Ray's own if None."""


class Pace(ExecutionCallback):
    """Lets the loop rest until a reader waits; for `DataContext.custom_execution_callback_classes`.

    Ray makes it without arguments, and sends its class to other processes by name.
    """

    def before_execution_starts(self, executor: Any) -> None:
        if _claims is None:
            return
        autoscaler = executor._cluster_autoscaler
        autoscaler._autoscaling_coordinator.cancel_request()  # what it claimed as it was made
        autoscaler._autoscaling_coordinator._requester_id = next(_claims)
        autoscaler._send_resource_request([])

    def on_execution_step(self, executor: Any) -> None:
        _waiting.wait(REST_S)


def claim_as(run: str) -> None:
    """Let this process's loops claim CPUs in the name of a run, whose earlier claims end.

    A loop whose process was killed takes nothing back: for three minutes its CPUs would be kept for
    it, and none be left for the one in its place.
    """
    global _claims
    # In turn, as one loop's end may come after the next one's beginning.
    names = [f"raptide-{run}-{index}" for index in range(2)]
    coordinator = get_or_create_autoscaling_coordinator()
    for name in names:
        coordinator.cancel_request.remote(name)
    _claims = cycle(names)


class ShortQueues(BackpressurePolicy):
    """Lets an operator list no more inputs for the next one than will soon be taken.

    Ray Data counts their bytes alone, of which a range of numbers has next to none, and would list
    a whole plan in the course of hours.
    """

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        queued = [self._topology[n].total_enqueued_input_blocks() for n in op.output_dependencies]
        # As many bytes as there may be inputs more, each of which has some.
        return max(0, MOST_QUEUED - max(queued)) if queued else None


def limit_queues(context: ray.data.DataContext, *, ample: bool) -> None:
    """Keep queues short, besides what Ray Data's own policies do.

    Args:
        ample: so much may lie ahead that nothing ever waits for what Ray Data lets through.
    """
    policies = [*ENABLED_BACKPRESSURE_POLICIES, ShortQueues]
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)
    context.output_backpressure_guard_release_interval_s = RELEASE_S if ample else None


def paced(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, so that `Pace` knows when their reader waits."""
    source = iter(items)
    while True:
        _waiting.set()
        try:
            item = next(source)
        except StopIteration:
            return
        finally:
            _waiting.clear()
        yield item
