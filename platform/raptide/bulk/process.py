"""An engine in a process of its own, which may die, hang or eat all memory without harm to this
one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil

from raptide.bulk import child
from raptide.bulk.work import Work
from raptide.errors import RaptideError

LOOK_S = 0.2
"""How often memory and time are looked at."""

STARTS = 3
"""Times that an engine may die while it is opened: that is no record's fault."""


class Death(Exception):
    """The engine's process died of what it computed, or was ended; the reason is for people."""


@dataclass(frozen=True)
class Limits:
    threads: int
    memory_bytes: int
    """Of one engine's process; beyond it is killed."""
    timeout_s: float
    """Seconds without an answer to a slice after which it is killed."""

    @property
    def name(self) -> str:
        """For notes on what died under them."""
        return f"{self.memory_bytes}-{self.timeout_s:g}"


class EngineProcess:
    """Starts when it is first needed, and anew after each death."""

    def __init__(self, work: Work, limits: Limits) -> None:
        self._work, self._limits = work, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Any = None
        self.opening_s = 0.0
        """Seconds spent on opening engines so far."""

    def compute(self, items: list[str]) -> Sequence[Any]:
        """The items' values, in order.

        Raises:
            Death: the process died of them, or was killed for its memory or its time.
            RaptideError: the engine cannot be opened at all.
        """
        if self._process is None:
            self._open()
        found: list[Any] = [None] * len(items)
        try:
            self._connection.send(items)
            while True:
                kind, said = self._next(self._limits.timeout_s)
                if kind == child.DONE:
                    return found
                if kind == child.FAILED:
                    raise self._kill(f"failed: {said}")  # its device may be of no use any more
                for place, value in zip(said[0], said[1], strict=True):
                    found[place] = value
        except (EOFError, ConnectionError, BrokenPipeError):
            raise Death(self._bury()) from None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._bury()

    def _open(self) -> None:
        began = time.monotonic()
        for _ in range(STARTS):
            self._start()
            try:
                self._connection.send((self._work, self._limits.threads))
                kind, said = self._next(float("inf"))
            except (EOFError, ConnectionError):
                reason = self._bury()
            except Death as death:
                reason = str(death)
            else:
                if kind == child.REFUSED:
                    self.close()
                    raise said
                self.opening_s += time.monotonic() - began
                return
        raise RaptideError(
            f"The engine's process dies while it opens the model ({reason}); give it more memory "
            "(--memory-gb), or look at what it printed with --verbose."
        )

    def _start(self) -> None:
        here, there = socket.socketpair()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-m", child.__name__, str(there.fileno())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OMP_NUM_THREADS": str(self._limits.threads),
                },
            )
        self._connection = Connection(here.detach())

    def _next(self, timeout_s: float) -> tuple[str, Any]:
        """What the process says next; it is killed where that takes too much time or memory."""
        assert self._process is not None
        memory = psutil.Process(self._process.pid)
        began = time.monotonic()
        while not self._connection.poll(LOOK_S):
            if time.monotonic() - began > timeout_s:
                raise self._kill(f"timed out: took longer than {timeout_s:g} s")
            try:
                used = memory.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            if used > self._limits.memory_bytes:
                most = self._limits.memory_bytes / 1e9
                raise self._kill(f"out of memory: needed more than {most:.1f} GB")
        return self._connection.recv()

    def _kill(self, reason: str) -> Death:
        self.close()
        return Death(reason)

    def _bury(self) -> str:
        """Forget the process that is dead, or about to be, and say what it died of."""
        assert self._process is not None
        code = self._process.wait()
        self._connection.close()
        self._process = None
        if code >= 0:
            return f"killed its process: exit code {code}"
        return f"killed its process: {signal.Signals(-code).name}"
