"""What the distance in sequence tells of contacts: their baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from raptide.evaluation.requests import Kind, Readings, Request
from raptide.evaluation.subjects.subject import Ask

PRIOR_PAIRS = 1000
"""Pairs of the mean frequency that are added to each separation's: the largest are seldom seen."""


class Separation:
    """Scores pairs by how often pairs as far apart touch.

    Args:
        maps: contact maps [L, L] of known chains, NaN where unknown; passed through once.
    """

    name = "separation"
    baseline = True
    layers = 0
    kinds: frozenset[Kind] = frozenset({"contacts"})

    def __init__(self, maps: Iterable[np.ndarray]) -> None:
        pairs, touching = np.zeros(0), np.zeros(0)
        for contacts in maps:
            i, j = np.nonzero(np.triu(~np.isnan(contacts), 1))
            size = max(len(contacts), len(pairs))
            pairs = _longer(pairs, size) + np.bincount(j - i, minlength=size)
            touching = _longer(touching, size) + np.bincount(j - i, contacts[i, j], minlength=size)
        mean = touching.sum() / max(pairs.sum(), 1)
        shares = (touching + PRIOR_PAIRS * mean) / (pairs + PRIOR_PAIRS)
        self.frequencies = np.append(shares, mean).astype(np.float32)
        """By separation, and of all beyond those that were seen."""
        self.digest = hashlib.sha256(self.frequencies.tobytes()).hexdigest()[:16]

    @contextmanager
    def read(self, ask: Ask) -> Iterator[Readings]:
        """Nothing is kept; arrays are made when they are asked for."""
        yield self

    def get(self, request: Request) -> np.ndarray:
        """Frequencies, [L, L] fp32."""
        if request.reading.kind not in self.kinds:
            raise KeyError(request)
        places = np.arange(len(request.sequence))
        apart = np.abs(places[:, None] - places[None])
        return self.frequencies[np.minimum(apart, len(self.frequencies) - 1)]


def _longer(counts: np.ndarray, size: int) -> np.ndarray:
    return np.pad(counts, (0, size - len(counts)))
