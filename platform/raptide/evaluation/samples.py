"""What a measure's value and uncertainty are computed from: what was found of each unit.

Intervals are percentiles of a bootstrap over units (Efron, 1979). Two samples of the same units are
drawn with the same draws, so that what units have in common cancels out of their difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np


class Sample(Protocol):
    """What was found of each unit, and the statistic that is made of all."""

    kind: ClassVar[str]

    @property
    def units(self) -> int:
        """How many there are: proteins, queries, positions, assays."""

    def value(self) -> float:
        """The statistic."""

    def replicates(self, counts: np.ndarray) -> np.ndarray:
        """The statistic of drawn units, [b] float64.

        Args:
            counts: how often each unit was drawn, [b, units] int64.
        """


KINDS: dict[str, type] = {}
"""Classes of samples by the name under which they are kept."""


def kept(cls: type) -> type:
    """Register a sample, a dataclass of numbers, strings and numpy arrays, by its `kind`."""
    KINDS[cls.kind] = cls  # type: ignore[attr-defined]
    return cls


def to_arrays(sample: Any) -> dict[str, Any]:
    """A sample's fields by name, and its `kind`."""
    return {"kind": sample.kind} | {
        each.name: getattr(sample, each.name) for each in fields(sample)
    }


def of_arrays(arrays: dict[str, Any]) -> Sample:
    """The sample that `to_arrays` took apart."""
    values = dict(arrays)
    return KINDS[values.pop("kind")](**values)


class OfCounts(ABC):
    """A sample whose statistic is that of units each drawn once."""

    @property
    @abstractmethod
    def units(self) -> int: ...

    @abstractmethod
    def replicates(self, counts: np.ndarray) -> np.ndarray: ...

    def value(self) -> float:
        return float(self.replicates(np.ones((1, self.units), np.int64))[0])


@kept
@dataclass(frozen=True)
class Ratio(OfCounts):
    """Sum of numerators over sum of denominators: shares, means over proteins, ECE with `exp`."""

    kind: ClassVar[str] = "ratio"

    numerators: np.ndarray
    """[units] float64."""
    denominators: np.ndarray
    """[units] float64."""
    exp: bool = False
    """Whether the statistic is exp of the ratio."""

    @property
    def units(self) -> int:
        return len(self.numerators)

    def replicates(self, counts: np.ndarray) -> np.ndarray:
        weights = counts.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = (weights @ self.numerators) / (weights @ self.denominators)
        return np.exp(ratios) if self.exp else ratios


def mean_of(values: Any) -> Ratio:
    """The mean of one number a unit; NaN counts as no unit's."""
    array = np.asarray(values, np.float64)
    there = ~np.isnan(array)
    return Ratio(np.where(there, array, 0.0), there.astype(np.float64))
