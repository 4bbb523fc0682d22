"""Trouble that is seen early: losses that are no numbers, spikes, ranks that hang."""

from __future__ import annotations

import faulthandler
import math
import os
import statistics
from collections import deque
from contextlib import suppress
from pathlib import Path

from raptide.errors import TrainingDiverged
from raptide.training.step import StepResult

HANGS = "hangs"

WINDOW, LEAST = 64, 16
"""Losses that a new one is compared with, and how many there must be."""

SPIKE = 10.0
"""Deviations from the median of the window at which a loss is a spike, and the smallest deviation
that is reckoned with: five percent of a nat."""

LEAST_DEVIATION = 0.05


SCALES = 20
"""Steps in a row that fp16 may leave out: DeepSpeed begins at 2^16, and halves."""


class LossWatch:
    """Looks at the loss and the gradients of each step; the same on every rank."""

    def __init__(self, max_nonfinite_steps: int, *, scales_loss: bool = False) -> None:
        """
        Args:
            scales_loss: steps are left out until the scale of the loss is found, as in fp16; such
                are counted, and end nothing unless there are too many in a row for that.
        """
        self._to_find_scale = SCALES if scales_loss else 0
        self._max_nonfinite_steps = max_nonfinite_steps
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.nonfinite_steps = 0
        """Steps in a row, up to the last, with a loss or a gradient that is NaN or infinite."""
        self.skipped = 0
        """Steps since the workers have started whose gradients were NaN or infinite."""
        self._skipped_in_a_row = 0
        self._last: StepResult | None = None
        self.spikes = 0
        """Spikes since the workers have started."""

    def see(self, result: StepResult) -> bool:
        """Take one step into account; whether its loss is a spike.

        A spike lies ten median absolute deviations above the median of the last 64 losses. It is
        reported, not acted upon.
        """
        self._last = result
        self.skipped += result.skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        if result.left_out or self._skipped_in_a_row > self._to_find_scale:
            self.nonfinite_steps += 1
            return False
        self.nonfinite_steps = 0
        spiked = len(self._recent) >= LEAST and result.loss > self._limit()
        self.spikes += spiked
        self._recent.append(result.loss)
        return spiked

    def _limit(self) -> float:
        middle = statistics.median(self._recent)
        deviation = statistics.median(abs(loss - middle) for loss in self._recent)
        return middle + SPIKE * max(deviation, LEAST_DEVIATION)

    def refuse_divergence(self, step: int, *, last: bool) -> None:
        """
        Raises:
            TrainingDiverged: too many steps in a row had losses or gradients that are no numbers,
                or nothing of the last one's loss is a number.
        """
        streak = self.nonfinite_steps
        lost = self._last is not None and math.isnan(self._last.loss)
        if streak >= self._max_nonfinite_steps or (last and lost):
            raise TrainingDiverged(
                f"The loss or a gradient was NaN or infinite in {streak} steps in a row, up to "
                f"step {step}; resume from the last checkpoint with a lower optimizer.lr or a "
                "longer warm-up."
            )


class HangWatch:
    """Writes the stacks of all threads to a file and ends the process if nothing goes on.

    It works on even where a thread hangs in native code and holds Python's lock. When one rank
    hangs the others soon wait for it, so every rank that can write leaves its stacks.
    """

    def __init__(self, run: Path, rank: int, attempt: int, timeout_s: float) -> None:
        self._path = run / HANGS / f"attempt-{attempt:03d}-rank-{rank:05d}.txt"
        try:
            self._path.parent.mkdir(exist_ok=True)
            self._file = self._path.open("w")
        except OSError:  # a full disk: then they go where all else that is said goes
            self._file = os.fdopen(os.dup(2), "w")
        self._timeout_s = timeout_s
        self.progress()

    def progress(self, longer_s: float = 0.0) -> None:
        """Something went on: start to count anew.

        Args:
            longer_s: seconds that what comes now may take besides.
        """
        faulthandler.dump_traceback_later(self._timeout_s + longer_s, exit=True, file=self._file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        with suppress(OSError):
            if self._path.stat().st_size == 0:
                self._path.unlink()


def describe_hang(run: Path, attempt: int) -> str | None:
    """One sentence if ranks of an earlier attempt hung, else None."""
    hung = []
    for file in sorted((run / HANGS).glob(f"attempt-{attempt:03d}-rank-*.txt")):
        if file.stat().st_size:
            hung.append(file)
        else:  # its worker was killed
            file.unlink()
    if not hung:
        return None
    return (
        f"{len(hung)} workers stood still and were ended; {hung[0].parent} holds the stacks of "
        f"attempt {attempt}: look for the rank that does not wait for the others."
    )
