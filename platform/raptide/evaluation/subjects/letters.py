"""Letters and nothing else: the subject behind one-hot regression on variants."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from raptide.evaluation.requests import Kind, Readings, Request
from raptide.evaluation.subjects.subject import Ask


class OneHotLetters:
    """Each letter is a direction of its own; a protein is its letters, place by place."""

    name = "one-hot"
    digest = hashlib.sha256(b"one-hot letters").hexdigest()
    baseline = True
    layers = 0
    kinds: frozenset[Kind] = frozenset({"letters"})

    @contextmanager
    def read(self, ask: Ask) -> Iterator[Readings]:
        yield self

    def get(self, request: Request) -> np.ndarray:
        if request.reading.kind not in self.kinds:
            raise KeyError(request)
        return np.eye(20, dtype=np.float32)
