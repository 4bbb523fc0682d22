"""The engine's process: computes what comes over a connection, until it is told to end or dies.

    python -m raptide.bulk.child DESCRIPTOR

Items are computed in slices, the longest first, and each slice is answered at once: so that whoever
waits sees progress, and memory is needed most at the beginning.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from raptide.bulk.work import Work
from raptide.errors import RaptideError
from raptide.inference.batching import plan_batches

SLICE_TOKENS = 1 << 16
"""Tokens that are computed between two answers; a record of more is a slice alone."""

READY, VALUES, DONE, FAILED, REFUSED = "ready", "values", "done", "failed", "refused"


def main() -> None:
    _die_with(os.getppid())
    _die_first()
    connection = Connection(int(sys.argv[1]))
    work: Work
    work, threads = connection.recv()
    try:
        compute = work.open(threads)
    except RaptideError as error:
        connection.send((REFUSED, error))
        return
    connection.send((READY, None))
    while (items := connection.recv()) is not None:
        try:
            for places in slices(work, items):
                connection.send((VALUES, (places, compute([items[i] for i in places]))))
        except Exception as error:
            # What it says may hold letters of a protein; its kind does not.
            connection.send((FAILED, f"{type(error).__name__} at {_place(error)}"))
        else:
            connection.send((DONE, None))


def slices(work: Work, items: list[str]) -> Iterator[list[int]]:
    """Indices of items, slice by slice; the same for the same items."""
    if hasattr(work, "slices"):  # it knows what items share
        yield from work.slices(items, SLICE_TOKENS)
        return
    costs = work.tokens(np.array([len(item) for item in items], np.int64)).tolist()
    yield from plan_batches(costs, SLICE_TOKENS)


def _die_with(parent: int) -> None:
    """End as soon as the process that waits has died, even in the midst of a long computation."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _die_first() -> None:
    """Where memory runs out, Linux kills this process and not the one that knows what to do."""
    with contextlib.suppress(OSError):  # not on this system
        Path("/proc/self/oom_score_adj").write_text("1000")


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


if __name__ == "__main__":
    main()
