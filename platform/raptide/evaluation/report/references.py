"""Published numbers, which stand beside ours only where the data set is the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, model_validator

from raptide.config import Settings, load_settings
from raptide.evaluation.report.content import Reference, Row

ALL = "all"
"""The data set of an average over all files of a task."""


class PublishedTable(Settings):
    """Numbers of several models on one data set, from one source."""

    kind: str
    """Of task."""
    names: tuple[str, ...] = Field(min_length=1)
    """What the data set is called, capitals apart. What a task averages over all its files goes by
    the task's name."""
    digests: tuple[str, ...] = ()
    """What it counts as whatever it is called: `dataset_digest` of results."""
    metrics: tuple[str, ...] = Field(min_length=1)
    """As results call them, in their units: shares, not percent."""
    source: str = Field(min_length=1)
    """Where the numbers can be read."""
    models: dict[str, tuple[float | None, ...]] = Field(min_length=1)
    """By model, a number for each metric; null where none was published."""

    @model_validator(mode="after")
    def _as_many_values_as_metrics(self) -> PublishedTable:
        for model, values in self.models.items():
            if len(values) != len(self.metrics):
                raise ValueError(
                    f"{model} has {len(values)} values for {len(self.metrics)} metrics "
                    f"({', '.join(self.metrics)}); give one each, null for none."
                )
        return self

    def covers(self, row: Row) -> bool:
        """Whether a row is of the same data and metric."""
        if row["kind"] != self.kind or row["metric"] not in self.metrics:
            return False
        called = row["task"] if row["dataset"] == ALL else row["dataset"]
        named = called.casefold() in {name.casefold() for name in self.names}
        return named or row["dataset_digest"] in self.digests


class References(Settings):
    """A file of published numbers."""

    tables: tuple[PublishedTable, ...]


def read_references(file: str | Path) -> References:
    """Read such a file.

    Raises:
        ConfigError: it cannot be read, or a field is wrong; one sentence that names it.
    """
    return load_settings(References, file)


def match_references(references: References, rows: Iterable[Row]) -> list[Reference]:
    """The published numbers for what rows measure, once each, in the file's order."""
    places: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if row.get("role") not in ("control", "chance"):
            places.setdefault((row["task"], row["dataset"], row["metric"]), row)
    found: dict[tuple[str, str, str, str], Reference] = {}
    for table in references.tables:
        for (task, dataset, metric), row in places.items():
            if not table.covers(row):
                continue
            for model, values in table.models.items():
                value = values[table.metrics.index(metric)]
                if value is not None:
                    reference = Reference(task, dataset, metric, model, value, table.source)
                    found.setdefault((task, dataset, metric, model), reference)
    return list(found.values())
