"""Answers that may be asked for again, in bounded memory; the least recently used go first."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from serve.calls import Ask, Done


class Cache:
    """Arrays by (weights, what was asked, sequence). Nothing is kept of the sequence but a hash.

    Args:
        max_bytes: of the arrays; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._kept: OrderedDict[bytes, Done] = OrderedDict()

    def get(self, key: bytes) -> Done | None:
        done = self._kept.get(key)
        if done is not None:
            self._kept.move_to_end(key)
        return done

    def put(self, key: bytes, done: Done) -> None:
        size = _size(done)
        if size > self.max_bytes // 4 or key in self._kept:
            return
        self._kept[key] = done
        self.held_bytes += size
        while self.held_bytes > self.max_bytes:
            _, gone = self._kept.popitem(last=False)
            self.held_bytes -= _size(gone)


def cache_key(model: str, weights: str, ask: Ask, sequence: str, variants: list[str]) -> bytes:
    """A hash over everything the answer depends on."""
    text = "\n".join([model, weights, repr(ask), sequence, *variants])
    return hashlib.sha256(text.encode()).digest()


def _size(done: Done) -> int:
    return 200 + sum(array.nbytes for array in done.arrays)
