"""Answers on disk: one flat file of numbers, and where each answer lies in it."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

import numpy as np

from raptide.evaluation.requests import Request
from raptide.evaluation.subjects.items import Item, stored_shape


class Store:
    """Answers to all requests of some items. Memory holds where they lie, not what they are."""

    def __init__(self, path: Path, items: Iterable[Item], width: int) -> None:
        self._width = width
        self._starts: dict[bytes, int] = {}
        place = 0
        for item in items:
            for request in item.requests():
                self._starts[request.key] = place
                place += prod(stored_shape(request, width))
        self._flat = np.memmap(path, np.float32, "r", shape=(place,)) if place else np.empty(0)

    def get(self, request: Request) -> np.ndarray:
        """The answer to a request; see evaluation/requests.py.

        Raises:
            KeyError: it was not asked.
        """
        shape = stored_shape(request, self._width)
        start = self._starts[request.key]
        found = np.asarray(self._flat[start : start + prod(shape)]).reshape(shape)
        return found if request.reading.kind != "contacts" else _whole(found, len(request.sequence))


def _whole(triangle: np.ndarray, length: int) -> np.ndarray:
    """The symmetric matrix of an upper triangle, its diagonal 0."""
    whole = np.zeros((length, length), np.float32)
    whole[np.triu_indices(length, 1)] = triangle
    return whole + whole.T


def write_values(path: Path, values: Iterable[np.ndarray]) -> None:
    """Write the numbers of all items, in order."""
    with path.open("wb") as file:
        for each in values:
            file.write(np.ascontiguousarray(each, np.float32).data)
