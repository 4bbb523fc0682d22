"""Batches side by side: on CPUs, small matrix products hardly spread over threads.

A batch in a lane is computed by one thread, or by as many as products of the model's size keep
busy; two batches side by side on two cores take less time than one after the other on both. What
cannot be shared out, such as a lone sequence, is computed by all threads as ever.

Engines of one size share their lanes, whoever calls them. A lane of one thread forms no team, so
the team of all threads keeps spinning while it waits: OpenMP stops that once there are teams of
more threads than cores.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from raptide.model.device import CPU_SIZES

LEAST_TOKENS = CPU_SIZES[0]
"""Of a batch in a lane: what goes through a layer at once."""

TEAM_GAIN, TEAM_MOST = 0.85, 8
"""A pass by the threads of n lanes is TEAM_GAIN * n times as fast as in one: on two cores 0.7 was
measured with matrix units, 0.95 without. More than TEAM_MOST lanes are taken to make it no faster:
64 rows of a product for each."""

AHEAD = 2
"""Batches a lane that are drawn before the first of them is done: some take longer than others."""

T = TypeVar("T")
R = TypeVar("R")


class Lanes:
    """How the batches of one model are shared out; threads may share it."""

    def __init__(self, threads_each: int | None) -> None:
        """
        Args:
            threads_each: of a lane; None for a device that computes one batch after the other.
        """
        self._threads_each = threads_each

    @property
    def count(self) -> int:
        """Lanes that the calling thread may fill: it decides how many threads there are."""
        if self._threads_each is None or _bound():
            return 1
        with _lock:  # while lanes start, a thread's first question would get theirs for good
            return max(1, torch.get_num_threads() // self._threads_each)

    def worth(self, longest: int, total: int) -> int:
        """How many lanes so many tokens are worth; 1 where all threads do better together.

        Args:
            longest: tokens of the longest sequence, which is never cut.
            total: tokens of all.
        """
        count = self.count
        lanes = min(count, total // LEAST_TOKENS)
        together = total / (TEAM_GAIN * min(count, TEAM_MOST))
        return 1 if lanes < 2 or max(longest, total / lanes) > together else lanes

    def map(self, compute: Callable[[T], R], batches: Iterable[T], lanes: int) -> Iterator[R]:
        """What is computed of each batch, in order; batches are drawn as lanes come free."""
        if lanes == 1:
            yield from map(compute, batches)
            return
        assert self._threads_each is not None
        pool = _pool(self.count, self._threads_each)
        ahead: deque[Future[R]] = deque()
        try:
            for batch in batches:
                ahead.append(pool.submit(compute, batch))
                if len(ahead) > AHEAD * lanes:
                    yield ahead[0].result()
                    ahead.popleft()
            while ahead:
                yield ahead[0].result()
                ahead.popleft()
        finally:
            for future in ahead:
                future.cancel()
            wait(ahead)


def _bound() -> bool:
    """Whether OpenMP binds threads to cores: it has bound this one to its first, and Python's
    threads, which are not OpenMP's, with it."""
    said = os.environ.get("OMP_PROC_BIND", "false").lower()
    return said != "false" or "OMP_PLACES" in os.environ or "GOMP_CPU_AFFINITY" in os.environ


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_lock = threading.Lock()


def _pool(lanes: int, threads_each: int) -> ThreadPoolExecutor:
    """Threads that stay, each with its own number of threads to compute with."""
    with _lock:
        if (lanes, threads_each) not in _pools:
            _pools[lanes, threads_each] = _start(lanes, threads_each)
        return _pools[lanes, threads_each]


def _start(lanes: int, threads_each: int) -> ThreadPoolExecutor:
    all_threads = torch.get_num_threads()
    ready = threading.Barrier(lanes + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first question puts the process's number in its place
        torch.set_num_threads(threads_each)
        ready.wait()

    pool = ThreadPoolExecutor(lanes, "raptide-lane", initializer=begin)
    try:
        for _ in range(lanes):
            pool.submit(int)  # a thread starts when something is asked of it
        ready.wait()
    except BaseException:  # no more threads may be had
        ready.abort()
        pool.shutdown(wait=False)
        raise
    finally:
        torch.set_num_threads(all_threads)  # threads to come begin with what was said last
    return pool


def _forget() -> None:
    global _lock
    _pools.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)  # a child has none of its parent's threads
