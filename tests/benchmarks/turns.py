"""Processes that train by turns in one run: one goes on while all others stand still.

Runs that follow each other are minutes apart, and a machine that others use changes its speed by
more than what is to be measured in that time; turns are seconds apart.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from raptide.errors import RaptideError


class TakesTurns:
    """A process, with all that it starts, which appends a line of JSON to a file after each step.

    A line holds `speed/step_s`, the seconds since the step before, and `speed/tokens_per_s` in
    these. After its first step the process stands still.

    Args:
        lines: the file of steps, which need not exist yet.
    """

    def __init__(self, process: subprocess.Popen[bytes], lines: Path) -> None:
        self._process = process
        self._lines = lines
        self._wait_for(1)
        self._suspend()

    def turn(self, steps: int) -> tuple[float, float]:
        """Go on for so many steps; their tokens and seconds, without those it stood still in."""
        began = len(read_lines(self._lines))
        self._each(psutil.Process.resume)
        still_s = time.monotonic() - self._suspended
        self._wait_for(began + steps)
        self._suspend()
        lines = read_lines(self._lines)[began : began + steps]
        tokens = sum(line["speed/tokens_per_s"] * line["speed/step_s"] for line in lines)
        seconds = sum(line["speed/step_s"] for line in lines)
        # A run that was logging stood still between two steps: then none of them holds the pause,
        # which is longer than its turn, since all others had theirs in it.
        return tokens, seconds - still_s if seconds > still_s else seconds

    def close(self) -> None:
        """End it, and wait for its end."""
        if self._process.poll() is None:
            self._each(psutil.Process.resume)
            self._process.terminate()
        self._process.wait()

    def _wait_for(self, count: int) -> None:
        while len(read_lines(self._lines)) < count:
            if (code := self._process.poll()) is not None:
                raise RaptideError(f"A peer ended with {code}: {self._process.args!r}")
            time.sleep(0.1)

    def _suspend(self) -> None:
        self._each(psutil.Process.suspend)
        self._suspended = time.monotonic()

    def _each(self, action: Callable[[psutil.Process], None]) -> None:
        root = psutil.Process(self._process.pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                action(process)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that is being written; none while there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]
