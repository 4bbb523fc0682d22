"""What an evaluation leaves: results as tables, and a report.

evaluation/
  results.parquet, results.json   one row a number; see results.py
  report.html                     all of it, for people
  cache/                          results by what they depend on; given again, nothing is redone
"""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raptide.errors import ConfigError
from raptide.evaluation.cache import Measured, ResultCache
from raptide.evaluation.compare import difference, judge_control, noise_floor
from raptide.evaluation.emergence import read_emergence
from raptide.evaluation.report.content import (
    Comparison,
    Control,
    DatasetEntry,
    Place,
    ReportContent,
    SubjectEntry,
    TaskEntry,
)
from raptide.evaluation.report.page import write_page
from raptide.evaluation.report.references import match_references, read_references
from raptide.evaluation.results import COLUMNS
from raptide.evaluation.run import Finding, Findings, dataset_digest, rows_of
from raptide.evaluation.subjects.model import ModelSubject
from raptide.storage import PARTIAL, Storage
from raptide.version import hardware, versions

PARQUET, JSON, REPORT = "results.parquet", "results.json", "report.html"
PACKAGES = ("raptide", "torch", "numpy", "scipy", "scikit-learn", "ray")

_TYPES = {str: pa.string(), bool: pa.bool_(), float: pa.float64(), int: pa.int64()}
SCHEMA = pa.schema([(name, _TYPES[kind]) for name, kind in COLUMNS.items()])


def write_output(folder: Path, content: ReportContent) -> None:
    """Write tables and report, each whole or not at all."""
    rows = [{name: row[name] for name in COLUMNS} for row in content.rows]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer, compression="zstd")
    plain = [{k: _plain(v) for k, v in row.items()} for row in rows]
    files = {
        PARQUET: buffer.getvalue(),
        JSON: (json.dumps(plain, indent=1, allow_nan=False) + "\n").encode(),
    }
    storage = Storage.of(folder)
    for name, data in files.items():
        storage.write(name, partial(_put, data))
    write_page(content, folder / REPORT)
    storage.delete(PARTIAL)


def _put(data: bytes, file: Any) -> None:
    file.write(data)


def clear_output(folder: Path, cache: ResultCache) -> None:
    """Delete what an evaluation wrote, and nothing else.

    Raises:
        ConfigError: the folder, or the cache, holds other things, or another process is at work.
    """
    known = {PARQUET, JSON, REPORT, "cache", "partial", "wandb"}
    others = sorted(path.name for path in folder.glob("*") if path.name not in known)
    if others:
        raise ConfigError(
            f"{folder} holds {others[0]!r}, which no evaluation wrote, so nothing is deleted; "
            "choose another --output."
        )
    cache.clear()
    for name in (PARQUET, JSON, REPORT):
        (folder / name).unlink(missing_ok=True)


def make_content(
    benchmark: str,
    findings: Findings,
    repeats: Sequence[str],
    references: Path | None,
    command: list[str],
    compared: Sequence[str] = (),
) -> ReportContent:
    """All that the report says.

    Args:
        repeats: names of the models that differ in the seed alone.
        references: a file of published numbers.
        compared: names of repeats that are compared with other models all the same.

    Raises:
        ConfigError: that file is none.
    """
    rows = rows_of(findings, version("raptide"))
    models = [f.subject for f in findings.found if isinstance(f.subject, ModelSubject)]
    trained = {model.name: model for model in models if not model.baseline}
    return ReportContent(
        benchmark=benchmark,
        subjects=_subjects(findings),
        tasks=_tasks(findings),
        rows=rows,
        comparisons=list(_comparisons(findings, {*repeats} - {*compared})),
        noise=_noise(findings, repeats),
        controls=list(_controls(findings)),
        references=match_references(read_references(references), rows) if references else [],
        emergence=[found for name in trained if (found := read_emergence(Path(name))) is not None],
        command=shlex.join(command),
        hardware=hardware(),
        versions=versions(PACKAGES),
    )


def _subjects(findings: Findings) -> list[SubjectEntry]:
    entries = {}
    for subject in (found.subject for found in findings.found):
        entry = SubjectEntry(subject.name, subject.digest, subject.baseline)
        if isinstance(subject, ModelSubject):
            entry = replace(entry, lineage=subject.lineage())
        entries[subject.name, subject.digest] = entry
    return list(entries.values())


def _tasks(findings: Findings) -> list[TaskEntry]:
    entries: dict[str, TaskEntry] = {}
    for subject, task, result in ((f.subject, f.task, f.result) for f in findings.found):
        name = task.settings.name
        if name not in entries:
            files = [
                DatasetEntry(p.stem, dataset_digest(task, p.stem, findings.digests), p.name)
                for p in task.files()
            ]
            entries[name] = TaskEntry(
                name, task.settings.kind, task.main_metric, task.how, datasets=files
            )
        if result.notes:
            entries[name].notes[subject.name] = result.notes
        if result.figures:
            entries[name].figures[subject.name] = result.figures
    return list(entries.values())


def _comparisons(findings: Findings, left_out: set[str]) -> Iterator[Comparison]:
    """Of all pairs of models but those left out, number by number."""
    models = [
        f for f in findings.found if not f.subject.baseline and f.subject.name not in left_out
    ]
    for a, b in combinations(models, 2):
        if a.task is not b.task:
            continue
        own, others = _by_place(a.result.measured), _by_place(b.result.measured)
        for (dataset, metric, index), mine in own.items():
            theirs = others.get((dataset, metric, index))
            if theirs is None or mine.measure.role in ("control", "chance"):
                continue
            higher = mine.measure.higher_is_better
            found = difference(mine.measure.sample, theirs.measure.sample, higher)
            yield Comparison(
                task=a.task.settings.name,
                dataset=dataset,
                metric=metric,
                a=a.subject.name,
                b=b.subject.name,
                difference=found.value,
                low=found.low,
                high=found.high,
                verdict=found.verdict,
                paired=found.paired,
                index=index,
                layers=_layers(mine, theirs) if (dataset, metric, 1) in own else "",
            )


def _layers(*measured: Measured) -> str:
    """Those of two models, which need not have the same number."""
    numbers = dict.fromkeys(each.measure.layer for each in measured)
    if None in numbers:
        return ""
    return f"layer{'s' * (len(numbers) > 1)} {' and '.join(map(str, numbers))}"


def _by_place(measured: list[Measured]) -> dict[tuple[str, str, int], Measured]:
    """By data set, metric and how many there were before: layers of two models have no common
    number, but the order of those that were asked for."""
    found: dict[tuple[str, str, int], Measured] = {}
    for each in measured:
        key = (each.measure.dataset, each.measure.metric)
        found[(*key, sum(place[:2] == key for place in found))] = each
    return found


def _noise(findings: Findings, repeats: Sequence[str]) -> dict[Place, float | None]:
    values: dict[Place, list[float]] = {}
    for found in findings.found:
        if found.subject.name in repeats:
            for (dataset, metric, index), each in _by_place(found.result.measured).items():
                if index == 0:
                    place = (found.task.settings.name, dataset, metric)
                    values.setdefault(place, []).append(each.value)
    return {place: noise_floor(some).threshold for place, some in values.items() if len(some) > 1}


def _controls(findings: Findings) -> Iterator[Control]:
    for found in findings.found:
        yield from _controls_of(found)


def _controls_of(found: Finding) -> Iterator[Control]:
    chances = {
        (m.measure.dataset, m.measure.metric.removeprefix("chance/")): m
        for m in found.result.measured
        if m.measure.role == "chance"
    }
    for each in found.result.measured:
        metric = each.measure.metric.removeprefix("control/")
        if each.measure.role != "control" or (each.measure.dataset, metric) not in chances:
            continue
        chance = chances[each.measure.dataset, metric]
        sentence = judge_control(
            each.measure.sample, chance.measure.sample, each.measure.higher_is_better
        )
        name = found.task.settings.name
        yield Control(name, found.subject.name, sentence and f"{metric}: {sentence}", not sentence)


def _plain(value: Any) -> Any:
    """As JSON knows it, which has neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
