"""The C library's heap in processes that live for weeks."""

from __future__ import annotations

import ctypes

TRIM_EVERY = 200
"""Rounds between two returns of free memory to the system."""


def trim_heap(done: int) -> None:
    """If it is due after so many rounds, give pages that nobody uses back to the system.

    What a round needs differs in size, so holes stay between what lives on, and now and then the
    next piece fits none of them: the heap creeps up by some MB in 1,000 rounds. It takes a few
    milliseconds. Elsewhere than on Linux's usual C library nothing is done.
    """
    if done % TRIM_EVERY == 0:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
