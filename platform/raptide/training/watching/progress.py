"""The live line of a run: workers post their state to a small actor, the driver draws it."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from tqdm import tqdm

from raptide.cluster import on_this_node
from raptide.errors import RaptideError
from raptide.training.watching.ranks import RankTimes, Slowest

POLL_S = 0.5
LAST_LOOK_S = 30.0
"""Seconds that the last look may take on a busy machine: no other look follows."""

BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"
"""tqdm's own estimate counts the start-up and the steps before a resume, so it is left out."""

LINE_EVERY_S = 15.0
"""Seconds between two lines where there is no terminal to redraw."""


MOST_WARNINGS = 1000
"""That wait to be said: a run of weeks may have many."""


class Board:
    """What workers and driver of a run tell each other; lives through restarts of the workers."""

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._warnings: deque[str] = deque(maxlen=MOST_WARNINGS)
        self._warned = 0
        self._mistake: RaptideError | None = None
        self._answers: dict[tuple[str, str], dict[int, Any]] = {}
        self._attempts: list[str] = []
        self._leaving = False
        self._times = RankTimes()

    def began(self, attempt: str) -> None:
        """The workers have started once more."""
        self._attempts.append(attempt)

    def attempts(self) -> list[str]:
        """Every start of this driver's workers, in order."""
        return self._attempts

    def leave(self) -> None:
        """Let the workers save and go, once they look."""
        self._leaving = True
        self.warn("The run was told to end: it ends its step and saves first.")

    def took(self, attempt: int, rank: int, where: str, seconds: float) -> None:
        """What a rank's own passes take; see `RankTimes`."""
        self._times.take(attempt, rank, where, seconds)

    def notices(self) -> tuple[bool, Slowest | None]:
        """Whether the run is to leave, and its slowest rank."""
        return self._leaving, self._times.slowest()

    def give_up(self, mistake: RaptideError) -> None:
        """Keep an error that no restart can mend."""
        self._mistake = mistake

    def mistake(self) -> RaptideError | None:
        return self._mistake

    def post(self, state: dict[str, Any]) -> None:
        """Replace a part of what the live line shows."""
        self._state = {**self._state, **state}

    def warn(self, sentence: str) -> None:
        """Say something once, above the live line."""
        self._warnings.append(sentence)
        self._warned += 1

    def read(self, known: int = 0) -> tuple[dict[str, Any], list[str]]:
        """The newest state, and what was warned of, but for the first `known` times."""
        new = min(self._warned - known, len(self._warnings))
        return self._state, list(self._warnings)[len(self._warnings) - new :]

    def sent(self, attempt: str, name: str, rank: int, files: dict[str, str], problem: Any) -> None:
        """A rank has sent its files of a checkpoint, or could not, for a problem."""
        if any(attempt < of for of, _ in self._answers):
            return  # a worker that stood still, and whose successors are at work
        if (attempt, name) not in self._answers:
            self._answers = {(attempt, name): {}}  # only one is ever on its way
        self._answers[attempt, name][rank] = (files, problem)

    def answers(self, attempt: str, name: str) -> dict[int, tuple[dict[str, str], Any]]:
        """What the ranks have sent so far."""
        return self._answers.get((attempt, name), {})


# It is called in every step, and Ray's head would keep 3.5 kB of each call.
BoardActor = ray.remote(num_cpus=0, enable_task_events=False)(Board)


@contextmanager
def board_here() -> Iterator[Any]:
    """A board beside this process, for the length of a run.

    Ray ends an actor that nobody can ask any more, but never one whose handle was pickled by
    itself, as Ray Train does with what its workers are given: each run would leave a process.
    """
    board = BoardActor.options(scheduling_strategy=on_this_node()).remote()
    try:
        yield board
    finally:
        ray.kill(board)


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
    """The board's state twice a second, and once more at the end; prints new warnings itself."""
    warned = 0
    while True:
        last = stop.wait(POLL_S)
        try:
            timeout_s = LAST_LOOK_S if last else POLL_S
            state, warnings = ray.get(board.read.remote(warned), timeout=timeout_s)
            for sentence in warnings:
                warn_here(sentence)
            warned += len(warnings)
            yield state
        except ray.exceptions.GetTimeoutError:
            pass  # a busy machine; the next look will do
        except ray.exceptions.RayError:
            return
        if last:
            return


def warn_here(sentence: str) -> None:
    """Say something above the live line, if there is one."""
    tqdm.write(f"Warning: {sentence}", file=sys.stderr)


def _draw_bar(board: Any, total_steps: int, stop: threading.Event) -> None:
    with tqdm(total=total_steps, dynamic_ncols=True, bar_format=BAR) as bar:
        for state in _states(board, stop):
            bar.n = state.get("step", 0)
            bar.set_description_str(state.get("phase", "starting workers"))
            bar.set_postfix_str(", ".join(describe_state(state, total_steps)))


def _print_lines(board: Any, total_steps: int, stop: threading.Event) -> None:
    printed = 0.0
    line = ""
    for state in _states(board, stop):
        new = f"  {state.get('phase', 'starting workers')}"
        if "loss" in state:
            new += f": step {state['step']}/{total_steps}"
            new += "".join(f", {figure}" for figure in describe_state(state, total_steps))
        due = time.monotonic() - printed >= LINE_EVERY_S or stop.is_set()
        if new != line and due:
            print(new, file=sys.stderr, flush=True)
            line, printed = new, time.monotonic()


def describe_state(state: dict[str, Any], total_steps: int) -> list[str]:
    """Loss, held-out ECE, speed and time left, as far as they are known."""
    figures = []
    if "loss" in state:
        figures.append(f"loss {state['loss']:.3f}")
    if "heldout_ece" in state:
        figures.append(f"held-out ECE {state['heldout_ece']:.2f}")
    if "tokens_per_s" in state:
        seconds = int((total_steps - state["step"]) * state["step_s"])
        figures.append(f"{state['tokens_per_s']:,.0f} tokens/s")
        figures.append(f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left")
    if state.get("slowest"):
        figures.append(state["slowest"])
    return figures
