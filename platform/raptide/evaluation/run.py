"""A benchmark from end to end: every task of every subject, as far as it is not there already."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from raptide.data.corpus_files import sha256_of_file
from raptide.errors import InputError
from raptide.evaluation.cache import Measured, Result, ResultCache, key_of
from raptide.evaluation.compare import interval
from raptide.evaluation.requests import Request
from raptide.evaluation.results import COLUMNS
from raptide.evaluation.subjects.model import ModelSubject, random_weights
from raptide.evaluation.subjects.subject import Subject
from raptide.evaluation.tasks.contacts import Contacts
from raptide.evaluation.tasks.task import Task

Say = Callable[[str], None]

BUSY = "another evaluation is reading it into the same cache; waiting for its end"


@dataclass(frozen=True)
class Finding:
    """A task's result for a subject."""

    subject: Subject
    task: Task
    result: Result


@dataclass
class Findings:
    """All results of a benchmark, and where the time went."""

    found: list[Finding] = field(default_factory=list)
    reading_s: dict[str, float] = field(default_factory=dict)
    """By subject: what was read off it by this call."""
    computed: int = 0
    """Results that this call has computed; the others were there."""
    digests: dict[Path, str] = field(default_factory=dict)
    """Of data files as they were at the beginning; they may change or go while models are read."""


def evaluate(
    tasks: Sequence[Task],
    models: Sequence[ModelSubject],
    cache: ResultCache,
    say: Say = lambda line: None,
    baselines: bool = True,
    others: Sequence[Subject] = (),
) -> Findings:
    """Ask every subject every task.

    Args:
        models: the first stands for the shape of random weights wherever shapes are equal.
        say: told what goes on, a line at a time.
        baselines: whether those of the tasks are asked, too.
        others: subjects that are no models, asked what they can give.

    Raises:
        InputError: one of these has a model's name, or no task that it can be asked; a model has
            none.
    """
    for model in models:
        _refuse_mute(model, tasks)
    for other in others:
        _refuse_misfit(other, models, tasks)
    files = {path for task in tasks for path in task.files()}
    findings = Findings(digests={path: sha256_of_file(path) for path in files})
    digests = {id(task): data_digest(task, findings.digests) for task in tasks}
    for subject, its_tasks in _subjects(tasks, models, cache.folder, baselines, others):
        keys = {id(task): result_key(subject, task, digests[id(task)]) for task in its_tasks}
        there = {id(task): cache.find(keys[id(task)]) for task in its_tasks}
        missing = [task for task in its_tasks if there[id(task)] is None]
        if missing:
            with cache.turn(subject.digest, partial(say, f"{subject.name}: {BUSY}")):
                there |= {id(task): cache.find(keys[id(task)]) for task in missing}
                missing = [task for task in missing if there[id(task)] is None]
                if missing:
                    there |= _compute(subject, missing, keys, cache, findings, say)
        for task in its_tasks:
            result = there[id(task)]
            assert result is not None
            findings.found.append(Finding(subject, task, result))
    return findings


def _subjects(
    tasks: Sequence[Task],
    models: Sequence[ModelSubject],
    scratch: Path,
    baselines: bool,
    others: Sequence[Subject],
) -> Iterator[tuple[Subject, list[Task]]]:
    """Subjects, each once, with the tasks that they have a part in."""
    fits: dict[str, Any] = {}
    for task in tasks:
        if isinstance(task, Contacts):
            fits[task.fit_digest] = task.fit_on
    asked: list[tuple[Subject, Sequence[Task]]] = []
    for model in models:
        model.fits = fits
        asked.append((model, tasks))
    asked += [(other, tasks) for other in others]
    if baselines:
        controlled = [task for task in tasks if task.random_weights]
        shapes = {each.model.digest: each for each in (random_weights(m, scratch) for m in models)}
        asked += [(each, controlled) for each in shapes.values()] if controlled else []
        asked += [(baseline, [task]) for task in tasks for baseline in task.baselines()]
    for subject, its_tasks in asked:
        if able := [task for task in its_tasks if answers(subject, task)]:
            yield subject, able


def _refuse_mute(model: ModelSubject, tasks: Sequence[Task]) -> None:
    if not any(answers(model, task) for task in tasks):
        names = ", ".join(task.settings.name for task in tasks)
        raise InputError(
            f"{model.name} can be asked none of the tasks that were chosen ({names}), since it has "
            "no language-model head; choose others, or give the model that it was made from."
        )


def _refuse_misfit(other: Subject, models: Sequence[ModelSubject], tasks: Sequence[Task]) -> None:
    if other.name in [model.name for model in models]:
        raise InputError(
            f"{other.name!r} names a model and a column of predictions, which no table could tell "
            "apart; rename the column."
        )
    if not any(answers(other, task) for task in tasks):
        raise InputError(
            f"Predictions {other.name!r} are scores of variants, but no task that was chosen is of "
            "kind variants; add one to the benchmark or to --tasks, or leave the predictions out."
        )


def answers(subject: Subject, task: Task) -> bool:
    """Whether a subject gives what a task needs."""
    return all(any(kind in subject.kinds for kind in need.split("|")) for need in task.needs)


def _compute(
    subject: Subject,
    tasks: list[Task],
    keys: dict[int, str],
    cache: ResultCache,
    findings: Findings,
    say: Say,
) -> dict[int, Result | None]:
    """Results by the task's id."""
    found: dict[int, Result | None] = {}

    def ask() -> Iterator[Request]:
        for task in tasks:
            yield from task.requests(subject)

    say(f"{subject.name}: reading for {', '.join(task.settings.name for task in tasks)}")
    began = time.monotonic()
    with subject.read(ask) as readings:
        read_s = time.monotonic() - began
        findings.reading_s[subject.name] = findings.reading_s.get(subject.name, 0.0) + read_s
        for task in tasks:
            began = time.monotonic()
            outcome = task.measure(subject, readings)
            measured = [
                Measured(measure, measure.sample.value(), *interval(measure.sample))
                for measure in outcome.measures
            ]
            seconds = time.monotonic() - began
            result = Result(measured, outcome.notes, outcome.figures, seconds)
            cache.keep(keys[id(task)], result)
            found[id(task)] = result
            findings.computed += 1
            say(f"{subject.name}: {task.settings.name} in {seconds:.1f} s{_main(result)}")
    return found


def _main(result: Result) -> str:
    if not result.measured:
        return f": {' '.join(result.notes)}"
    main = result.main()
    return "" if main is None else f", {main.measure.metric} {main.value:.3f}"


def result_key(subject: Subject, task: Task, digest: str) -> str:
    """What a result is kept by: weights and dtype, the task's settings and code, its data."""
    settings = task.settings.model_dump(mode="json", exclude={"name"})
    for name in [each for each in settings if _is_path(settings[each])]:
        # Names in the order of their files, by which these are digested.
        settings[name] = [*settings[name]] if isinstance(settings[name], dict) else None
    name = subject.name if subject.baseline else ""  # models are told apart by their weights
    return key_of(name, subject.digest, settings, task.version, digest)


def _is_path(value: Any) -> bool:
    """Where data lie does not matter, what they are does: that is in their digest."""
    values = value.values() if isinstance(value, dict) else [value]
    return bool(value) and all(isinstance(each, str) and each.startswith("/") for each in values)


def data_digest(task: Task, digests: Mapping[Path, str]) -> str:
    """Of all the task's files, by name and content.

    Args:
        digests: of the files.
    """
    whole = hashlib.sha256()
    for path in task.files():
        whole.update(f"{path.name} {digests[path]}\n".encode())
    return whole.hexdigest()


def dataset_digest(task: Task, dataset: str, digests: Mapping[Path, str]) -> str:
    """Of the file that a data set is in; of all files where it is not one of them."""
    named = getattr(task.settings, "test", None)
    files = {path.stem: path for path in task.files()}
    if isinstance(named, dict):
        files |= {name: Path(path) for name, path in named.items()}
    return digests[files[dataset]] if dataset in files else data_digest(task, digests)


def rows_of(findings: Findings, version: str) -> list[dict[str, Any]]:
    """One row a number: COLUMNS of results.py, `role` and `higher_is_better`."""
    rows = []
    known: dict[tuple[int, str], str] = {}
    for subject, task, result in ((f.subject, f.task, f.result) for f in findings.found):
        for each in result.measured:
            measure = each.measure
            place = (id(task), measure.dataset)
            if place not in known:
                known[place] = dataset_digest(task, measure.dataset, findings.digests)
            values = (
                *(subject.name, subject.digest, subject.baseline, task.settings.name),
                *(task.settings.kind, measure.dataset, known[place], measure.metric),
                *(each.value, each.low, each.high, measure.sample.units, measure.layer),
                *(result.seconds, version),
            )
            more = {"role": measure.role, "higher_is_better": measure.higher_is_better}
            rows.append(dict(zip(COLUMNS, values, strict=True)) | more)
    return rows
