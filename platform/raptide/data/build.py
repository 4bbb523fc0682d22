"""Build a corpus with Ray Data: parse the files, bring each cluster's members together, write.

    FASTA files ─ parse ─> records ─ shuffle by bucket ─> one shard task a bucket ─> manifest

A bucket is a range of the cluster hash, small enough for one task. The number of buckets follows
from the residues alone, so the digest does not depend on cores, block sizes or input order.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import Field

from raptide.config import Settings
from raptide.data.corpus import (
    BLOCK_ROW,
    BLOCK_TABLE,
    FORMAT_VERSION,
    MANIFEST,
    Corpus,
    sha256_of_file,
)
from raptide.data.fasta import read_fasta
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

    cluster_tag: str | None = None
    """Header field that names a record's cluster, e.g. `cluster50` for `cluster50=P12345`; a record
    without it belongs to the cluster of its own name. None makes every record its own cluster."""


def build_corpus(
    inputs: Sequence[str | Path], output: str | Path, settings: BuildSettings
) -> Corpus:
    """Build a corpus folder from FASTA files. Ray must be running.

    The folder appears under its name only when it is finished; the manifest is written last.

    Raises:
        FastaError: an input file is no protein FASTA.
        CorpusError: the output folder exists.
    """
    output = Path(output)
    if output.exists():
        raise CorpusError(f"{output} exists already; remove it or choose another output folder.")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with plain_errors():
            records = _parse(inputs, settings).materialize()
            residues = int(records.sum("length"))
            buckets = -(-residues // (settings.block_residues * BUCKET_BLOCKS))
            reports = _write(records, buckets, partial.resolve(), settings)
        _write_manifest(partial, reports, inputs, settings)
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.rename(output)
    return Corpus.open(output)


def _parse(inputs: Sequence[str | Path], settings: BuildSettings) -> ray.data.Dataset:
    """One row a record: cluster, its order and split hashes, id, residues, length."""

    def parse(files: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for path in files["path"]:
            for batch in read_fasta(str(path)):
                yield _records_table(*batch, tag=settings.cluster_tag)

    files = [{"path": str(Path(path).resolve())} for path in inputs]
    dataset = ray.data.from_items(files, override_num_blocks=len(files))
    return dataset.map_batches(parse, batch_size=1)


def _records_table(
    names: list[str], descriptions: list[str], residues: bytes, lengths: np.ndarray, tag: str | None
) -> pa.Table:
    clusters = [_cluster_of(*record, tag) for record in zip(names, descriptions, strict=True)]
    hashes = np.frombuffer(b"".join(map(_hash_name, clusters)), "<u8").reshape(-1, 2)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    members = pa.Array.from_buffers(
        pa.binary(), len(names), [None, pa.py_buffer(offsets), pa.py_buffer(residues)]
    )
    return pa.table(
        {
            "order": hashes[:, 0],
            "split": hashes[:, 1],
            "cluster": pa.array(clusters, pa.string()),
            "id": pa.array(names, pa.string()),
            "residues": members,
            "length": lengths,
        }
    )


def _cluster_of(name: str, description: str, tag: str | None) -> str:
    if tag is not None:
        for word in description.split():
            key, _, value = word.partition("=")
            if key == tag and value:
                return value
    return name


def _hash_name(cluster: str) -> bytes:
    """16 bytes: the first 8 order the corpus, the last 8 decide the split."""
    return hashlib.blake2b(cluster.encode(), digest_size=16, person=b"raptide.cluster").digest()


def _write(
    records: ray.data.Dataset, buckets: int, folder: Path, settings: BuildSettings
) -> list[ShardReport]:
    """Shuffle the records into buckets and write each; the reports come in corpus order."""

    def add_bucket(table: pa.Table) -> pa.Table:
        # The upper 32 bits of the order hash, scaled to the number of buckets: keeps the order.
        high = table["order"].to_numpy() >> np.uint64(32)
        bucket = (high * np.uint64(buckets)) >> np.uint64(32)
        return table.append_column("bucket", pa.array(bucket.astype(np.int64)))

    def write(table: pa.Table) -> pa.Table:
        reports = write_bucket(
            table,
            folder,
            block_residues=settings.block_residues,
            holdout_fraction=settings.holdout_fraction,
            one_each=settings.cluster_tag is None,
        )
        return pa.table({"report": [json.dumps(report) for report in reports]})

    grouped = records.map_batches(add_bucket, batch_format="pyarrow", zero_copy_batch=True)
    partitions = min(buckets, max(1, int(ray.cluster_resources().get("CPU", 1))))
    rows = (
        grouped.groupby("bucket", num_partitions=partitions)
        .map_groups(write, batch_format="pyarrow")
        .take_all()
    )
    reports: list[ShardReport] = [json.loads(row["report"]) for row in rows]
    return sorted(reports, key=lambda report: (report["split"] != "train", report["name"]))


def _write_manifest(
    folder: Path, reports: list[ShardReport], inputs: Sequence[str | Path], settings: BuildSettings
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
        "dropped": {},
        "renamed_duplicates": sum(report["renamed"] for report in reports),
        "settings": settings.model_dump(),
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
