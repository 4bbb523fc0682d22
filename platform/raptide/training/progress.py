"""The live line of a run: workers post their state to a small actor, the driver draws it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from tqdm import tqdm

POLL_S = 0.5
LINE_EVERY_S = 15.0
"""Seconds between two lines where there is no terminal to redraw."""


class Board:
    """Holds the newest state of a run; lives with the driver, through restarts of the workers."""

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._attempts = 0

    def begin_attempt(self) -> int:
        """How often the workers have started; 1 for the first time."""
        self._attempts += 1
        return self._attempts

    def post(self, state: dict[str, Any]) -> None:
        self._state = {**self._state, **state}

    def read(self) -> dict[str, Any]:
        return self._state


BoardActor = ray.remote(num_cpus=0)(Board)


@contextmanager
def shown(board: Any, total_steps: int) -> Iterator[None]:
    """Draw the board's state until the block ends: a bar on a terminal, lines elsewhere."""
    stop = threading.Event()
    draw = _draw_bar if sys.stderr.isatty() else _print_lines
    thread = threading.Thread(target=draw, args=(board, total_steps, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _states(board: Any, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """The board's state twice a second, and once more at the end."""
    while True:
        last = stop.wait(POLL_S)
        try:
            yield ray.get(board.read.remote(), timeout=10)
        except ray.exceptions.RayError:
            return
        if last:
            return


def _draw_bar(board: Any, total_steps: int, stop: threading.Event) -> None:
    with tqdm(total=total_steps, unit="step", dynamic_ncols=True) as bar:
        for state in _states(board, stop):
            bar.n = state.get("step", 0)
            bar.set_description_str(state.get("phase", "starting workers"))
            bar.set_postfix_str(_figures(state))


def _print_lines(board: Any, total_steps: int, stop: threading.Event) -> None:
    printed = 0.0
    line = ""
    for state in _states(board, stop):
        new = f"  {state.get('phase', 'starting workers')}"
        if "loss" in state:
            new += f": step {state['step']}/{total_steps}, {_figures(state)}"
            new += f", {_left(state, total_steps)} left"
        due = time.monotonic() - printed >= LINE_EVERY_S or stop.is_set()
        if new != line and due:
            print(new, file=sys.stderr, flush=True)
            line, printed = new, time.monotonic()


def _figures(state: dict[str, Any]) -> str:
    figures = []
    if "loss" in state:
        figures.append(f"loss {state['loss']:.3f}")
    if "heldout_ece" in state:
        figures.append(f"held-out ECE {state['heldout_ece']:.2f}")
    if "tokens_per_s" in state:
        figures.append(f"{state['tokens_per_s']:,.0f} tokens/s")
    return ", ".join(figures)


def _left(state: dict[str, Any], total_steps: int) -> str:
    seconds = int((total_steps - state["step"]) * state.get("step_s", 0.0))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
