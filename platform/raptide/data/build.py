"""Build a corpus with Ray Data: parse the files, drop what must go, bring each cluster's members
together, write.

    FASTA files ─ parse ─> records ─ shuffle by name ────> joined with the cluster tables, if any
                                   ─ shuffle by content ─> equal sequences side by side, cleaned
                                   ─ shuffle by cluster ─> one shard task a bucket ─> manifest

A bucket is a range of a hash, small enough for one task. The number of buckets follows from the
residues alone, so the digest does not depend on cores, block sizes or input order.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from pydantic import Field

from raptide.config import Settings
from raptide.data.cleaning import KEPT, CleaningSettings, count_reasons, drop_equal
from raptide.data.corpus import (
    BLOCK_ROW,
    BLOCK_TABLE,
    FORMAT_VERSION,
    MANIFEST,
    Corpus,
    sha256_of_file,
)
from raptide.data.fasta import read_fasta
from raptide.data.membership import join_membership, read_membership
from raptide.data.records import cluster_hashes, lines_as_records, place_records, records_table
from raptide.data.shards import ShardReport, write_bucket
from raptide.errors import CorpusError, plain_errors

BUCKET_BLOCKS = 192
"""Blocks a bucket is meant to hold: below a shard's 256, since hashes spread unevenly."""


class BuildSettings(Settings):
    """What shapes a corpus, beside its input."""

    holdout_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of clusters held out from training, by hash of the name."""

    block_residues: int = Field(1 << 20, ge=1, le=8 << 20)
    """A block closes when it holds at least this many residues."""

    cleaning: CleaningSettings = CleaningSettings()

    cluster_tag: str | None = None
    """Header field that names a record's cluster, e.g. `cluster50` for `cluster50=P12345`; a record
    without it belongs to the cluster of its own name. None makes every record its own cluster."""


def build_corpus(
    inputs: Sequence[str | Path],
    output: str | Path,
    settings: BuildSettings,
    *,
    cluster_tables: Sequence[str | Path] = (),
    heldout_clusters: Sequence[str] = (),
) -> Corpus:
    """Build a corpus folder from FASTA files. Ray must be running.

    The folder appears under its name only when it is finished; the manifest is written last.

    Args:
        cluster_tables: files of `representative, tab, member` lines; they decide a record's cluster
            before its header does.
        heldout_clusters: names of clusters to hold out beside those that the hash chooses.

    Raises:
        FastaError: an input file is no protein FASTA.
        CorpusError: the output folder exists; a cluster table contradicts itself or the input; or
            nothing is left.
    """
    output = Path(output)
    if output.exists():
        raise CorpusError(f"{output} exists already; remove it or choose another output folder.")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with plain_errors():
            records = _parse(inputs, cluster_tables, settings).materialize()
            residues = int(records.sum("length"))
            buckets = -(-residues // (settings.block_residues * BUCKET_BLOCKS))
            if cluster_tables:
                records = _by_bucket(records, "name_hash", buckets, join_membership)
            records = _place(records, settings, heldout_clusters)
            records = _clean(records, buckets, settings.cleaning).materialize()
            reasons = _count_reasons(records)
            if not reasons.get(KEPT):
                raise CorpusError(
                    f"All {sum(reasons.values())} records were dropped ({_described(reasons)}); "
                    "loosen the cleaning settings."
                )
            one_each = settings.cluster_tag is None and not cluster_tables
            reports = _write(records, buckets, partial.resolve(), settings, one_each)
        files = [*inputs, *cluster_tables]
        _write_manifest(partial, reports, reasons, files, settings, len(set(heldout_clusters)))
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.rename(output)
    return Corpus.open(output)


def _parse(
    inputs: Sequence[str | Path], tables: Sequence[str | Path], settings: BuildSettings
) -> ray.data.Dataset:
    """One row a record, and one a line of the cluster tables."""

    def parse(files: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for path, is_table in zip(files["path"], files["is_table"], strict=True):
            if is_table:
                yield from map(lines_as_records, read_membership(str(path)))
                continue
            for batch in read_fasta(str(path)):
                yield records_table(batch, settings.cluster_tag, settings.cleaning)

    files = [
        {"path": str(Path(path).resolve()), "is_table": is_table}
        for paths, is_table in ((inputs, False), (tables, True))
        for path in paths
    ]
    dataset = ray.data.from_items(files, override_num_blocks=len(files))
    return dataset.map_batches(parse, batch_size=1)


def _place(
    records: ray.data.Dataset, settings: BuildSettings, heldout_clusters: Sequence[str]
) -> ray.data.Dataset:
    """Each record's place in the corpus and its split, from its cluster's name."""
    # The names' hashes only: a published list has millions of names, and every task gets it.
    listed = ray.put(np.unique(cluster_hashes(heldout_clusters)[:, 1]))

    def place(table: pa.Table) -> pa.Table:
        return place_records(table, settings.holdout_fraction, ray.get(listed))

    return records.map_batches(place, batch_format="pyarrow", batch_size=None)


def _clean(records: ray.data.Dataset, buckets: int, settings: CleaningSettings) -> ray.data.Dataset:
    """Bring equal sequences together and drop the copies that must go."""

    def clean(table: pa.Table) -> pa.Table:
        return drop_equal(table, settings.drop_duplicates)

    return _by_bucket(records, "content", buckets, clean)


def _count_reasons(records: ray.data.Dataset) -> dict[str, int]:
    def count(table: pa.Table) -> pa.Table:
        reasons = count_reasons(table)
        return pa.table({"reason": list(reasons), "records": list(reasons.values())})

    total: dict[str, int] = {}
    for row in records.map_batches(count, batch_format="pyarrow", batch_size=None).take_all():
        total[row["reason"]] = total.get(row["reason"], 0) + row["records"]
    return dict(sorted(total.items()))


def _described(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items() if reason != KEPT)


def _by_bucket(
    records: ray.data.Dataset,
    column: str,
    buckets: int,
    function: Callable[[pa.Table], pa.Table],
) -> ray.data.Dataset:
    """Shuffle the records into ranges of a hash column and call the function on each range."""

    def add_bucket(table: pa.Table) -> pa.Table:
        # The upper 32 bits of the hash, scaled to the number of buckets: keeps the order.
        high = table[column].to_numpy() >> np.uint64(32)
        bucket = pa.array(((high * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64))
        if "bucket" in table.column_names:
            table = table.drop_columns("bucket")
        return table.append_column("bucket", bucket)

    # A generator: only out of those does Ray Data let our own errors through.
    def call(table: pa.Table) -> Iterator[pa.Table]:
        yield function(table)

    grouped = records.map_batches(add_bucket, batch_format="pyarrow", zero_copy_batch=True)
    partitions = min(buckets, max(1, int(ray.cluster_resources().get("CPU", 1))))
    return grouped.groupby("bucket", num_partitions=partitions).map_groups(
        call, batch_format="pyarrow"
    )


def _write(
    records: ray.data.Dataset, buckets: int, folder: Path, settings: BuildSettings, one_each: bool
) -> list[ShardReport]:
    """Shuffle the records into buckets and write each; the reports come in corpus order."""

    def write(table: pa.Table) -> pa.Table:
        reports = write_bucket(
            table.filter(pc.equal(table["dropped"], KEPT)),
            folder,
            block_residues=settings.block_residues,
            one_each=one_each,
        )
        return pa.table({"report": [json.dumps(report) for report in reports]})

    rows = _by_bucket(records, "order", buckets, write).take_all()
    reports: list[ShardReport] = [json.loads(row["report"]) for row in rows]
    return sorted(reports, key=lambda report: (report["split"] != "train", report["name"]))


def _write_manifest(
    folder: Path,
    reports: list[ShardReport],
    reasons: dict[str, int],
    inputs: Sequence[str | Path],
    settings: BuildSettings,
    num_listed: int,
) -> None:
    blocks = [block for report in reports for block in report["blocks"]]
    pq.write_table(pa.Table.from_pylist(blocks, BLOCK_ROW), folder / BLOCK_TABLE)
    digest = hashlib.sha256(f"raptide corpus {FORMAT_VERSION}\n".encode())
    for block in blocks:
        digest.update(f"{block['split']} {block['sha256']}\n".encode())
    manifest = {
        "format_version": FORMAT_VERSION,
        "digest": digest.hexdigest(),
        "alphabet": "esm-33",
        "counts": {split: _total(reports, split, "counts") for split in ("train", "heldout")},
        "length_histogram": {
            split: _total(reports, split, "lengths") for split in ("train", "heldout")
        },
        "residue_counts": {
            split: _total(reports, split, "residues") for split in ("train", "heldout")
        },
        "read": sum(reasons.values()),
        "dropped": {reason: count for reason, count in reasons.items() if reason != KEPT},
        "renamed_duplicates": sum(report["renamed"] for report in reports),
        "settings": settings.model_dump(),
        "listed_heldout_clusters": num_listed,
        "inputs": [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
            for path in sorted(map(Path, inputs))
        ],
        "shards": [
            {key: report[key] for key in ("name", "split", "rows", "bytes", "sha256")}
            for report in reports
        ],
        "blocks_sha256": sha256_of_file(folder / BLOCK_TABLE),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _total(reports: list[ShardReport], split: str, field: str) -> dict[str, int]:
    """Sum of one counter over the shards of a split, keys in order."""
    total: dict[str, int] = {}
    for report in reports:
        if report["split"] == split:
            counter: dict[str, Any] = report[field]  # type: ignore[literal-required]
            for key, count in counter.items():
                total[key] = total.get(key, 0) + count
    return dict(sorted(total.items(), key=lambda item: (len(item[0]), item[0])))
