"""Power laws through the points of a study, with intervals.

What is fitted is the cross entropy in nats, L(x) = a x^-b (Kaplan et al., 2020), by least squares
in the logarithms of both; the ECE is exp of L. The interval of b is that of a bootstrap: proteins
are drawn, the same for all models, since a protein that is hard for one is hard for all; and where
models were trained with several seeds, each point moves by what seeds do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from raptide.evaluation.compare import draws, noise_floor
from raptide.scaling.measuring import Point

REPLICATES = 1000
LEAST_POINTS = 3
NOISE_SEED = 20210413


@dataclass(frozen=True)
class Cell:
    """One model on one of the data: the mean over its seeds."""

    model: str
    data: str
    kind: str
    x: dict[str, float]
    """Parameters, tokens of an epoch, and operations."""

    nats: float
    replicates: np.ndarray
    """Of the bootstrap over proteins, [REPLICATES] float64."""

    seeds: tuple[float, ...]
    """Nats of each seed."""

    @property
    def ece_interval(self) -> tuple[float, float]:
        """95% over proteins; a seed's part is not in it."""
        return _interval(np.exp(self.replicates))


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = scale * x ** -exponent, nats."""

    scale: float
    exponent: float
    low: float
    high: float
    points: int
    drawn: np.ndarray = field(repr=False)
    """Slope and offset of the line in logarithms for each draw of the bootstrap, [2, REPLICATES]"""

    def ece(self, x: float) -> float:
        return float(np.exp(self.scale * x**-self.exponent))

    def ece_interval(self, x: float) -> tuple[float, float]:
        """95% of the laws that the bootstrap has drawn lie between these at x."""
        slope, offset = self.drawn
        return _interval(np.exp(np.exp(offset + slope * np.log(x))))

    def facts(self) -> dict[str, float]:
        names = ("scale", "exponent", "low", "high", "points")
        return {name: getattr(self, name) for name in names}

    def sentence(self) -> str:
        flat = "; it may be flat" if self.low <= 0 <= self.high else ""
        return (
            f"Cross entropy goes as x^{-self.exponent:.4f} (95% interval {-self.high:.4f} to "
            f"{-self.low:.4f}, {self.points} points{flat})."
        )


@dataclass(frozen=True)
class Trend:
    """What the largest of some models, or of the data, gains on the smallest."""

    name: str
    first: str
    last: str
    ece: tuple[float, float]
    """Of both."""

    fall: tuple[float, float]
    """95% interval of the fall in nats: over proteins, and what seeds do, where that is known."""

    def sentence(self) -> str:
        before, after = self.ece
        low, high = self.fall
        told = f"{self.name}: from {self.first} to {self.last} the ECE goes from {before:.2f} to "
        certain = (
            "beyond what proteins and seeds do" if low > 0 or high < 0 else "which may be none"
        )
        return (
            f"{told}{after:.2f}, {certain} (cross entropy {-high:+.4f} to {-low:+.4f} nats, 95%)."
        )


@dataclass(frozen=True)
class Curves:
    """What the points of a study come to."""

    cells: Sequence[Cell]

    deviation: float
    """What seeds do, nats."""

    laws: dict[str, PowerLaw]
    trends: Sequence[Trend] = ()

    @classmethod
    def through(cls, points: Iterable[Point]) -> Curves:
        found = cells(points)
        deviation = seed_deviation(found)
        return cls(found, deviation, laws(found, deviation), trends(found, deviation))


NO_CURVES = Curves((), 0.0, {})


def cells(points: Iterable[Point]) -> list[Cell]:
    """Models by size and data, in the order of the points."""
    grouped: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        if point.kind != "n-gram" and point.ece_masked is not None:
            grouped.setdefault((point.facts["model"], point.facts["data"]), []).append(point)
    return [_cell(some) for some in grouped.values()]


def _cell(some: Sequence[Point]) -> Cell:
    samples = [point.sample for point in some if point.sample is not None]
    seeds = tuple(float(np.log(sample.value())) for sample in samples)
    drawn = [
        np.concatenate([np.log(s.replicates(counts)) for counts in draws(s.units, REPLICATES)])
        for s in samples
    ]
    facts = some[0].facts
    x = {name: float(facts[name] or np.nan) for name in ("parameters", "epoch_tokens", "flops")}
    return Cell(
        *(facts["model"], facts["data"], facts["kind"], x),
        *(float(np.mean(seeds)), np.mean(drawn, 0), seeds),
    )


def seed_deviation(found: Iterable[Cell]) -> float:
    """Standard deviation, in nats, over runs that differ in the seed alone; 0 where none do."""
    floors = [noise_floor(each.seeds).deviation for each in found if len(each.seeds) > 1]
    return float(np.sqrt(np.mean(np.square(floors)))) if floors else 0.0


def fit(found: Sequence[Cell], by: str, deviation: float) -> PowerLaw | None:
    """The law through some points; None where they are fewer than three, or of one size.

    Args:
        by: "parameters", "epoch_tokens" or "flops".
        deviation: what seeds do, nats.
    """
    x = np.log([each.x[by] for each in found])
    if len(np.unique(x)) < LEAST_POINTS or not np.isfinite(x).all():
        return None
    slope, offset = np.polyfit(x, np.log([each.nats for each in found]), 1)
    drawn = np.polyfit(x, np.log(_moved(found, deviation)), 1)
    ends = _interval(-drawn[0])
    return PowerLaw(float(np.exp(offset)), float(-slope), *ends, len(found), drawn)


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    """95% of what a bootstrap has drawn."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _moved(found: Sequence[Cell], deviation: float) -> np.ndarray:
    """Nats of each in every draw of the bootstrap, moved by what seeds do, [cells, REPLICATES]."""
    noise = np.random.Generator(np.random.Philox(key=[NOISE_SEED, len(found)]))
    return np.array(
        [
            each.replicates + noise.normal(0, deviation / np.sqrt(len(each.seeds)), REPLICATES)
            for each in found
        ]
    )


def best_by_compute(found: Iterable[Cell]) -> list[Cell]:
    """Those that no other beats with fewer operations, the cheapest first."""
    frontier: list[Cell] = []
    for each in sorted(found, key=lambda cell: cell.x["flops"]):
        if not frontier or each.nats < frontier[-1].nats:
            frontier.append(each)
    return frontier


def laws(found: Iterable[Cell], deviation: float) -> dict[str, PowerLaw]:
    """What is fitted to transformers, by what it is drawn over and what is held: `parameters 5pct`,
    `data t-1.5M`, `compute`."""
    ours = [each for each in found if each.kind == "transformer"]
    by_data = grouped(ours, lambda each: each.data)
    by_model = grouped(ours, lambda each: each.model)
    fitted = {
        **{f"parameters {key}": fit(v, "parameters", deviation) for key, v in by_data.items()},
        **{f"data {key}": fit(v, "epoch_tokens", deviation) for key, v in by_model.items()},
        "compute": fit(best_by_compute(ours), "flops", deviation),
    }
    return {name: law for name, law in fitted.items() if law is not None}


def trends(found: Iterable[Cell], deviation: float) -> list[Trend]:
    """The smallest transformer against the largest on each of the data, and the least data against
    the most with each transformer."""
    ours = [each for each in found if each.kind == "transformer"]
    sides = [
        *(("parameters", key, v) for key, v in grouped(ours, lambda each: each.data).items()),
        *(("epoch_tokens", key, v) for key, v in grouped(ours, lambda each: each.model).items()),
    ]
    told = []
    for by, key, some in sides:
        ordered = sorted(some, key=lambda each: each.x[by])
        if len(ordered) > 1 and ordered[0].x[by] < ordered[-1].x[by]:
            told.append(_trend(by, key, ordered[0], ordered[-1], deviation))
    return told


def _trend(by: str, key: str, first: Cell, last: Cell, deviation: float) -> Trend:
    before, after = _moved([first, last], deviation)
    what = f"parameters, {key}" if by == "parameters" else f"data, {key}"
    names = (first.model, last.model) if by == "parameters" else (first.data, last.data)
    ece = float(np.exp(first.nats)), float(np.exp(last.nats))
    return Trend(what, *names, ece, _interval(before - after))


def grouped(found: Iterable[Cell], key: Callable[[Cell], str]) -> dict[str, list[Cell]]:
    """By key, in the order in which the keys come."""
    groups: dict[str, list[Cell]] = {}
    for each in found:
        groups.setdefault(key(each), []).append(each)
    return groups
