"""What the letters around a residue tell: the baseline of tasks on residues."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from raptide.alphabet import FIRST_RESIDUE, NUM_STANDARD, encode_residues
from raptide.evaluation.requests import Kind, Readings, Request
from raptide.evaluation.subjects.subject import Ask

LETTERS = NUM_STANDARD + 1
"""The standard ones, and one for all others and for what lies beyond an end."""


class OneHot:
    """For each residue the letters of a window around it, one feature for each place and letter.

    Args:
        window: residues, an odd number.
    """

    name = "one-hot"
    baseline = True
    layers = 0
    kinds: frozenset[Kind] = frozenset({"residues"})

    def __init__(self, window: int = 15) -> None:
        assert window % 2 == 1
        self.window = window
        self.digest = f"0e{window:02x}"

    @contextmanager
    def read(self, ask: Ask) -> Iterator[Readings]:
        """Nothing is kept; arrays are made when they are asked for."""
        yield self

    def get(self, request: Request) -> np.ndarray:
        """Features of each residue, [L, 21 * window] fp32."""
        if request.reading.kind not in self.kinds:
            raise KeyError(request)
        letters = encode_residues(request.sequence).astype(np.int64) - FIRST_RESIDUE
        letters = np.pad(
            np.minimum(letters, NUM_STANDARD), self.window // 2, constant_values=NUM_STANDARD
        )
        windows = np.lib.stride_tricks.sliding_window_view(letters, self.window)
        return np.eye(LETTERS, dtype=np.float32)[windows].reshape(len(windows), -1)
