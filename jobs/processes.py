"""Child processes that never outlive their parent, and ports for them."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
STOP_S = 30.0
"""Seconds a child gets to shut down before it is killed."""


@contextmanager
def no_orphans() -> Iterator[None]:
    """Whatever is started inside, by whomever, is gone afterwards.

    Ray's servers outlive the process that started them for a moment. On Linux they are handed to
    this process (it becomes a subreaper) instead of to init, so it can find and end them.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        # An impatient second Ctrl-C must not stop this.
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
        _end(psutil.Process().children(recursive=True), first_wait_s=5.0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def running(
    command: Sequence[str], *, log: Path | None = None, **env: str
) -> Iterator[subprocess.Popen]:
    """A child process for the length of the block; stopped with SIGINT, then killed.

    Args:
        log: file for its output; None shares the terminal.
        env: added to the environment.
    """
    with open(log or os.devnull, "wb") as file:
        output = file if log else None
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | env,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def run(command: Sequence[str]) -> int:
    """Run a command to its end; returns its exit code."""
    with running(command) as process:
        return process.wait()


def _end(processes: list[psutil.Process], first_wait_s: float) -> None:
    """Let processes that are ending end; terminate, then kill the rest."""
    _, alive = psutil.wait_procs(processes, timeout=first_wait_s if processes else 0)
    for stop in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            try:
                stop(process)
            except psutil.NoSuchProcess:
                continue
        _, alive = psutil.wait_procs(alive, timeout=5.0)


def free_port() -> int:
    """A port for a server that is about to start, which nobody takes before it does.

    It lies below those that Linux gives to connections, above those of Ray's workers, and apart
    from those of Serve's HAProxy mode.
    """
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(20_000, 30_000)))
            return probe.getsockname()[1]
