"""How well scores order variants: ProteinGym's five metrics, its means over assays, its errors.

Of one assay, as `performance_DMS_benchmarks.py` of ProteinGym v1.3 computes them (Notin et al.,
NeurIPS 2023):

spearman   Pearson's correlation of the ranks; equal values share their mean rank
ndcg       discounted gains of the first tenth by score, over those of the best tenth there is;
           gains are what was measured, from 0 for the worst to 1 for the best. Variants of one
           score are ranked in the order of the rows (ProteinGym leaves that to its sort)
top10      of the variants measured above the 90th percentile, the share scored above theirs
auc        area under the ROC curve for the variants that are fit
mcc        Matthews' correlation of fit with a score at or above the scores' median

Each is computed of draws of variants as weights, all draws at once. Shape letters: b draws, n
variants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from raptide.evaluation.samples import OfCounts, kept

TOP = 10
"""Percent that ndcg and top10 look at."""

CELLS = 1 << 18
"""Weights that are held at once: draws times variants."""


class _Order:
    """Values in rising order: what ranks and quantiles of any draw are read off."""

    def __init__(self, values: np.ndarray) -> None:
        self.by = np.argsort(values, kind="stable")
        self.sorted = values[self.by]
        starts = np.flatnonzero(np.diff(self.sorted, prepend=np.nan) != 0)
        sizes = np.diff(starts, append=len(values))
        self._starts = np.empty(len(values), np.int64)
        self._ends = np.empty(len(values), np.int64)
        """Of each value, where those that equal it begin and end in this order, [n]."""
        self._starts[self.by] = np.repeat(starts, sizes)
        self._ends[self.by] = np.repeat(starts + sizes, sizes)

    def counts(self, weights: np.ndarray) -> np.ndarray:
        """How many are drawn up to each place of this order, [b, n]."""
        return np.cumsum(weights[:, self.by], 1)

    def ranks(self, weights: np.ndarray) -> np.ndarray:
        """Of each value among what is drawn, counted from 1; equal values share their mean."""
        padded = np.pad(self.counts(weights), ((0, 0), (1, 0)))
        return (padded[:, self._starts] + padded[:, self._ends] + 1) / 2

    def quantile(self, weights: np.ndarray, share: float) -> np.ndarray:
        """Of what is drawn, [b], between values as numpy's percentile does by default."""
        counts = self.counts(weights)
        place = (counts[:, -1] - 1) * share
        below = np.floor(place)
        low = self._at(counts, below)
        high = self._at(counts, np.minimum(below + 1, counts[:, -1] - 1))
        part = place - below
        # From the nearer end, as numpy: the last digit decides what counts as above.
        return np.where(part < 0.5, low + (high - low) * part, high - (high - low) * (1 - part))

    def _at(self, counts: np.ndarray, place: np.ndarray) -> np.ndarray:
        return self.sorted[np.minimum((counts <= place[:, None]).sum(1), len(self.sorted) - 1)]


@dataclass(frozen=True)
class _Pair:
    """What was measured of n variants, and their scores."""

    truth: np.ndarray
    scores: np.ndarray
    fit: np.ndarray

    @cached_property
    def by_truth(self) -> _Order:
        return _Order(self.truth)

    @cached_property
    def by_score(self) -> _Order:
        return _Order(self.scores)


def _spearman(pair: _Pair, weights: np.ndarray) -> np.ndarray:
    middle = (weights.sum(1, keepdims=True) + 1) / 2
    x = pair.by_truth.ranks(weights) - middle
    y = pair.by_score.ranks(weights) - middle
    wx = weights * x
    return (wx * y).sum(1) / np.sqrt((wx * x).sum(1) * (weights * y * y).sum(1))


def _ndcg(pair: _Pair, weights: np.ndarray) -> np.ndarray:
    top = np.floor(weights.sum(1) * (TOP / 100)).astype(int)
    discounts = np.cumsum(1 / np.log2(np.arange(1, top.max(initial=0) + 1) + 1))
    discounts = np.concatenate([[0.0], discounts])
    drawn = weights > 0
    worst = np.where(drawn, pair.truth, np.inf).min(1)
    spread = np.where(drawn, pair.truth, -np.inf).max(1) - worst

    def gain(falling: np.ndarray) -> np.ndarray:
        """Of the first `top` places when variants stand in this order."""
        counts = np.cumsum(weights[:, falling], 1).astype(int)
        shares = discounts[np.minimum(counts, top[:, None])]
        shares = np.diff(shares, prepend=0.0, axis=1)
        return (shares * (pair.truth[falling] - worst[:, None])).sum(1) / spread

    found = gain(np.argsort(-pair.scores, kind="stable"))
    best = gain(np.argsort(-pair.truth, kind="stable"))
    return np.where((top == 0) & (spread > 0), 0.0, found / best)


def _top10(pair: _Pair, weights: np.ndarray) -> np.ndarray:
    share = (100 - TOP) / 100
    fittest = weights * (pair.truth > pair.by_truth.quantile(weights, share)[:, None])
    found = pair.scores > pair.by_score.quantile(weights, share)[:, None]
    return (fittest * found).sum(1) / fittest.sum(1)


def _auc(pair: _Pair, weights: np.ndarray) -> np.ndarray:
    positive = weights * pair.fit
    p, n = positive.sum(1), weights.sum(1)
    wins = (positive * pair.by_score.ranks(weights)).sum(1) - p * (p + 1) / 2
    return wins / (p * (n - p))


def _mcc(pair: _Pair, weights: np.ndarray) -> np.ndarray:
    called = pair.scores >= pair.by_score.quantile(weights, 0.5)[:, None]
    tp, fp = (weights * (called & pair.fit)).sum(1), (weights * (called & ~pair.fit)).sum(1)
    p, n, positives = (weights * pair.fit).sum(1), weights.sum(1), tp + fp
    tn, fn = n - p - fp, p - tp
    below = np.sqrt(positives * (n - positives) * p * (n - p))
    return np.where(below > 0, (tp * tn - fp * fn) / below, 0.0)


METRICS: dict[str, Callable[[_Pair, np.ndarray], np.ndarray]] = {
    "spearman": _spearman,
    "ndcg": _ndcg,
    "top10": _top10,
    "auc": _auc,
    "mcc": _mcc,
}
"""By name: of a pair and weights [b, n] to [b]; NaN where there is nothing to order."""


@kept
@dataclass(frozen=True)
class Scan(OfCounts):
    """One metric of one assay; the units are positions (or sets of them), drawn with all that was
    measured there, because neighbours in a scan are no independent findings."""

    kind: ClassVar[str] = "scan"

    metric: str
    truth: np.ndarray
    """What was measured, [n] float64; the higher, the fitter."""
    scores: np.ndarray
    """[n] float64."""
    fit: np.ndarray
    """[n] bool."""
    unit: np.ndarray
    """Of each variant, [n] int64: 0 to units - 1."""

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1

    def replicates(self, counts: np.ndarray) -> np.ndarray:
        metric = METRICS[self.metric]
        pair = _Pair(self.truth, self.scores, self.fit.astype(bool))
        step = max(1, CELLS // len(self.truth))
        found = np.empty(len(counts))
        with np.errstate(invalid="ignore", divide="ignore"):
            for first in range(0, len(counts), step):
                weights = counts[first : first + step, self.unit].astype(np.float64)
                found[first : first + step] = metric(pair, weights)
        return found


@kept
@dataclass(frozen=True)
class Scans(OfCounts):
    """The mean of Spearman over assays; the units are the positions of all of them."""

    kind: ClassVar[str] = "scans"

    truth: np.ndarray
    """Of all assays' variants, assay after assay, [n] float64; as `scores` and `unit`."""
    scores: np.ndarray
    unit: np.ndarray
    """Counted on from assay to assay."""
    ends: np.ndarray
    """Where each assay's variants end, [assays] int64."""

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1

    def replicates(self, counts: np.ndarray) -> np.ndarray:
        found = []
        for first, last in zip([0, *self.ends[:-1]], self.ends, strict=True):
            truth, scores = self.truth[first:last], self.scores[first:last]
            units = self.unit[first:last]
            start = units.min()
            scan = Scan("spearman", truth, scores, np.zeros(len(truth), bool), units - start)
            found.append(scan.replicates(counts[:, start : start + scan.units]))
        return mean_there(np.array(found))


@kept
@dataclass(frozen=True)
class Grouped(OfCounts):
    """ProteinGym's mean over assays: over those of one protein and selection type, then over the
    proteins of each type, then over the types. What is no number has no part in it."""

    kind: ClassVar[str] = "grouped"

    values: np.ndarray
    """[assays] float64."""
    group: np.ndarray
    """Of each assay, [assays] int64: its protein and selection type."""
    type: np.ndarray
    """Of each group, [groups] int64: its selection type."""

    @property
    def units(self) -> int:
        return len(self.values)

    def replicates(self, counts: np.ndarray) -> np.ndarray:
        there = ~np.isnan(self.values)
        weights = counts * there
        member = self.group[:, None] == np.arange(len(self.type))
        with np.errstate(invalid="ignore"):
            means = ((weights * np.where(there, self.values, 0)) @ member) / (weights @ member)
        return mean_there(_means_by_type(means, self.type))


def group(values: Sequence[float], proteins: Sequence[str], selections: Sequence[str]) -> Grouped:
    """The grouped mean of one number an assay, rounded to three decimals first as ProteinGym does.

    Args:
        proteins: UniProt ids.
        selections: selection types.
    """
    keys = list(zip(selections, proteins, strict=True))
    groups = sorted(set(keys))
    types = sorted(set(selections))
    return Grouped(
        np.round(np.asarray(values, np.float64), 3),
        np.array([groups.index(key) for key in keys]),
        np.array([types.index(selection) for selection, _ in groups]),
    )


def mean_there(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is a number; NaN where nothing is."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0).sum(0) / there.sum(0)


def _means_by_type(means: np.ndarray, types: np.ndarray) -> np.ndarray:
    """Means [b, groups] over the groups of each type, [types, b]."""
    return np.array([mean_there(means[:, types == each].T) for each in np.unique(types)])


def standard_errors(models: Sequence[Grouped], draws: int = 10_000, seed: int = 0) -> np.ndarray:
    """Of each model's grouped mean less the best model's, [models]; the best one's is 0.

    ProteinGym's non-parametric bootstrap: groups (a protein and a selection type) are drawn within
    each type, as many as there are, and the means over types are taken anew.

    Args:
        models: of the same assays; no group may be without a number.
    """
    first = models[0]
    ones = np.ones((1, first.units), np.int64)
    member = first.group[:, None] == np.arange(len(first.type))
    values = np.array([mean_there(np.where(member, m.values[:, None], np.nan)) for m in models])
    best = int(np.argmax([model.replicates(ones)[0] for model in models]))
    generator = np.random.default_rng(seed)
    parts = []
    for each in np.unique(first.type):
        mine = (values - values[best])[:, first.type == each]
        size = mine.shape[1]
        counts = generator.multinomial(size, np.full(size, 1 / size), draws)
        parts.append(counts @ mine.T / size)
    return np.mean(parts, axis=0).std(0, ddof=1)


def spearman(truth: np.ndarray, scores: np.ndarray) -> float:
    """Of two arrays, [n] each; NaN where one of them is constant."""
    unit = np.arange(len(truth))
    return Scan("spearman", truth, scores, np.zeros(len(truth), bool), unit).value()
