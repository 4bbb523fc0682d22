"""What a task is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from raptide.config import Settings
from raptide.evaluation.requests import Readings, Request
from raptide.evaluation.results import Figure, Measure
from raptide.evaluation.subjects.subject import Subject


class TaskSettings(Settings):
    """What a benchmark file says of a task; each kind has its own fields besides."""

    kind: str
    name: str = ""
    """Of the task, for rows; by default its kind."""


@dataclass
class Outcome:
    """What a task finds of one subject."""

    measures: list[Measure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences for the report: what was left out, and how many."""
    figures: list[Figure] = field(default_factory=list)


class Task(Protocol):
    """One kind of question with its data, read and checked when it is made.

    Making one raises InputError, in one sentence with file and row, where a column is missing, a
    label has another length than its sequence, or a letter is none.
    """

    version: ClassVar[int]
    """Of the code; raised whenever numbers may change."""

    @property
    def settings(self) -> TaskSettings: ...

    main_metric: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    """Kinds of readings without which a subject has no part in it; `"a|b"` for one of two."""

    random_weights: ClassVar[bool]
    """Whether a model of the same shape with random weights is one of the baselines."""

    how: ClassVar[str]
    """How each number is computed, a paragraph for the report, with sources."""

    def files(self) -> Sequence[Path]:
        """Data files; their digests are part of what a result depends on."""

    def baselines(self) -> Sequence[Subject]:
        """Those that come of the task's own data, or of none."""

    def requests(self, subject: Subject) -> Iterator[Request]:
        """What it wants of a subject, in the same order at each call."""

    def measure(self, subject: Subject, readings: Readings) -> Outcome:
        """Make measures of it. The same numbers for the same readings, to the last digit."""
