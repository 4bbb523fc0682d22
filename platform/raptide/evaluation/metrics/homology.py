"""Remote homology by search: whether a domain's nearest neighbours share its fold.

Every domain is a query against all others. At a *level*, a positive shares the query's outer group
(fold) but not its inner one (superfamily); domains of the inner group, the query among them, leave
the ranking, so that close relatives help nobody. Queries without a positive are none.

    Hit-10   whether a positive is among the ten nearest. Ties are broken against it, and what has
             no similarity at all (-inf) is not found.
    AUC      area under the ROC curve of the query's ranking; ties count half. Its mean is that over
             queries.

Shape letters: N domains, B queries of a block, D width of vectors, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

HITS = 10

NEIGHBOURS = 64
"""Kept of each query for `control`: ten, and those that a shuffled label may take away."""

VECTORS_BYTES = 64 << 20
"""Of a block of vectors, of which two are held at once."""

SIMILARITIES_BYTES = 128 << 20
"""Of a block of similarities."""

Blocks = Iterable[tuple[int, np.ndarray]]
"""A block's first query, and its similarities to all, [B, N]."""


@dataclass(frozen=True)
class Level:
    """Groups by which neighbours are judged."""

    outer: np.ndarray
    """What a positive shares with the query, [N] int64."""
    inner: np.ndarray
    """What leaves the ranking when shared, [N] int64; each lies within one of `outer`."""
    kept: np.ndarray
    """Whether a domain takes part, as query and as neighbour, [N] bool."""

    @property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """How many positives and how many others each query's ranking holds, [N] int64 each; 0 and
        0 for those that take no part."""
        outer = np.bincount(self.outer[self.kept], minlength=self.outer.max() + 1)[self.outer]
        inner = np.bincount(self.inner[self.kept], minlength=self.inner.max() + 1)[self.inner]
        positives = np.where(self.kept, outer - inner, 0)
        return positives, np.where(self.kept, self.kept.sum() - outer, 0)

    @property
    def queries(self) -> np.ndarray:
        """Which domains have a positive, [N] bool."""
        return self.sizes[0] > 0


@dataclass(frozen=True)
class Found:
    """What was found at a level, of each of its queries, in the order of domains."""

    hits: np.ndarray
    """1 where a positive is among the ten nearest, else 0; [queries] float64."""
    areas: np.ndarray
    """AUC, [queries] float64; NaN where a ranking holds positives alone."""


def level_of(outer: Sequence[str], inner: Sequence[str], kept: np.ndarray | None = None) -> Level:
    """A level by the names of groups."""
    kept = np.ones(len(outer), bool) if kept is None else kept
    outers, inners = (np.unique(names, return_inverse=True)[1] for names in (outer, inner))
    return Level(outers, inners, kept)


def cosines(vector: Callable[[int], np.ndarray], number: int) -> Iterator[tuple[int, np.ndarray]]:
    """Cosines of all to all, by blocks in float64; a vector of zeros is at 0 from everything.

    Args:
        vector: the vector of a domain, [D]; asked again for every block that it meets, so that
            never more than two blocks of vectors are held.
        number: N.
    """
    width = len(vector(0))
    rows = max(1, min(VECTORS_BYTES // (8 * width), number))
    queries = max(1, min(SIMILARITIES_BYTES // (8 * number), rows))

    @lru_cache(maxsize=1)
    def load(first: int) -> np.ndarray:
        return _units(vector, first, min(first + rows, number), width)

    for first in range(0, number, queries):
        last = min(first + queries, number)
        mine = load(0)[first:last] if rows == number else _units(vector, first, last, width)
        block = np.empty((last - first, number))
        for other in range(0, number, rows):
            np.matmul(mine, load(other).T, out=block[:, other : other + rows])
        yield first, block


def search(
    blocks: Blocks, levels: Sequence[Level], number: int
) -> tuple[list[Found], np.ndarray, np.ndarray]:
    """Judge each query's ranking at each level.

    Returns:
        What was found at each level; each domain's K most similar, itself left out, the most
        similar first, [N, K] int64; and whether they have a similarity at all, [N, K] bool.
    """
    marks = np.full((len(levels), number, 2), np.nan)
    asked = [level.queries for level in levels]
    depth = min(NEIGHBOURS, number - 1)
    near = np.zeros((number, depth), np.int64)
    real = np.zeros((number, depth), bool)
    for first, block in blocks:
        for query, row in enumerate(block, first):
            similarities = np.where(np.isnan(row), -np.inf, row)
            for level, queries, mark in zip(levels, asked, marks, strict=True):
                if queries[query]:
                    mark[query] = judge(similarities, level, query)
            near[query] = _nearest(similarities, query, depth)
            real[query] = similarities[near[query]] > -np.inf
    found = [
        Found(mark[queries, 0], mark[queries, 1])
        for queries, mark in zip(asked, marks, strict=True)
    ]
    return found, near, real


def judge(similarities: np.ndarray, level: Level, query: int) -> tuple[float, float]:
    """Whether a query hits (1 or 0), and its AUC, given its similarities [N] and some positive."""
    ranked = level.kept & (level.inner != level.inner[query])
    shares = level.outer == level.outer[query]
    positives = similarities[ranked & shares]
    others = np.sort(similarities[ranked & ~shares])
    best = positives.max()
    before = len(others) - np.searchsorted(others, best, side="left")
    hit = float(best > -np.inf and before < HITS)
    if not len(others):
        return hit, float("nan")
    below = np.searchsorted(others, positives, side="left")
    upto = np.searchsorted(others, positives, side="right")
    return hit, float((below + upto).mean() / (2 * len(others)))


def control(
    near: np.ndarray, real: np.ndarray, level: Level, shuffles: int, seed: int
) -> np.ndarray:
    """Hit-10 where the labels are shuffled over domains, for each shuffle, [shuffles] float64.

    Of each query the `near` are looked at, which are enough unless an inner group is a great part
    of all; then it comes out too low.
    """
    kept = np.flatnonzero(level.kept)
    generator = np.random.Philox(key=[seed, len(kept)])
    values = np.empty(shuffles)
    for i in range(shuffles):
        order = np.argsort(generator.random_raw(len(kept)), kind="stable")
        outer, inner = level.outer.copy(), level.inner.copy()
        outer[kept], inner[kept] = outer[kept[order]], inner[kept[order]]
        shuffled = Level(outer, inner, level.kept)
        queries = np.flatnonzero(shuffled.queries)
        ranked = level.kept[near[queries]] & (inner[near[queries]] != inner[queries, None])
        first = ranked & (np.cumsum(ranked, axis=1) <= HITS) & real[queries]
        values[i] = (first & (outer[near[queries]] == outer[queries, None])).any(axis=1).mean()
    return values


def chance(level: Level) -> float:
    """Hit-10 of rankings that know nothing, by the sizes of groups: the mean over queries of the
    probability that ten drawn without replacement hold a positive."""
    positives, others = (sizes[level.queries].astype(np.float64) for sizes in level.sizes)
    missed = np.ones(len(positives))
    for drawn in range(HITS):
        missed *= np.clip((others - drawn) / np.maximum(positives + others - drawn, 1), 0, 1)
    return float(1 - missed.mean())


def _units(vector: Callable[[int], np.ndarray], first: int, last: int, width: int) -> np.ndarray:
    """Vectors of length 1, [last - first, D] float64."""
    found = np.empty((last - first, width))
    for row in range(first, last):
        found[row - first] = vector(row)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return np.divide(found, lengths, out=np.zeros_like(found), where=lengths != 0)


def _nearest(similarities: np.ndarray, query: int, depth: int) -> np.ndarray:
    """The `depth` most similar to a query but itself, the most similar first, [depth] int64."""
    others = -similarities
    others[query] = np.nan  # sorted last, after what has no similarity
    chosen = np.argpartition(others, depth)[:depth]
    return chosen[np.argsort(others[chosen], kind="stable")]
