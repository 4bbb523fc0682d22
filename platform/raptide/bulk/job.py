"""A job from end to end: survey the sources, compute the units that are missing, finish."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data

from raptide.bulk.dedup import OPEN, Copies, fill_in, find_copies
from raptide.bulk.folder import FORMAT_VERSION, STAMP, OutputFolder
from raptide.bulk.places import BulkSettings, plan_workers
from raptide.bulk.process import Limits
from raptide.bulk.sources.pipe import Pipe
from raptide.bulk.units import Source, Survey, Unit
from raptide.bulk.work import Work
from raptide.bulk.worker import DONE, Done, UnitWorker, read_units
from raptide.errors import InputError, RaptideError, plain_errors
from raptide.patience import read_surely

ENGINES_PER_READER = 8

FOOTERS_AT_ONCE = 16


@dataclass
class Outcome:
    """What a job has done, and what there is now."""

    rows: int = 0
    rejects: int = 0
    residues: int = 0
    """Of all rows, also of parts that were there before."""
    parts: int = 0
    computed_residues: int = 0
    """By this call."""
    computed_records: int = 0
    startup_s: float = 0.0
    """Until the first engine was ready: survey, workers, models."""
    seconds: float = 0.0
    """From then to the end."""
    workers: int = 0
    on_gpus: bool = False


Watch = Callable[[int, int, float], None]
"""Called with residues done, residues in all, and residues/s, over and over."""


def run_bulk(
    work: Work,
    sources: Sequence[Source],
    output: OutputFolder,
    settings: BulkSettings = BulkSettings(),  # noqa: B008 (frozen)
    watch: Watch = lambda done, total, rate: None,
    finish: Callable[[OutputFolder], None] = lambda output: None,
) -> Outcome:
    """Compute what is missing of a job's output. Needs a running Ray.

    Args:
        finish: makes other files of the parts, if they are not there, before the job is finished.

    Raises:
        ConfigError: the folder holds another job's output, or another job writes to it.
        InputError: a source is damaged, or `work` refuses a record.
    """
    began = time.monotonic()
    with output.alone():
        known = fingerprint(work, settings)
        is_new = output.manifest() is None
        if settings.replace and not is_new:
            output.clear()
            is_new = True
        if is_new:  # from here on the folder is this job's
            output.write_manifest({"finished": False, "fingerprint": known})
        output.refuse_strangers(known)
        try:
            with plain_errors():
                return _run_here(work, known, sources, output, settings, watch, finish, began)
        except InputError:
            if is_new and not output.parts():
                output.give_back()
            raise


def _run_here(
    work: Work,
    known: dict[str, Any],
    sources: Sequence[Source],
    output: OutputFolder,
    settings: BulkSettings,
    watch: Watch,
    finish: Callable[[OutputFolder], None],
    began: float,
) -> Outcome:
    """The same in a folder that is this job's."""
    output.tidy()
    sources = copy_pipes(sources, output)
    surveys = survey_sources(sources, work)
    whole = known | {"inputs": [survey.digest for survey in surveys]}
    output.refuse_strangers(whole)
    output.refuse_other_parts({unit.name for survey in surveys for unit in survey.units})
    manifest = _begin(output, whole, sources, surveys)
    stamp = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    units = [unit for survey in surveys for unit in survey.units]
    missing = {unit.name for unit in units} - set(output.parts())
    copies = find_copies(output, sources, units) if settings.dedup and missing else None
    run = _Run(work, sources, output, stamp, settings, copies)
    outcome = _compute(run, surveys, watch, began)
    if copies is not None:
        fill_in(copies, stamp)
    counts = _count(run, surveys, outcome)
    finish(output)
    output.finish(manifest | {"counts": counts})
    if outcome.computed_records:
        outcome.seconds = time.monotonic() - began - outcome.startup_s
    return outcome


def copy_pipes(sources: Sequence[Source], output: OutputFolder) -> list[Source]:
    """What can be read only once, as files."""
    return [
        source.copied(output.storage, index) if isinstance(source, Pipe) else source
        for index, source in enumerate(sources)
    ]


def fingerprint(work: Work, settings: BulkSettings) -> dict[str, Any]:
    """What must be the same for parts to belong together, but for the inputs."""
    return {
        "format_version": FORMAT_VERSION,
        **work.fingerprint(),
        "threads": settings.threads,
        "dedup": settings.dedup,
    }


def survey_sources(sources: Sequence[Source], work: Work) -> list[Survey]:
    """What each source holds, several at once.

    Raises:
        InputError: one is damaged.
    """

    def survey(index: int) -> Survey:
        return read_surely(sources[index].name, lambda: sources[index].survey(index, work))

    task = ray.remote(num_cpus=1, max_retries=3)(survey)
    return ray.get([task.remote(index) for index in range(len(sources))])


def _begin(
    output: OutputFolder, whole: dict[str, Any], sources: Sequence[Source], surveys: list[Survey]
) -> dict[str, Any]:
    inputs = [
        {"name": source.name, "sha256": survey.digest, "records": survey.records}
        for source, survey in zip(sources, surveys, strict=True)
    ]
    manifest = {"finished": False, "fingerprint": whole, "inputs": inputs}
    there = output.manifest()
    if there is None or there.get("finished") is not True:
        output.write_manifest(manifest)
    return manifest


@dataclass(frozen=True)
class _Run:
    """What all steps of a job need."""

    work: Work
    sources: Sequence[Source]
    output: OutputFolder
    stamp: str
    settings: BulkSettings
    copies: Copies | None


def _compute(run: _Run, surveys: list[Survey], watch: Watch, began: float) -> Outcome:
    total = sum(survey.residues for survey in surveys)
    there = {*run.output.parts(), *run.output.units_in(OPEN)}
    stretches = list(_missing(run.sources, surveys, there))
    left = sum(unit.residues for stretch in stretches for unit in stretch)
    outcome = Outcome(startup_s=time.monotonic() - began)
    progress = total - left
    watch(progress, total, 0.0)
    started = None
    for done in _stream(run, stretches, outcome):
        now = time.monotonic()
        if started is None:
            started = now - done.seconds + done.opening_s
            outcome.startup_s = started - began
        progress += done.residues
        outcome.computed_residues += done.computed
        outcome.computed_records += done.rows
        outcome.seconds = now - started
        watch(progress, total, outcome.computed_residues / max(outcome.seconds, 1e-9))
    return outcome


def _missing(
    sources: Sequence[Source], surveys: list[Survey], there: set[str]
) -> Iterator[list[Unit]]:
    """Units that have no part yet, in stretches that one task reads."""
    for source, survey in zip(sources, surveys, strict=True):
        left = [unit for unit in survey.units if unit.name not in there]
        if left:
            yield from source.stretches(left)


def _stream(run: _Run, stretches: list[list[Unit]], outcome: Outcome) -> Iterator[Done]:
    """Have Ray Data do it; what is said of each unit, as it is done."""
    if not stretches:
        return
    sources, settings = run.sources, run.settings
    places = plan_workers(settings)
    workers = min(places.workers, sum(map(len, stretches)))
    outcome.workers, outcome.on_gpus = workers, places.gpus > 0
    limits = Limits(settings.threads, places.memory_bytes, settings.timeout_s)

    # A generator: only out of those does Ray Data let our own errors through.
    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for units in batch["units"]:
            yield from read_units(sources, [Unit(*each) for each in json.loads(units)])

    rows = [{"units": json.dumps(stretch)} for stretch in stretches]
    readers = ray.data.TaskPoolStrategy(size=1 + workers // ENGINES_PER_READER)
    dataset = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(read, batch_size=1, num_cpus=0, compute=readers)
        .map_batches(
            UnitWorker,
            fn_constructor_args=(run.work, run.output, run.stamp, limits, run.copies),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=places.gpus,
            num_cpus=places.cpus,
        )
    )
    context = dataset.context
    context.target_max_block_size = 1  # a block a unit: none waits for others to fill it
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = -1  # a unit may take as long as it takes
    context.enable_progress_bars = False
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from (Done(*json.loads(each)) for each in table[DONE].to_pylist())


def _count(run: _Run, surveys: list[Survey], outcome: Outcome) -> dict[str, int]:
    """Look at every part once more, gather the rejects; how much there is."""
    output = run.output
    units = [unit.name for survey in surveys for unit in survey.units]

    def rows(unit: str) -> int:
        with output.open_part(unit) as part:
            if part.schema_arrow.metadata.get(STAMP) == run.stamp.encode():
                return part.metadata.num_rows
        output.delete_part(unit)
        raise RaptideError(
            f"A worker of an earlier job still wrote to {output.name}; give the job again, it "
            "replaces what that one left."
        )

    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        outcome.rows = sum(pool.map(rows, units))
    outcome.parts = len(units)
    outcome.rejects = output.gather_rejects()
    outcome.residues = sum(survey.residues for survey in surveys)
    return {"rows": outcome.rows, "rejects": outcome.rejects, "parts": outcome.parts}
