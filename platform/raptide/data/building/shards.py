"""Write one bucket of records as shards of cluster rows: order, split, cut into blocks.

Only names, lengths and hashes are sorted here; residues are gathered a block at a time. A cluster
larger than a block becomes many cluster rows. Each of them knows the whole cluster's size and where
in it its members stand, so that the row which holds a drawn member can tell by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raptide.alphabet import RESIDUES, count_letters
from raptide.data.building.records import accessions
from raptide.data.corpus import (
    CLUSTER_ROW,
    LENGTH_BIN,
    MAX_ROW_GROUPS,
    Split,
    hash_rows,
    member_residues,
)
from raptide.data.corpus_files import sha256_of_file


class ShardReport(TypedDict):
    """What the manifest and the block table say of one shard."""

    name: str
    split: Split
    rows: int
    bytes: int
    sha256: str
    blocks: list[dict[str, Any]]
    counts: dict[str, int]
    lengths: dict[str, int]
    residues: dict[str, int]


class BucketReport(TypedDict):
    """What a bucket became."""

    shards: list[ShardReport]
    renamed: int


def write_bucket(
    bucket: int,
    records: pa.Table,
    folder: Path,
    *,
    block_residues: int,
    one_each: bool,
    number_sign: str,
) -> BucketReport:
    """Write the shards of one bucket and report on each.

    Args:
        records: all PLACED records (see records.py) of the bucket.
        folder: where the shards go.
        block_residues: a block closes when it holds at least this many residues.
        one_each: every record is its own cluster, also where names repeat.
        number_sign: what stands before the number of a repeated name; no name of the input has it
            before digits at its end.
    """
    records = records.combine_chunks()
    order = _corpus_order(records)
    names = records.drop_columns("residues").take(order)
    names, renamed = _number_duplicates(names, one_each, number_sign)
    heldout = names["heldout"].to_numpy()
    shards: list[ShardReport] = []
    split: Split
    for split, chosen in (("train", ~heldout), ("heldout", heldout)):
        if chosen.any():
            rows = _ClusterRows.cut(
                names.filter(pa.array(chosen)),
                records["residues"].chunk(0),
                order.filter(pa.array(chosen)),
                block_residues,
            )
            shards += _write_split(rows, folder, split, bucket, block_residues)
    return BucketReport(shards=shards, renamed=renamed)


def _corpus_order(records: pa.Table) -> pa.Array:
    """By cluster hash; within a cluster the representative first, then by length, name, content.

    The representative is the member that carries the cluster's name or accession (UniRef100_P69905
    in UniRef50_P69905), or else the longest.
    """
    ids, clusters = (accessions(records[name].combine_chunks()) for name in ("id", "cluster"))
    keyed = records.append_column("named", pc.cast(pc.equal(ids, clusters), pa.int8()))
    return pc.sort_indices(
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


def _number_duplicates(names: pa.Table, one_each: bool, number_sign: str) -> tuple[pa.Table, int]:
    """Number the second and later records of one name within a cluster: `a`, `a#2`, `a#3`.

    With `one_each` they become clusters of their own under those names. Returns how many there are.
    """
    keys = ["cluster", "id"]
    clusters = names["cluster"].combine_chunks()
    all_alone = not pc.any(pc.equal(clusters[1:], clusters[:-1])).as_py()
    if all_alone or names.group_by(keys).aggregate([]).num_rows == names.num_rows:
        return names, 0
    seen: Counter[tuple[str, str]] = Counter()
    unique, renamed = [], 0
    for key in zip(names["cluster"].to_pylist(), names["id"].to_pylist(), strict=True):
        seen[key] += 1
        renamed += seen[key] > 1
        unique.append(key[1] if seen[key] == 1 else f"{key[1]}{number_sign}{seen[key]}")
    for column in keys if one_each else ("id",):
        index = names.schema.get_field_index(column)
        names = names.set_column(index, column, pa.array(unique, pa.string()))
    return names, renamed


@dataclass(frozen=True)
class _ClusterRows:
    """The cluster rows of one split, their residues still where the records are."""

    names: pa.Table
    """The members in corpus order: columns cluster, id, length, [m]."""

    residues: pa.LargeBinaryArray
    """Of all records of the bucket, in the order they came in."""

    order: pa.Array
    """Where each member's residues are, [m] uint64."""

    starts: np.ndarray
    """First member of each row, and the end, [n + 1] int64."""

    first_member: np.ndarray
    """Its index within the cluster, [n] int64."""

    cluster_size: np.ndarray
    """Members of the row's cluster, [n] int64."""

    @classmethod
    def cut(
        cls, names: pa.Table, residues: pa.Array, order: pa.Array, max_residues: int
    ) -> _ClusterRows:
        """Cluster rows of sorted members, none above `max_residues` unless a single member is."""
        names = names.combine_chunks()
        clusters = names["cluster"].chunk(0)
        new = np.ones(len(clusters), bool)
        new[1:] = pc.not_equal(clusters[1:], clusters[:-1]).to_numpy(zero_copy_only=False)
        of_cluster = np.flatnonzero(new)
        ends = np.append(of_cluster[1:], len(clusters))
        lengths = names["length"].to_numpy()
        totals = np.add.reduceat(lengths, of_cluster)
        for large in np.flatnonzero(totals > max_residues):
            held = 0
            for member in range(of_cluster[large], ends[large]):
                new[member] |= held + lengths[member] > max_residues
                held = lengths[member] if new[member] else held + lengths[member]
        starts = np.flatnonzero(new)
        cluster = np.searchsorted(of_cluster, starts, side="right") - 1
        return cls(
            names=names,
            residues=residues,
            order=order,
            starts=np.append(starts, len(clusters)),
            first_member=starts - of_cluster[cluster],
            cluster_size=(ends - of_cluster)[cluster],
        )

    def block_cuts(self, block_residues: int) -> list[int]:
        """Rows at which blocks begin, and the end: [blocks + 1]."""
        totals = np.concatenate([[0], np.cumsum(self.names["length"].to_numpy())])[self.starts]
        cuts = [0]
        while cuts[-1] < len(totals) - 1:
            full = int(np.searchsorted(totals, totals[cuts[-1]] + block_residues))
            cuts.append(min(full, len(totals) - 1))
        return cuts

    def table(self, first: int, end: int) -> pa.Table:
        """Rows `first` to `end - 1`, CLUSTER_ROW."""
        start, stop = self.starts[[first, end]].tolist()
        members = self.residues.take(self.order[start:stop]).cast(pa.binary())
        names = self.names.slice(start, stop - start).combine_chunks()
        offsets = pa.array(self.starts[first : end + 1] - start, pa.int32())
        return pa.table(
            {
                "cluster": names["cluster"].take(offsets[:-1]),
                "cluster_size": self.cluster_size[first:end],
                "first_member": self.first_member[first:end],
                "ids": pa.ListArray.from_arrays(offsets, names["id"].chunk(0)),
                "members": pa.ListArray.from_arrays(offsets, members),
                "lengths": pa.ListArray.from_arrays(
                    offsets, names["length"].chunk(0).cast(pa.int32())
                ),
            },
            schema=CLUSTER_ROW,
        )


def _write_split(
    rows: _ClusterRows, folder: Path, split: Split, bucket: int, block_residues: int
) -> Iterator[ShardReport]:
    cuts = rows.block_cuts(block_residues)
    for part, first in enumerate(range(0, len(cuts) - 1, MAX_ROW_GROUPS)):
        shard_cuts = cuts[first : first + MAX_ROW_GROUPS + 1]
        file = folder / f"{split}-{bucket:05d}-{part:02d}.parquet"
        yield _write_shard(rows, shard_cuts, file, split)


def _write_shard(rows: _ClusterRows, cuts: list[int], file: Path, split: Split) -> ShardReport:
    blocks = []
    counts: Counter[str] = Counter()
    lengths: Counter[str] = Counter()
    letters: Counter[str] = Counter()
    with pq.ParquetWriter(
        file, CLUSTER_ROW, compression="zstd", use_dictionary=False, write_page_checksum=True
    ) as writer:
        for group, (first, end) in enumerate(pairwise(cuts)):
            block = rows.table(first, end)
            writer.write_table(block, row_group_size=block.num_rows)
            statistics = _statistics(block)
            counts.update(statistics["counts"])
            lengths.update(statistics["lengths"])
            letters.update(statistics["residues"])
            blocks.append(
                {
                    "split": split,
                    "shard": file.name,
                    "row_group": group,
                    "rows": block.num_rows,
                    "residues": statistics["counts"]["residues"],
                    "sha256": hash_rows(block),
                }
            )
    return ShardReport(
        name=file.name,
        split=split,
        rows=cuts[-1] - cuts[0],
        bytes=file.stat().st_size,
        sha256=sha256_of_file(file),
        blocks=blocks,
        counts=dict(counts),
        lengths=dict(lengths),
        residues=dict(letters),
    )


def _statistics(block: pa.Table) -> dict[str, dict[str, int]]:
    lengths = block["lengths"].chunk(0).flatten().to_numpy()
    bins = np.bincount(lengths // LENGTH_BIN)
    residues = member_residues(block["members"].chunk(0).flatten())
    letters = count_letters(residues)
    return {
        "counts": {
            "clusters": int((block["first_member"].to_numpy() == 0).sum()),
            "sequences": len(lengths),
            "residues": int(lengths.sum()),
        },
        "lengths": {str(index * LENGTH_BIN): int(n) for index, n in enumerate(bins) if n},
        "residues": {RESIDUES[index]: int(n) for index, n in enumerate(letters) if n},
    }
