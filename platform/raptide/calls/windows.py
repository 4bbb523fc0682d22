"""Sequences longer than a model takes, as overlapping windows.

Each window is computed as a sequence of its own, with its own specials, so no residue sees further
than its window. Neighbours overlap by half. Where windows overlap, their numbers are averaged with
weights that fall linearly from a window's middle to its inner ends, where context is cut off:

    |=======----|                 weights of the first window: 1, then falling
          |----===----|           of one in the middle: rising, then falling
                |----=======|     of the last
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from raptide.methods import Pooling

WINDOW_RESIDUES = 1022
"""Residues of a window of a longer sequence: what the published models were trained on."""


@dataclass(frozen=True)
class Window:
    """Residues `start` to `stop` (exclusive) of one sequence."""

    sequence: int
    """Index of the sequence in the call."""

    start: int
    stop: int

    weights: np.ndarray | None
    """[stop - start] fp32; over all windows of a sequence each residue's sum to 1. None means 1."""

    share: float
    """Part of this window in what there is one of per sequence: 1 / number of windows."""


def cut_windows(sequence: int, length: int, limit: float, size: int) -> Iterator[Window]:
    """The windows of a sequence of `length` residues: one if it is within `limit`.

    Args:
        limit: the longest sequence the model takes whole.
        size: residues of a window, at most `limit`; the last ones overlap more, so that all are
            full.
    """
    if length <= limit:
        yield Window(sequence, 0, length, None, 1.0)
        return
    starts = window_starts(length, size)
    raw = [_taper(start, size, length) for start in starts]
    total = np.zeros(length, np.float32)
    for start, weights in zip(starts, raw, strict=True):
        total[start : start + size] += weights
    for start, weights in zip(starts, raw, strict=True):
        stop = start + size
        yield Window(sequence, start, stop, weights / total[start:stop], 1 / len(starts))


def window_starts(length: int, size: int) -> list[int]:
    """Where full windows of `size` begin so that neighbours overlap by at least half."""
    step = max(1, size // 2)
    count = -(-(length - size) // step) + 1
    return [round(i * (length - size) / (count - 1)) for i in range(count)]


def window_around(position: int, length: int, size: int) -> int:
    """Start of the window of `size` that has `position` in its middle, as far as the ends allow."""
    return min(max(0, position - size // 2), max(0, length - size))


def weigh(rows: Any, weights: Any, pooling: Pooling, length: int) -> Any:
    """What a window gives to its sequence's result.

    Args:
        rows: [residues, W, D] of the window, an array of numpy or torch.
        weights: the window's, [residues, 1, 1] of the same kind; None means 1.
        pooling: "mean" over all `length` residues of the sequence, or "residue".

    Returns:
        [W, D], or [W, residues, D].
    """
    if weights is not None:
        rows = rows * weights
    return rows.sum(0) / length if pooling == "mean" else rows.swapaxes(0, 1)


def add_part(
    joined: np.ndarray | None, window: Window, part: np.ndarray, whole: int | None
) -> np.ndarray:
    """The result of one sequence so far, with what one more window gives to it.

    Args:
        joined: what `add_part` returned for the windows before; None at first.
        part: [W, D], or [W, residues, D].
        whole: residues of the sequence where the part has a row for each; else None.

    Returns:
        [W, D], or [W, whole, D] fp32.
    """
    if window.share == 1.0:
        return part
    if joined is None:
        shape = part.shape if whole is None else (part.shape[0], whole, part.shape[2])
        joined = np.zeros(shape, np.float32)
    where = joined if whole is None else joined[:, window.start : window.stop]
    where += part
    return joined


def _taper(start: int, size: int, length: int) -> np.ndarray:
    """Weights before normalisation: 1 in the middle, falling towards cut ends, never 0."""
    ramp = np.arange(1, size + 1, dtype=np.float32) * 2 / (size + 1)
    left = np.ones(size, np.float32) if start == 0 else ramp
    right = np.ones(size, np.float32) if start + size == length else ramp[::-1]
    return np.minimum(np.minimum(left, right), 1)
