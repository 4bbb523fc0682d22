"""Which differences mean something.

Intervals are percentiles of a bootstrap over units. Two samples of the same units are drawn alike,
so that a protein that is hard for both models says nothing about their difference. Runs that differ
in the seed alone differ by more than their proteins do: that is the noise floor, and an interval
over proteins knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special, stats

from raptide.errors import InputError
from raptide.evaluation.samples import Sample

SEED = 20210413
CHUNK = 1 << 20
"""Draws held at once."""

CONTROL_LEVEL = 0.998
"""Of a control's interval: one in a thousand is too good by chance, and a benchmark has many."""

Verdict = Literal["better", "worse", "no measured difference"]


@dataclass(frozen=True)
class Difference:
    """Of two measures: the first less the second, with its 95% interval."""

    value: float
    low: float
    high: float
    verdict: Verdict
    """Of the first, as seen from the second."""
    paired: bool
    """Whether both have the same units, which were drawn alike; else each was drawn by itself, and
    the interval is wider."""


@dataclass(frozen=True)
class NoiseFloor:
    """How much a measure varies over runs that differ in the seed alone."""

    runs: int
    spread: float
    """The greatest less the least."""
    deviation: float
    """Standard deviation of one run. That of few runs is too small on average (by 20% for two, 8%
    for four), so it is divided by c4, which makes it unbiased if runs are normal."""
    threshold: float
    """Twice that: a smaller difference between two runs counts as none."""
    cautious: float
    """What two runs differ by in one of twenty pairs, given how little so few runs say of their
    deviation: Student's t times √2 deviations (which are not corrected there)."""

    def sentence(self) -> str:
        return (
            f"{self.runs} runs that differ in the seed alone spread over {self.spread:.3g}; two "
            f"standard deviations, {self.threshold:.3g}, are the least difference that counts "
            f"(with so few runs, one of {self.cautious:.3g} would be beyond doubt)."
        )


def interval(sample: Sample, replicates: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a bootstrap over units (Efron, 1979).

    Replicates that are no number (nothing to divide by was drawn) are left out. Both ends are NaN
    for fewer than two units, of whose spread nothing is known.
    """
    if sample.units < 2:
        return float("nan"), float("nan")
    drawn = [sample.replicates(counts) for counts in draws(sample.units, replicates)]
    return _percentiles(np.concatenate(drawn), level)


def difference(
    a: Sample,
    b: Sample,
    higher_is_better: bool,
    replicates: int = 1000,
    level: float = 0.95,
) -> Difference:
    """What `a` is more than `b`, and whether that is better.

    Samples of equally many units are taken for samples of the same units, in the same order; of one
    unit each, nothing is known. One unit against many is an exact number, as chance is.
    """
    if a.units == b.units < 2:
        nothing = float("nan")
        value = a.value() - b.value()
        return Difference(value, nothing, nothing, "no measured difference", paired=True)
    paired = a.units == b.units
    drawn_a = draws(a.units, replicates)
    if paired:
        drawn = [a.replicates(counts) - b.replicates(counts) for counts in drawn_a]
    else:  # the generators differ, being keyed by the number of units
        drawn_b = draws(b.units, replicates)
        drawn = [
            np.concatenate([a.replicates(counts) for counts in drawn_a])
            - np.concatenate([b.replicates(counts) for counts in drawn_b])
        ]
    low, high = _percentiles(np.concatenate([np.empty(0), *drawn]), level)
    verdict: Verdict = "no measured difference"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) == higher_is_better else "worse"
    return Difference(a.value() - b.value(), low, high, verdict, paired)


def noise_floor(repeats: Sequence[float]) -> NoiseFloor:
    """The noise floor of a measure, of its values in runs that differ in the seed alone.

    The threshold of two standard deviations is that of the nanoPLM work log (alint77, 2026).

    Raises:
        InputError: there are fewer than two.
    """
    runs = len(repeats)
    if runs < 2:
        raise InputError(
            f"A noise floor takes at least two runs that differ in the seed alone, but {runs} "
            f"{'was' if runs == 1 else 'were'} given; train with another training.seed."
        )
    values = np.asarray(repeats, np.float64)
    plain = float(values.std(ddof=1))
    log_ratio = special.gammaln(runs / 2) - special.gammaln((runs - 1) / 2)
    c4 = float(np.sqrt(2 / (runs - 1)) * np.exp(log_ratio))
    student = float(stats.t.ppf(0.975, runs - 1))
    return NoiseFloor(
        runs=runs,
        spread=float(np.ptp(values)),
        deviation=plain / c4,
        threshold=2 * plain / c4,
        cautious=student * np.sqrt(2.0) * plain,
    )


def judge_control(control: Sample, chance: Sample, higher_is_better: bool) -> str:
    """ "" if a control is no better than chance, beyond its interval; else a sentence that says so.

    `chance` may be one exact number, a sample of one unit.
    """
    found = difference(control, chance, higher_is_better, 4000, CONTROL_LEVEL)
    if found.verdict != "better":
        return ""
    return (
        f"The control did not come out at chance: {control.value():.4g} on shuffled labels, where "
        f"chance gives {chance.value():.4g} (difference {found.low:+.2g} to {found.high:+.2g}); "
        "do not trust the numbers beside it."
    )


def draws(units: int, replicates: int) -> Iterator[np.ndarray]:
    """How often each unit is drawn in each replicate, [b, units] int64, some at a time.

    Raw bits of a counter-based generator, so that draws depend neither on how many are held at once
    nor on the version of numpy.
    """
    if units == 0:
        return
    generator = np.random.Philox(key=[SEED, units])
    most = max(1, CHUNK // units)
    for first in range(0, replicates, most):
        rows = min(most, replicates - first)
        bits = generator.random_raw(rows * units) >> np.uint64(32)
        drawn = ((bits * np.uint64(units)) >> np.uint64(32)).astype(np.int64)
        drawn += np.repeat(np.arange(rows) * units, units)
        yield np.bincount(drawn, minlength=rows * units).reshape(rows, units)


def _percentiles(drawn: np.ndarray, level: float) -> tuple[float, float]:
    numbers = drawn[~np.isnan(drawn)]
    if not len(numbers):
        return float("nan"), float("nan")
    low, high = np.quantile(numbers, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
