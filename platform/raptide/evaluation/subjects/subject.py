"""What a subject is: something that tasks can ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from raptide.evaluation.requests import Kind, Readings, Request

Ask = Callable[[], Iterator[Request]]
"""All requests to a subject, in the same order at each call; may hold some twice."""


class Subject(Protocol):
    """A model, or a baseline."""

    @property
    def name(self) -> str:
        """As rows call it: `runs/demo`, `random-weights`, `one-hot`, ..."""

    @property
    def digest(self) -> str:
        """Hex digits that stand for all its numbers depend on: weights and dtype, counts."""

    @property
    def baseline(self) -> bool: ...

    @property
    def layers(self) -> int:
        """Of the model; 0 for what has none."""

    @property
    def kinds(self) -> frozenset[Kind]:
        """What can be read off it."""

    def read(self, ask: Ask) -> AbstractContextManager[Readings]:
        """Read all that is asked; what is kept on disk for it is gone after the block."""
