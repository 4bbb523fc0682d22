"""A run that is told to go saves first: SIGTERM, as `ray job stop` and schedulers send it; and one
whose nodes are to go away."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.train.v2._internal.execution.context import get_train_context

POLL_S = 0.5

TRAINING = "training"
"""First word of the phase in which there is something to save."""

LEFT = "left"
"""Phase of a run that has saved and gone."""


def nodes_to_go() -> set[str]:
    """Nodes of the run that are to go away, as far as this rank knows: Ray Train tells every rank.

    Its own function that asks, `ray.train.get_preemption_info`, lets all ranks meet in one actor,
    and each look would hold a thousand of them up for a second.
    """
    notice = get_train_context().preemption_context.preemption_info
    return set(notice.preempted_node_ids) if notice else set()


@contextmanager
def saved_on_sigterm(board: Any) -> Iterator[None]:
    """Within the block SIGTERM lets a run end its step, save and leave.

    Where it does not train there is nothing to save, and the signal does what it did before; so
    does a second one. Ctrl-C is afterwards what it was. Outside of the main thread nothing changes.

    Args:
        board: handle of the run's board.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told, over = threading.Event(), threading.Event()
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.getsignal(signal.SIGINT)

    def leave(number: int, frame: FrameType | None) -> None:
        if told.is_set():
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), number)
        told.set()

    relay = threading.Thread(target=_relay, args=(board, told, over), daemon=True)
    relay.start()
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        # Ray Train leaves one of its own behind: it keeps the run's controller alive, and lets a
        # Ctrl-C after the run abort that instead of what goes on.
        signal.signal(signal.SIGINT, interrupt)
        over.set()
        relay.join()


def _relay(board: Any, told: threading.Event, over: threading.Event) -> None:
    """Ray is not to be called from within a signal's handler, so this thread tells the board."""
    while not told.wait(POLL_S):
        if over.is_set():
            return
    try:
        ray.get(board.leave.remote())
        while not over.wait(POLL_S):
            state, _ = ray.get(board.read.remote())
            if not state.get("phase", "").startswith((TRAINING, LEFT)):
                break
    except ray.exceptions.RayError:
        pass
    if not over.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
