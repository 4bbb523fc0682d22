"""All that is asked of one sequence, as one item for the engine, and how its numbers lie.

Shape letters: see evaluation/requests.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from raptide.alphabet import STANDARD
from raptide.evaluation.masks import choose_residues
from raptide.evaluation.requests import Reading, Request

EMBEDDED = ("residues", "mean", "sites")
"""Kinds that are read off the same pass, whatever the layer."""


@dataclass(frozen=True)
class Item:
    """A sequence and what is read off the model for it, each once, in the order it was asked."""

    sequence: str
    wants: tuple[tuple[Reading, tuple[int, ...]], ...]

    def write(self) -> str:
        return json.dumps([self.sequence, self.wants], separators=(",", ":"))

    @classmethod
    def read(cls, text: str) -> Item:
        sequence, wants = json.loads(text)
        return cls(sequence, tuple((Reading(*reading), tuple(places)) for reading, places in wants))

    def requests(self) -> list[Request]:
        return [Request(reading, self.sequence, places) for reading, places in self.wants]

    @property
    def tokens(self) -> int:
        """That are computed; maps of attention cost as if they were some passes."""
        length = len(self.sequence) + 2
        total = length * any(reading.kind in EMBEDDED for reading, _ in self.wants)
        total += length * any(reading.kind == "masked" for reading, _ in self.wants)
        for reading, places in self.wants:
            total += length * _passes(reading, len(self.sequence), len(places))
        return max(total, 1)

    def floats(self, width: int) -> int:
        """Numbers of all answers."""
        return sum(prod(stored_shape(request, width)) for request in self.requests())


def _passes(reading: Reading, length: int, places: int) -> int:
    if reading.kind == "contacts":
        return 4 + length // 128
    if reading.kind == "pseudo":
        return length
    if reading.kind == "marginals" and reading.method == "masked-marginals":
        return places
    return 1 if reading.kind == "marginals" else 0


def stored_shape(request: Request, width: int) -> tuple[int, ...]:
    """Shape of an answer as it is kept; of contacts the upper triangle alone.

    Args:
        width: of the model's vectors.
    """
    length, places = len(request.sequence), len(request.places)
    match request.reading.kind:
        case "residues":
            return (length, width)
        case "mean":
            return (width,)
        case "sites":
            return (places, width)
        case "contacts":
            return (length * (length - 1) // 2,)
        case "masked":
            return (len(choose_residues(request.sequence).places), 2)
        case "marginals":
            return (places, len(STANDARD))
        case "pseudo":
            return (1,)
        case "letters":
            return (len(STANDARD), width)
    raise AssertionError(f"no model answers {request.reading.kind}")


def gather(requests: Iterable[Request]) -> list[Item]:
    """Requests by sequence, each once, so that a protein passes the model once for all of them."""
    wanted: dict[str, dict[tuple[Reading, tuple[int, ...]], None]] = {}
    for reading, sequence, places in requests:
        wanted.setdefault(sequence, {})[reading, places] = None
    return [Item(sequence, tuple(wants)) for sequence, wants in wanted.items()]
