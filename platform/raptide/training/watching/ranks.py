"""Which rank holds the others up: seen in the first minutes of a run, when it is cheap to mend.

All ranks leave a step together, so its length says nothing of them; what each needs for its own
forward passes does. Every few seconds a rank sends the mean of that to the run's board, beside the
steps; nothing is exchanged for it between the ranks.
"""

from __future__ import annotations

import socket
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

if TYPE_CHECKING:  # torch would be most of the board's process
    from raptide.training.batches import Share

WATCHED_S = 300.0
"""Seconds from the first step of a group of workers."""

WARM_UP_STEPS = 3
"""First steps that are left out: kernels are chosen and memory is taken then."""

STANDS_OUT = 1.3
"""Times the median of the others from which a rank stands out."""

LOOKS = 3
"""Looks in a row at which it must, so that a moment's load on a node is none."""


@dataclass(frozen=True)
class Slowest:
    """The rank that needs longest for its own work, against the median of the others."""

    rank: int
    where: str
    ratio: float
    stands_out: bool
    """It was the slowest by far, at several looks in a row."""

    @property
    def figure(self) -> str:
        """For the progress line."""
        return f"rank {self.rank} on {self.where} {self.ratio:.1f}x slower"

    @property
    def warning(self) -> str:
        return (
            f"Rank {self.rank} on {self.where} takes {self.ratio:.1f} times as long as the others "
            "for its own part of a step, and all wait for it; look at what else runs there, or "
            "take the node out (jobs/check_cluster.py measures all of them)."
        )


class RankTimes:
    """What the ranks of one group of workers need, and who stands out; lives on the board."""

    def __init__(self) -> None:
        self._attempt = 0
        self._times: dict[int, tuple[str, float]] = {}
        self._in_a_row: dict[int, int] = {}

    def take(self, attempt: int, rank: int, where: str, seconds: float) -> None:
        """
        Args:
            attempt: of the run's workers; a new one begins anew, an earlier one is over.
            where: the rank's node.
            seconds: for each token of its own.
        """
        if attempt < self._attempt:
            return
        if attempt > self._attempt:
            self._attempt, self._times, self._in_a_row = attempt, {}, {}
        self._times[rank] = (where, seconds)

    def slowest(self) -> Slowest | None:
        """At this look; None while there are not two ranks to compare."""
        if len(self._times) < 2:
            return None
        seconds = np.array([each for _, each in self._times.values()])
        others = np.maximum(medians_of_others(seconds), 1e-12)
        ratios = dict(zip(self._times, (seconds / others).tolist(), strict=True))
        for rank, ratio in ratios.items():
            self._in_a_row[rank] = self._in_a_row.get(rank, 0) + 1 if ratio >= STANDS_OUT else 0
        rank = max(ratios, key=lambda each: ratios[each])
        where, _ = self._times[rank]
        return Slowest(rank, where, ratios[rank], self._in_a_row[rank] >= LOOKS)


def medians_of_others(values: np.ndarray) -> np.ndarray:
    """For each of at least two values the median of all the others, [n]; one sort serves all."""
    order = np.argsort(values)
    ranked, count = values[order], len(values)
    places = np.arange(count)
    middle = [ranked[at + (at >= places)] for at in ((count - 2) // 2, (count - 1) // 2)]
    found = np.empty(count)
    found[order] = sum(middle) / 2
    return found


class BoardWatch:
    """One rank's side: sends what its passes take, and hears what the board has for all."""

    def __init__(self, board: Any, rank: int, attempt: int) -> None:
        self._board, self._rank, self._attempt = board, rank, attempt
        self._where = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
        self._began = time.monotonic()
        self._steps = 0
        self._times: list[float] = []
        self._named: set[int] = set()
        self._call: Any = None
        self.leave = False
        """On rank 0: the driver wants the run saved and gone."""

        self.metrics: dict[str, float] = {}
        """On rank 0: of the last look, while ranks are watched."""

    def took(self, forward_s: float, share: Share) -> None:
        """Count a step.

        Args:
            forward_s: seconds of this rank's own forward passes.
        """
        self.hear()
        self._steps += 1
        tokens = sum(len(micro.packed.tokens_T) for micro in share.micro)
        if self._watched and self._steps > WARM_UP_STEPS and tokens:
            self._times.append(forward_s / tokens)

    def look(self) -> None:
        """Every rank calls it in the same step, and none waits: a thousand ranks tell the board at
        once, and all would stand still with rank 0."""
        if self._times:
            # Not the median: a rank that stands still now and then is slow, too.
            mean = statistics.fmean(self._times)
            self._board.took.remote(self._attempt, self._rank, self._where, mean)
            self._times = []
        if self._rank == 0 and self._call is None:
            self._call = self._board.notices.remote()

    def hear(self) -> None:
        """On rank 0: what the board has answered since the last look, once it has."""
        if self._call is None or not ray.wait([self._call], timeout=0)[0]:
            return
        self.leave, slowest = ray.get(self._call)
        self._call = None
        if slowest is None or not self._watched:
            if self.metrics:
                self._board.post.remote({"slowest": None})
            self.metrics = {}
            return
        self.metrics = {
            "speed/slowest_rank": slowest.rank,
            "speed/slowest_rank_ratio": slowest.ratio,
        }
        self._board.post.remote({"slowest": slowest.figure if slowest.stands_out else None})
        if slowest.stands_out and slowest.rank not in self._named:
            self._named.add(slowest.rank)
            self._board.warn.remote(slowest.warning)

    @property
    def _watched(self) -> bool:
        return time.monotonic() - self._began < WATCHED_S
