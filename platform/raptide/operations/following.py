"""A job's output as it comes, until the job has ended, whatever becomes of the line in between.

The log is a courtesy and may break off; what a job has come to is its status, and that alone ends
the following.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TextIO

import aiohttp

from raptide.errors import ClusterError
from raptide.operations.submission import Job, job_of_id

LOOK_EVERY_S = 5.0
"""Seconds between two looks at the status while nothing comes."""

LAST_LINES_S = 10.0
"""Seconds that the last lines may take once the job has ended."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0

FORGOTTEN = 3
"""Answers in a row that there is no such job after which it is believed: a head that starts anew
answers before it has read what it knew."""

NOISE = re.compile(r"Running entrypoint for job |\S+ \S+\tINFO job_manager\.py")
PROGRESS = re.compile(r"  .*: step \d+/\d+")
TROUBLE = ("error: ", "Warning: ")

GONE = (OSError, RuntimeError, aiohttp.ClientError)
"""What a line that is gone raises."""


@dataclass
class Place:
    """How far a log was shown, over all connections; each begins at its first character."""

    shown: int = 0
    read: int = 0

    def fresh(self, text: str) -> str:
        new = text[max(0, self.shown - self.read) :]
        self.read += len(text)
        self.shown = max(self.shown, self.read)
        return new


class JobOutput:
    """Prints a job's log as the job would have printed it here.

    Its progress line is redrawn in place on a terminal; errors and warnings go to stderr.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._rest = ""
        self._redrawing = False
        self.place = Place()

    def feed(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._print(line.rpartition("\r")[2] or line)

    def say(self, sentence: str) -> None:
        """Something of our own."""
        self._end_redrawing()
        print(sentence, file=self._err, flush=True)

    def close(self) -> None:
        if self._rest:
            self._print(self._rest)
        self._rest = ""
        self._end_redrawing()

    def _print(self, line: str) -> None:
        if NOISE.match(line):
            return
        if PROGRESS.match(line):
            if self._err.isatty():
                print(f"\r\x1b[K{line}", end="", file=self._err, flush=True)
                self._redrawing = True
            else:
                print(line, file=self._err, flush=True)
            return
        self._end_redrawing()
        print(line, file=self._err if line.startswith(TROUBLE) else self._out, flush=True)

    def _end_redrawing(self) -> None:
        if self._redrawing:
            print(file=self._err, flush=True)
        self._redrawing = False


def follow(
    server: Any,
    job: Job,
    output: JobOutput,
    *,
    sleep: Callable[[float], Any] = asyncio.sleep,
    look_every_s: float = LOOK_EVERY_S,
) -> Job:
    """Show a job's output until it has ended; returns it as it is then.

    Args:
        server: of `connect`; reached again and again where it is gone.
        sleep: awaited between two tries.

    Raises:
        ClusterError: the server knows the job no more.
    """
    return asyncio.run(_follow(server, job, output, sleep, look_every_s))


async def _follow(
    server: Any, job: Job, output: JobOutput, sleep: Callable[[float], Any], look_every_s: float
) -> Job:
    forgotten, pause_s, gone = 0, FIRST_PAUSE_S, False
    while True:
        try:
            now = await asyncio.to_thread(job_of_id, server, job.id)
            forgotten = forgotten + 1 if now is None else 0
            if forgotten >= FORGOTTEN:
                raise ClusterError(
                    f"The cluster knows no job {job.id} any more, so its head was started anew; "
                    "give the command again: it starts the next attempt."
                )
            if gone and now is not None:
                output.say(f"The cluster answers again: {job.id} is {now.status.lower()}.")
                gone, pause_s = False, FIRST_PAUSE_S
            if now is not None:
                await _show(server, now, output, look_every_s)
                if not now.live:
                    return now
        except GONE as error:
            if not gone:
                reason = " ".join(str(error).split())[:120].rstrip(".") or type(error).__name__
                output.say(
                    f"Warning: The cluster does not answer ({reason}); {job.id} does not need this "
                    "line, which is tried again."
                )
            gone, pause_s = True, min(2 * pause_s, LONGEST_PAUSE_S)
        await sleep(pause_s)


async def _show(server: Any, job: Job, output: JobOutput, look_every_s: float) -> None:
    """Print what the log holds beyond what was shown, until it breaks off or the job has ended."""
    output.place.read = 0
    tail: AsyncIterator[str] = server.tail_job_logs(job.id)
    coming: asyncio.Future[str | None] | None = None
    ended_at: float | None = None if job.live else time.monotonic()
    try:
        while ended_at is None or time.monotonic() - ended_at < LAST_LINES_S:
            coming = coming or asyncio.ensure_future(_next(tail))
            done, _ = await asyncio.wait({coming}, timeout=look_every_s)
            if done:
                text, coming = coming.result(), None
                if text is None:
                    return
                output.feed(output.place.fresh(text))
            elif ended_at is None:
                now = await asyncio.to_thread(job_of_id, server, job.id)
                if now is None or not now.live:
                    ended_at = time.monotonic()
    finally:
        if coming is not None:
            coming.cancel()


async def _next(tail: AsyncIterator[str]) -> str | None:
    return await anext(tail, None)
