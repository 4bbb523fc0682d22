"""Results: measures with what their uncertainty comes from, and figures.

A measure keeps a *sample*: what was found of each unit (a protein, a query, a position, an assay).
Its value and its interval are computed from that, and so is the difference of two measures of the
same units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raptide.evaluation.samples import Sample

Role = Literal["main", "more", "control", "chance"]
"""`main`: the task's main metric. `control`: the same on shuffled labels, named `control/METRIC`.
`chance`: what a control must not be better than, named `chance/METRIC`."""


@dataclass(frozen=True)
class Measure:
    """One number of a task, of one subject."""

    metric: str
    dataset: str
    sample: Sample
    higher_is_better: bool = True
    role: Role = "more"
    layer: int | None = None


@dataclass(frozen=True)
class Lines:
    """Curves over one axis."""

    title: str
    x_label: str
    y_label: str
    x: list[float]
    series: dict[str, list[float]]
    """By name, as long as x; NaN where there is nothing."""
    x_names: list[str] | None = None
    """Where x is no number: names of its places, drawn as bars."""


@dataclass(frozen=True)
class Heatmap:
    """A matrix; with `truth`, the upper triangle shows `values` and the lower one that."""

    title: str
    values: np.ndarray
    """[rows, columns] fp32; NaN is drawn as nothing."""
    truth: np.ndarray | None = None
    row_names: list[str] | None = None
    column_names: list[str] | None = None
    diverging: bool = False
    """Whether 0 is the middle of the colours."""


@dataclass(frozen=True)
class Points:
    """A scatter of points in groups."""

    title: str
    xy: np.ndarray
    """[n, 2] fp32."""
    groups: list[str]
    labels: list[str] | None = None
    """Drawn beside the points."""


Figure = Lines | Heatmap | Points

COLUMNS: dict[str, Any] = {
    "model": str,
    "weights": str,
    "baseline": bool,
    "task": str,
    "kind": str,
    "dataset": str,
    "dataset_digest": str,
    "metric": str,
    "value": float,
    "low": float,
    "high": float,
    "n": int,
    "layer": int,
    "seconds": float,
    "version": str,
}
"""Of results.parquet and results.json, one row a number."""
