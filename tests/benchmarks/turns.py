"""Processes that train by turns in one run: one goes on while all others stand still.

Runs that follow each other are minutes apart, and a machine that others use changes its speed by
more than what is to be measured in that time; turns are seconds apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil


class TakesTurns:
    """A process, with all that it starts, which appends a line of JSON to a file after each step.

    A line holds `speed/step_s`, the seconds since the step before, and `speed/tokens_per_s` in
    these. After its first step the process stands still.

    Args:
        command: of Python, without the interpreter.
        lines: the file of steps, which need not exist yet.
        output: where its standard output goes.
        threads: that compute.
    """

    def __init__(
        self, command: Sequence[object], lines: Path, output: IO[Any] | int, threads: int
    ) -> None:
        self._lines = lines
        self._process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=output,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self._wait_for(1)
        self._suspend()

    def turn(self, steps: int) -> tuple[float, float]:
        """Go on for so many steps; their tokens and seconds, without those it stood still in."""
        began = len(read_lines(self._lines))
        _each(self._tree(), "resume")
        still_s = time.monotonic() - self._suspended
        self._wait_for(began + steps)
        self._suspend()
        lines = read_lines(self._lines)[began : began + steps]
        tokens = sum(line["speed/tokens_per_s"] * line["speed/step_s"] for line in lines)
        return tokens, sum(line["speed/step_s"] for line in lines) - still_s

    def __enter__(self) -> TakesTurns:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            _each(self._tree(), "resume")
            self._process.terminate()
        self._process.wait()

    def _wait_for(self, count: int) -> None:
        while len(read_lines(self._lines)) < count:
            assert self._process.poll() is None, f"a peer ended: {self._process.args!r}"
            time.sleep(0.1)

    def _suspend(self) -> None:
        _each(self._tree(), "suspend")
        self._suspended = time.monotonic()

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that is being written; none while there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def _each(processes: Sequence[psutil.Process], action: str) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            getattr(process, action)()
