"""Write one bucket of records as shards of cluster rows: order, split, cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raptide.alphabet import FIRST_RESIDUE, RESIDUES
from raptide.data.corpus import CLUSTER_ROW, MAX_ROW_GROUPS, Split, hash_rows, sha256_of_file

LENGTH_BIN = 50
"""Residues in one bin of the manifest's length histogram."""


class ShardReport(TypedDict):
    """What the manifest and the block table say of one shard."""

    name: str
    split: Split
    rows: int
    bytes: int
    sha256: str
    renamed: int
    blocks: list[dict[str, Any]]
    counts: dict[str, int]
    lengths: dict[str, int]
    residues: dict[str, int]


def write_bucket(
    records: pa.Table,
    folder: Path,
    *,
    block_residues: int,
    one_each: bool,
) -> list[ShardReport]:
    """Write the shards of one bucket and report on each.

    Args:
        records: columns bucket, order, heldout, cluster, id, residues, length; all of one bucket.
        folder: where the shards go.
        block_residues: a block closes when it holds at least this many residues.
        one_each: every record is its own cluster, also where names repeat.
    """
    if not records.num_rows:
        return []
    bucket = records["bucket"][0].as_py()
    records, renamed = _number_duplicates(_in_corpus_order(records), one_each)
    held = records["heldout"].to_numpy().astype(bool)
    reports: list[ShardReport] = []
    for split, chosen in (("train", ~held), ("heldout", held)):
        part = records.filter(pa.array(chosen))
        if part.num_rows:
            reports += _write_split(part, folder, split, bucket, block_residues)
    if reports:
        reports[0]["renamed"] = renamed
    return reports


def _in_corpus_order(records: pa.Table) -> pa.Table:
    """By cluster hash; within a cluster the representative first, then by length and content.

    The representative is the member that carries the cluster's name, or else the longest.
    """
    named = pc.equal(records["id"], records["cluster"])
    keyed = records.append_column("named", pc.cast(named, pa.int8()))
    return records.take(
        pc.sort_indices(
            keyed,
            [
                ("order", "ascending"),
                ("cluster", "ascending"),
                ("named", "descending"),
                ("length", "descending"),
                ("id", "ascending"),
                ("residues", "ascending"),
            ],
        )
    )


def _write_split(
    records: pa.Table, folder: Path, split: str, bucket: int, block_residues: int
) -> Iterator[ShardReport]:
    rows = _cluster_rows(records, block_residues)
    cuts = _block_cuts(rows, block_residues)
    for part, first in enumerate(range(0, len(cuts) - 1, MAX_ROW_GROUPS)):
        shard_cuts = cuts[first : first + MAX_ROW_GROUPS + 1]
        name = f"{split}-{bucket:05d}-{part:02d}.parquet"
        yield _write_shard(rows, shard_cuts, folder / name, split)


def _cluster_rows(records: pa.Table, max_residues: int) -> pa.Table:
    """Sorted records to cluster rows, none above `max_residues` unless a single member is."""
    lengths = records["length"].to_numpy()
    clusters = records["cluster"].to_pylist()
    starts, firsts, sizes = [], [], []
    index = 0
    while index < len(clusters):
        end = index
        while end < len(clusters) and clusters[end] == clusters[index]:
            end += 1
        held = 0
        for member in range(index, end):
            if member == index or held + lengths[member] > max_residues:
                starts.append(member)
                firsts.append(member - index)
                sizes.append(end - index)
                held = 0
            held += lengths[member]
        index = end
    ids = records["id"].combine_chunks()
    offsets = pa.array([*starts, len(clusters)], pa.int32())
    return pa.table(
        {
            "cluster": pa.array([clusters[start] for start in starts], pa.string()),
            "cluster_size": pa.array(sizes, pa.int64()),
            "first_member": pa.array(firsts, pa.int64()),
            "ids": pa.ListArray.from_arrays(offsets, ids),
            "members": pa.ListArray.from_arrays(offsets, records["residues"].combine_chunks()),
            "lengths": pa.ListArray.from_arrays(offsets, pa.array(lengths, pa.int32())),
        },
        schema=CLUSTER_ROW,
    )


def _number_duplicates(records: pa.Table, one_each: bool) -> tuple[pa.Table, int]:
    """Number the second and later records of one name within a cluster: `a`, `a#2`, `a#3`.

    With `one_each` they become clusters of their own under those names. Returns how many there are.
    """
    clusters, ids = records["cluster"].to_pylist(), records["id"].to_pylist()
    seen: dict[tuple[str, str], int] = {}
    unique, renamed = [], 0
    for cluster, name in zip(clusters, ids, strict=True):
        count = seen[cluster, name] = seen.get((cluster, name), 0) + 1
        renamed += count > 1
        unique.append(name if count == 1 else f"{name}#{count}")
    if not renamed:
        return records, 0
    for column in ("id", "cluster") if one_each else ("id",):
        index = records.schema.get_field_index(column)
        records = records.set_column(index, column, pa.array(unique, pa.string()))
    return records, renamed


def _block_cuts(rows: pa.Table, block_residues: int) -> list[int]:
    """Row indices at which blocks begin, and the end: [blocks + 1]."""
    totals = _residues_per_row(rows)
    cuts, held = [0], 0
    for index, residues in enumerate(totals):
        held += residues
        if held >= block_residues:
            cuts.append(index + 1)
            held = 0
    if cuts[-1] != len(totals):
        cuts.append(len(totals))
    return cuts


def _residues_per_row(rows: pa.Table) -> np.ndarray:
    lengths = rows["lengths"].combine_chunks()
    totals = np.concatenate([[0], np.cumsum(lengths.flatten().to_numpy(), dtype=np.int64)])
    offsets = lengths.offsets.to_numpy() - lengths.offsets[0].as_py()
    return np.diff(totals[offsets])


def _write_shard(rows: pa.Table, cuts: list[int], file: Path, split: Any) -> ShardReport:
    blocks = []
    with pq.ParquetWriter(
        file, CLUSTER_ROW, compression="zstd", use_dictionary=False, write_page_checksum=True
    ) as writer:
        for group, (start, end) in enumerate(pairwise(cuts)):
            block = rows.slice(start, end - start).combine_chunks()
            writer.write_table(block, row_group_size=block.num_rows)
            blocks.append(
                {
                    "split": split,
                    "shard": file.name,
                    "row_group": group,
                    "rows": block.num_rows,
                    "residues": int(_residues_per_row(block).sum()),
                    "sha256": hash_rows(block),
                }
            )
    shard = rows.slice(cuts[0], cuts[-1] - cuts[0])
    statistics = _statistics(shard)
    return ShardReport(
        name=file.name,
        split=split,
        rows=shard.num_rows,
        bytes=file.stat().st_size,
        sha256=sha256_of_file(file),
        renamed=0,
        blocks=blocks,
        counts=statistics["counts"],
        lengths=statistics["lengths"],
        residues=statistics["residues"],
    )


def _statistics(shard: pa.Table) -> dict[str, dict[str, int]]:
    lengths = shard["lengths"].combine_chunks().flatten().to_numpy()
    members = shard["members"].combine_chunks().flatten()
    residues = np.frombuffer(b"".join(members.to_pylist()), np.uint8)
    bins = np.bincount(lengths // LENGTH_BIN)
    letters = np.bincount(residues, minlength=FIRST_RESIDUE + len(RESIDUES))[FIRST_RESIDUE:]
    return {
        "counts": {
            "clusters": int((shard["first_member"].to_numpy() == 0).sum()),
            "sequences": len(lengths),
            "residues": int(lengths.sum()),
        },
        "lengths": {str(index * LENGTH_BIN): int(n) for index, n in enumerate(bins) if n},
        "residues": {RESIDUES[index]: int(n) for index, n in enumerate(letters) if n},
    }
