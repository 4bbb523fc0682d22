"""Build a corpus with Ray Data, in two passes over the files.

    FASTA files ─ survey ─> notes: each record's cluster (from tables), what is dropped
                ─ parse, less what is dropped ─ shuffle by cluster ─> one task a bucket ─> shards
                                                                      manifest, last of all

A bucket is a range of the cluster hash, small enough for one task. The number of buckets follows
from the residues alone, so the digest does not depend on cores, block sizes or input order.

While it is built, a corpus is a folder `NAME.partial`. An interrupted build leaves it, and the next
build of the same files with the same settings goes on in it: the survey and the finished buckets
are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
from pydantic import Field

from raptide.config import Settings
from raptide.data.building.cleaning import KEPT, REASONS, UNCLUSTERED, CleaningSettings
from raptide.data.building.heldout import Listed
from raptide.data.building.manifest import write_manifest
from raptide.data.building.notes import record_of
from raptide.data.building.partial import PartialFolder, read_json
from raptide.data.building.shards import BucketReport, write_bucket
from raptide.data.building.shuffle import range_bucket, shuffle
from raptide.data.building.survey import MEMBERS, Source, Survey, survey
from raptide.data.corpus import FORMAT_VERSION, Corpus
from raptide.data.corpus_files import sha256_of_file
from raptide.data.fasta import ReadingRules, locate
from raptide.data.fasta_text import FastaPart, split_fasta
from raptide.errors import CorpusError, InputError, plain_errors
from raptide.patience import read_surely
from raptide.small_files import write_whole

BUCKET_RESIDUES = 32 << 20
"""Residues in a bucket, about: the paper's 86 G residues take 2,600 buckets. A cluster is never
divided among buckets, so one of 300 M residues makes a bucket of as many. The task that sorts a
bucket holds its residues up to four times."""

NAMED = 5
"""Listed clusters, at most, that a message names."""


class BuildSettings(Settings):
    """What shapes a corpus, beside its input."""

    holdout_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of clusters held out from training, by hash of the name."""

    block_residues: int = Field(1 << 20, ge=1, le=8 << 20)
    """A block closes when it holds at least this many residues."""

    reading: ReadingRules = ReadingRules()

    cleaning: CleaningSettings = CleaningSettings()

    cluster_tag: str | None = None
    """Header field that names a record's cluster, e.g. `cluster50` for `cluster50=P12345`; a record
    without it belongs to the cluster of its own name. None makes every record its own cluster."""

    clusters_of_a_larger_set: bool = False
    """Whether cluster tables may name members that the input has not, as UniRef's do for a part of
    UniRef; else such a line is refused."""

    unclustered: Literal["own", "drop", "refuse"] = "own"
    """What becomes of records that no table and no header puts into a cluster: each is a cluster of
    its own (though relatives of it may be held out), is dropped and counted, or ends the build."""


def build_corpus(
    inputs: Sequence[str | Path],
    output: str | Path,
    settings: BuildSettings,
    *,
    cluster_tables: Sequence[str | Path] = (),
    heldout_clusters: Sequence[str] | pa.ChunkedArray = (),
    say: Callable[[str], None] = lambda line: None,
) -> Corpus:
    """Build a corpus folder from FASTA files. Ray must be running.

    The folder appears under its name only when it is finished; the manifest is written last.

    Args:
        cluster_tables: files of `representative, tab, member` lines; they decide a record's cluster
            before its header does.
        heldout_clusters: names of clusters to hold out beside those that the hash chooses, or of
            members, whose clusters are held out then (`heldout.read_list`).
        say: is told what the build is at, a line at a time.

    Raises:
        FastaError: an input file is no protein FASTA.
        CorpusError: the output folder exists; a cluster table contradicts itself or the input; or
            nothing is left.
        Superseded: another build of this output has begun meanwhile, and goes on.
    """
    if settings.unclustered != "own" and not cluster_tables and settings.cluster_tag is None:
        raise CorpusError(
            f"--unclustered {settings.unclustered} needs --clusters or --cluster-tag: without them "
            "no record is in a cluster."
        )
    output = Path(output).resolve()
    if output.exists():
        raise CorpusError(f"{output} exists already; remove it or choose another output folder.")
    listed = Listed(heldout_clusters)
    parts = [part for path in sorted(map(str, inputs)) for part in split_fasta(path)]
    files = sorted(map(Path, [*inputs, *cluster_tables]))
    partial = PartialFolder.open(
        output.with_name(output.name + ".partial"),
        _fingerprint(parts, files, settings, listed),
        say,
    )
    try:
        with partial.explaining_errors(), plain_errors():
            inputs_described = [_describe.remote(str(file.resolve())) for file in files]
            source = Source(
                parts=parts,
                tables=sorted(str(Path(table).resolve()) for table in cluster_tables),
                cluster_tag=settings.cluster_tag,
                rules=settings.reading,
                strict_tables=not settings.clusters_of_a_larger_set,
                keep_unclustered=settings.unclustered == "own",
                holdout_fraction=settings.holdout_fraction,
                # The hashes only: a published list has millions of names, and every task gets it.
                listed=ray.put(listed.hashes),
                notes=partial.notes,
            )
            input_bytes = sum(file.stat().st_size for file in files)
            found = _survey_once(partial, source, settings.cleaning, input_bytes, say)
            _check(found, settings, say)
            if len(listed.hashes):
                clusters = np.array(found.listed_found, np.uint64)
                names = np.union1d(clusters, np.load(partial.notes / MEMBERS))
                _check_list(names, listed, len(clusters), say)
                source = replace(source, listed=ray.put(clusters))
            if source.tables and (alone := found.sums["unclustered"]):
                say(f"{alone:,} kept records are in no cluster table or header: clusters of one")
            firsts = {
                reason: _describe_record.remote(parts, number, settings.reading)
                for reason, number in found.first.items()
            }
            if settings.unclustered == "refuse":
                _refuse_unclustered(found, firsts)
            reports = _write_buckets(partial, source, settings, found, say)
            described = ray.get(inputs_described)
            dropped_first = {reason: ray.get(first) for reason, first in firsts.items()}
    except InputError:
        partial.give_up()
        raise
    partial.refuse_others()
    write_manifest(
        partial.path,
        reports,
        read=sum(found.reasons.values()),
        dropped={reason: n for reason, n in found.reasons.items() if reason and n},
        dropped_first=dropped_first,
        stated_members=found.sums["stated_members"],
        latin1_headers=found.sums["latin1_headers"],
        unclustered=found.sums["unclustered"],
        settings=settings.model_dump(),
        listed_heldout_clusters=len(listed.hashes),
        listed_heldout_clusters_found=len(found.listed_found),
        inputs=sorted(described, key=lambda file: (file["name"], file["sha256"])),
    )
    partial.finish(output, len(reports))
    return Corpus.open(output)


def _fingerprint(
    parts: Sequence[FastaPart],
    files: Sequence[Path],
    settings: BuildSettings,
    listed: Listed,
) -> dict[str, Any]:
    """What an interrupted build must share with the one that goes on."""
    status = [(file.resolve(), file.stat()) for file in files]
    return {
        "format_version": FORMAT_VERSION,
        "settings": settings.model_dump(),
        "parts": [list(part) for part in parts],
        "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in status],
        "heldout_clusters": hashlib.sha256(listed.hashes.tobytes()).hexdigest(),
        "bucket_residues": BUCKET_RESIDUES,
    }


def _survey_once(
    partial: PartialFolder,
    source: Source,
    cleaning: CleaningSettings,
    input_bytes: int,
    say: Callable[[str], None],
) -> Survey:
    if read_json(partial.survey) is None:
        say("Pass 1 of 2: what is there, and what is dropped")
        found = survey(source, cleaning, input_bytes)
        partial.refuse_others()
        write_whole(partial.survey, json.dumps(asdict(found)))
    return Survey(**read_json(partial.survey))


def _check(
    found: Survey,
    settings: BuildSettings,
    say: Callable[[str], None],
) -> None:
    """Refuse what would leave nothing; say what is not as asked.

    Raises:
        CorpusError: nothing is left, or a tag fits no record at all.
    """
    kept, read = found.reasons[REASONS[KEPT]], sum(found.reasons.values())
    if not kept:
        why = ", ".join(f"{reason}: {n}" for reason, n in found.reasons.items() if n)
        raise CorpusError(f"All {read} records were dropped ({why}); loosen the cleaning settings.")
    if tag := settings.cluster_tag:
        tagged = found.sums["tagged"]
        if not tagged:
            raise CorpusError(
                f"No header has the field {tag}=, so every record would be a cluster of its own; "
                "check the spelling, or leave --cluster-tag out."
            )
        if tagged < kept:
            say(f"{tagged:,} of {kept:,} records have {tag}=; each other one is its own cluster")


def _refuse_unclustered(found: Survey, firsts: dict[str, Any]) -> None:
    reason = REASONS[UNCLUSTERED]
    if count := found.reasons[reason]:
        raise CorpusError(
            f"{count:,} records are in no cluster, first {ray.get(firsts[reason])}; complete the "
            "tables, or say --unclustered drop or own."
        )


def _check_list(
    found: np.ndarray, listed: Listed, clusters: int, say: Callable[[str], None]
) -> None:
    """Say what of a list is there.

    Args:
        found: hashes of the names that are clusters or members.
        clusters: how many are held out by it.

    Raises:
        CorpusError: none is.
    """
    missing, names = listed.missing(found, NAMED)
    if not clusters:
        raise CorpusError(
            f"None of the {missing:,} clusters listed to be held out is in the input "
            f"({names[0]!r}, for one); list names as the headers or tables have them."
        )
    say(f"Held out by name: {clusters:,} clusters")
    if missing:
        shown = ", ".join(names) + (", ..." if missing > len(names) else "")
        say(f"Not in the input: {missing:,} of the listed clusters ({shown})")


def _write_buckets(
    partial: PartialFolder,
    source: Source,
    settings: BuildSettings,
    found: Survey,
    say: Callable[[str], None],
) -> list[BucketReport]:
    """Shuffle the records into buckets and write those that are not finished yet."""
    buckets = -(-found.sums["residues"] // BUCKET_RESIDUES)
    done = np.array([partial.report(bucket) is not None for bucket in range(buckets)])
    one_each = settings.cluster_tag is None and not source.tables

    def bucket_of(table: pa.Table) -> np.ndarray:
        return range_bucket(table["order"], buckets)

    def write(bucket: int, records: pa.Table) -> pa.Table:
        partial.write_bucket(
            bucket,
            lambda folder: write_bucket(
                bucket,
                records,
                folder,
                block_residues=settings.block_residues,
                one_each=one_each,
                number_sign="#" * (found.hash_signs + 1),
            ),
        )
        return pa.table({"bucket": [bucket]})

    if not done.all():
        say(f"Pass 2 of 2: {buckets - done.sum():,} of {buckets:,} buckets to write")
        records = source.placed(lambda table: ~done[bucket_of(table)])
        shuffle(records, buckets, bucket_of, write)
    empty = BucketReport(shards=[], renamed=0)
    return [partial.report(bucket) or empty for bucket in range(buckets)]


@ray.remote
def _describe(file: str) -> dict[str, Any]:
    """Name, size and hash of an input file.

    Raises:
        RaptideError: it cannot be read.
    """
    path = Path(file)
    size, digest = read_surely(file, lambda: (path.stat().st_size, sha256_of_file(path)))
    return {"name": path.name, "bytes": size, "sha256": digest}


@ray.remote
def _describe_record(parts: Sequence[FastaPart], number: int, rules: ReadingRules) -> str:
    """Name and place of a record, by its number."""
    part, index = record_of(number)
    name, line = locate(parts[part], index, rules)
    return f"{name!r} in {Path(parts[part].path).name}:{line}"
