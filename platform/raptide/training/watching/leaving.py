"""A run that is told to go saves first: SIGTERM, as `ray job stop` and schedulers send it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray

POLL_S = 0.5

TRAINING = "training"
"""First word of the phase in which there is something to save."""

LEFT = "left"
"""Phase of a run that has saved and gone."""


@contextmanager
def saved_on_sigterm(board: Any) -> Iterator[None]:
    """Within the block SIGTERM lets a run end its step, save and leave.

    Where it does not train there is nothing to save, and the signal does what it did before; so
    does a second one. Outside of the main thread nothing changes.

    Args:
        board: handle of the run's board.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told, over = threading.Event(), threading.Event()
    before = signal.getsignal(signal.SIGTERM)

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
