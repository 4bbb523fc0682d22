"""Arrays out of the messages of a stream, for clients in Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np


def join_arrays(messages: Iterable[Any]) -> Iterator[np.ndarray]:
    """Each array of a stream of `Arrays`, fp32, in the order of the request.

    Raises:
        ValueError: the stream ends, or goes on with another array, in the middle of one.
    """
    array, filled = np.empty(0, np.float32), 0
    for part in (part for message in messages for part in message.arrays):
        if part.offset != filled % max(1, array.size):
            raise ValueError(f"Array {part.index} goes on at {part.offset}, not at {filled}.")
        if part.offset == 0:
            array, filled = np.empty(tuple(part.shape), np.float32), 0
        values = np.frombuffer(part.values, "<f4")
        array.reshape(-1)[filled : filled + len(values)] = values
        filled += len(values)
        if filled == array.size:
            yield array
    if filled < array.size:
        raise ValueError("The stream ended in the middle of an array.")
