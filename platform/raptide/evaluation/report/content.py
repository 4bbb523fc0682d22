"""What a report is made of: rows, figures, comparisons, and where all of it comes from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from raptide.evaluation.results import Figure

Row = dict[str, Any]
"""One number: the fields of `results.COLUMNS`, `role` (`results.Role`) and `higher_is_better`.
`low` and `high` are NaN where there is no interval; `layer` is -1 or None where there is none."""

Place = tuple[str, str, str]
"""Which number: task, dataset, metric."""


SHORT_DIGEST = 6


def place_of(row: Row) -> Place:
    return row["task"], row["dataset"], row["metric"]


@dataclass(frozen=True)
class SubjectEntry:
    """A model or a baseline."""

    name: str
    weights: str
    """Hex digest."""
    baseline: bool = False
    lineage: dict[str, Any] = field(default_factory=dict)
    """Of the bundle's raptide.json; {} for strangers and baselines."""


@dataclass(frozen=True)
class DatasetEntry:
    """Data of a task."""

    name: str
    digest: str
    file: str = ""


@dataclass(frozen=True)
class TaskEntry:
    """A task, and what it drew."""

    name: str
    kind: str
    main_metric: str
    how: str
    """How each number is computed; an empty line parts paragraphs."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """Sentences by subject; what is said of several is shown once."""
    figures: dict[str, list[Figure]] = field(default_factory=dict)
    """By subject. Lines of one title and axis share a picture."""
    datasets: list[DatasetEntry] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """The difference of two subjects in one number, a - b."""

    task: str
    dataset: str
    metric: str
    a: str
    b: str
    difference: float
    low: float
    high: float
    verdict: str
    """Of a: `better`, `worse` or `no measured difference`."""
    paired: bool = True
    """Whether both were drawn with the same draws over the same units."""
    index: int = 0
    """Which of the layers that this number was asked of."""
    layers: str = ""
    """Where the number is of several layers: those of a and b, in words."""

    @property
    def place(self) -> Place:
        return self.task, self.dataset, self.metric


@dataclass(frozen=True)
class Control:
    """Whether what must come out at chance did."""

    task: str
    subject: str
    sentence: str
    at_chance: bool


@dataclass(frozen=True)
class Reference:
    """A published number for the same data."""

    task: str
    dataset: str
    metric: str
    model: str
    value: float
    source: str

    @property
    def place(self) -> Place:
        return self.task, self.dataset, self.metric


@dataclass(frozen=True)
class Moment:
    """A checkpoint of a run that was evaluated as it went."""

    step: int
    tokens: int
    ece: float
    """Held-out; NaN where it was not measured."""
    metrics: dict[str, float]
    """Main metrics by a name for the task."""


@dataclass(frozen=True)
class Emergence:
    """What a run learned, and when."""

    run: str
    moments: list[Moment]


@dataclass(frozen=True)
class ReportContent:
    """All that a report says."""

    benchmark: str
    subjects: list[SubjectEntry]
    tasks: list[TaskEntry]
    rows: list[Row]
    comparisons: list[Comparison] = field(default_factory=list)
    noise: dict[Place, float | None] = field(default_factory=dict)
    """By how much runs that differ in the seed alone may differ, `compare.NoiseFloor.threshold`; {}
    without repeats."""
    controls: list[Control] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    emergence: list[Emergence] = field(default_factory=list)
    command: str = ""
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def noise_of(self, comparison: Comparison) -> float | None:
        """The noise floor beside a comparison; it is known of the first layer asked for."""
        return None if comparison.index else self.noise.get(comparison.place)

    @property
    def models(self) -> list[SubjectEntry]:
        return [each for each in self.subjects if not each.baseline]

    @property
    def baselines(self) -> list[SubjectEntry]:
        return [each for each in self.subjects if each.baseline]


def distinguish(content: ReportContent) -> ReportContent:
    """The same with a piece of their digests behind names that several subjects of a task have.

    Random weights of several shapes are such. What is known of a name alone goes to its first.
    """
    asked = {(row["task"], row["model"], row["weights"]) for row in content.rows}
    several = {name for (_, name), n in Counter(each[:2] for each in asked).items() if n > 1}
    if not several:
        return content

    def label(name: str, weights: str) -> str:
        return f"{name} ({weights[:SHORT_DIGEST]})" if name in several else name

    first: dict[str, str] = {}
    for each in content.subjects:
        first.setdefault(each.name, label(each.name, each.weights))
    tasks = [
        replace(
            task,
            notes={first.get(name, name): notes for name, notes in task.notes.items()},
            figures={first.get(name, name): drawn for name, drawn in task.figures.items()},
        )
        for task in content.tasks
    ]
    return replace(
        content,
        subjects=[replace(e, name=label(e.name, e.weights)) for e in content.subjects],
        rows=[row | {"model": label(row["model"], row["weights"])} for row in content.rows],
        tasks=tasks,
    )
