"""The first pass over the input of a corpus: which cluster each record belongs to where tables say
so, what is dropped, and how much is left. What it finds becomes notes for the second pass.

Only names and hashes are shuffled here, some 50 bytes a record; residues wait for the second pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from raptide.data.building.cleaning import KEPT, REASONS, CleaningSettings, reasons_by_copies
from raptide.data.building.membership import join_membership, read_membership
from raptide.data.building.notes import Notes, chunk_bucket, first_number
from raptide.data.building.records import (
    is_listed,
    listed_hashes,
    marked_table,
    named_table,
    place,
    placed_table,
    tagged_clusters,
)
from raptide.data.building.shuffle import range_bucket, shuffle
from raptide.data.fasta import FastaBatch, ReadingRules, read_fasta
from raptide.data.fasta_text import FastaPart
from raptide.errors import CorpusError
from raptide.small_files import made_whole

SURVEY_BYTES = 256 << 20
"""Bytes of input whose names and hashes one task of a shuffle holds."""

MEMBERS = "listed_members.npy"
"""Hashes of the listed names that are records."""

SUMS = {
    "residues": "length",
    "stated_members": "stated",
    "latin1_headers": "latin1",
    "tagged": "tagged",
    "unclustered": "alone",
}
"""What is summed over the kept records, and the column it comes from."""


@dataclass(frozen=True)
class Survey:
    """What there is, and what is dropped."""

    reasons: dict[str, int]
    """Records of each of the REASONS."""

    first: dict[str, int]
    """The number of the first record of each reason that there is, less the kept ones."""

    sums: dict[str, int]
    """SUMS over the kept records."""

    hash_signs: int
    """Longest run of # before digits at the end of a name."""

    listed_found: list[int]
    """Of the listed held-out clusters, the `records.listed_hashes` of those that were met."""


@dataclass(frozen=True)
class Source:
    """The input as both passes read it; small, so that it travels to every task."""

    parts: Sequence[FastaPart]
    tables: Sequence[str]
    """Files of cluster tables."""

    cluster_tag: str | None
    holdout_fraction: float
    rules: ReadingRules
    listed: Any
    """Object reference of the listed clusters' `records.listed_hashes`, [n] uint64, sorted; in the
    first pass of the listed members', too."""

    strict_tables: bool
    """Whether a table may name members that the input has not."""

    keep_unclustered: bool
    """Whether records that no table and no header puts into a cluster are clusters of one."""

    notes: Path

    def marked(self, cleaning: CleaningSettings) -> ray.data.Dataset:
        """Every record without its residues (`records.marked_table`)."""
        notes = Notes(self.notes, "cluster")

        def read(batch: FastaBatch, first: int) -> pa.Table:
            tags = tagged_clusters(batch, self.cluster_tag)
            found = self._found(first, tags, notes)
            placing = self._placing(_or_own(found, batch))
            placing = placing.append_column("alone", pc.is_null(pa.array(found, pa.string())))
            return marked_table(
                batch, first, placing, tags, cleaning, keep_unclustered=self.keep_unclustered
            )

        return self.read(read)

    def placed(self, wanted: Callable[[pa.Table], np.ndarray]) -> ray.data.Dataset:
        """Every kept record in full (`records.placed_table`).

        Args:
            wanted: which of some records to give, [n] bool.
        """
        notes, dropped = Notes(self.notes, "cluster"), Notes(self.notes, "dropped")

        def read(batch: FastaBatch, first: int) -> pa.Table:
            tags = tagged_clusters(batch, self.cluster_tag)
            clusters = _or_own(self._found(first, tags, notes), batch)
            table = placed_table(batch, pa.array(clusters, pa.string()), self._placing(clusters))
            keep = wanted(table)
            for table_of_dropped in dropped.read(first, len(clusters)):
                keep[table_of_dropped["number"].to_numpy() - first] = False
            return table.filter(pa.array(keep))

        return self.read(read)

    def listed_members(self) -> ray.data.Dataset:
        """Listed names that are records, and the clusters of these: columns member and cluster,
        both `records.listed_hashes`."""
        notes = Notes(self.notes, "cluster")

        def read(batch: FastaBatch, first: int) -> pa.Table:
            members = listed_hashes(batch.names)
            chosen = is_listed(members, ray.get(self.listed))
            found = self._found(first, tagged_clusters(batch, self.cluster_tag), notes)
            clusters = np.array(_or_own(found, batch), object)[chosen].tolist()
            return pa.table({"member": members[chosen], "cluster": listed_hashes(clusters)})

        return self.read(read)

    def read(self, function: Callable[[FastaBatch, int], pa.Table]) -> ray.data.Dataset:
        """Call the function with each batch of the input and the number of its first record."""
        return read_parts(self.parts, self.rules, function)

    def _found(self, first: int, tags: list[str | None], notes: Notes) -> list[str | None]:
        """The cluster of each record, by a table or else by its header, or None."""
        found = list(tags)
        for table in notes.read(first, len(found)):
            numbers = (table["number"].to_numpy() - first).tolist()
            for index, cluster in zip(numbers, table["cluster"].to_pylist(), strict=True):
                found[index] = cluster
        return found

    def _placing(self, clusters: list[str]) -> pa.Table:
        return place(clusters, self.holdout_fraction, ray.get(self.listed))


def _or_own(found: list[str | None], batch: FastaBatch) -> list[str]:
    """A record without a cluster is one of its own."""
    return [cluster or name for cluster, name in zip(found, batch.names, strict=True)]


def read_parts(
    parts: Sequence[FastaPart], rules: ReadingRules, function: Callable[[FastaBatch, int], pa.Table]
) -> ray.data.Dataset:
    """Call the function with each batch of the parts and the number of its first record, lazily."""

    # A generator: only out of those does Ray Data let our own errors through.
    def read(rows: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for index in rows["item"].tolist():
            first = first_number(index)
            for batch in read_fasta(parts[index], rules=rules):
                yield function(batch, first)
                first += len(batch.names)

    indices = ray.data.from_items(list(range(len(parts))), override_num_blocks=len(parts))
    return indices.map_batches(read, batch_size=1)


def survey(source: Source, cleaning: CleaningSettings, input_bytes: int) -> Survey:
    """Write the notes.

    Raises:
        FastaError: a file is no protein FASTA.
        CorpusError: a cluster table contradicts itself or the input.
    """
    buckets = 1 + input_bytes // SURVEY_BYTES
    if source.tables:
        _note_clusters(source, buckets)
    source = _with_clusters_of_members(source)

    def mark(bucket: int, records: pa.Table) -> pa.Table:
        reasons = reasons_by_copies(records, cleaning.drop_duplicates)
        return _dropped_and_totals(records, reasons)

    by_content = partial(_range_of, "content", buckets)
    marked = shuffle(source.marked(cleaning), buckets, by_content, mark)
    total = Survey(dict.fromkeys(REASONS, 0), {}, dict.fromkeys(SUMS, 0), 0, [])
    for result in marked:
        for found in ray.get(result)["found"].drop_null().to_pylist():
            total = _add(total, Survey(**json.loads(found)))
    if total.first:
        dropped = ray.data.from_arrow_refs(marked)
        dropped = dropped.map_batches(_dropped, batch_format="pyarrow", batch_size=None)
        _write_notes(source.notes, "dropped", dropped, buckets)
    return total


def _dropped_and_totals(records: pa.Table, reasons: np.ndarray) -> pa.Table:
    """A row with the number of each dropped record, and one with the Survey of these records."""
    numbers, kept = records["number"].to_numpy(), reasons == KEPT
    counts = np.bincount(reasons, minlength=len(REASONS)).tolist()
    listed = np.unique(records["listed"].to_numpy())
    found = Survey(
        reasons=dict(zip(REASONS, counts, strict=True)),
        first={
            reason: int(numbers[reasons == index].min())
            for index, reason in enumerate(REASONS)
            if index != KEPT and counts[index]
        },
        sums={
            total: int(records[column].to_numpy(zero_copy_only=False)[kept].sum())
            for total, column in SUMS.items()
        },
        hash_signs=int(records["hashes"].to_numpy().max(initial=0)),
        listed_found=listed[listed != 0].tolist(),
    )
    dropped = numbers[~kept]
    return pa.table(
        {
            "number": [*dropped, None],
            "found": [None] * len(dropped) + [json.dumps(asdict(found))],
        },
        schema=pa.schema([("number", pa.int64()), ("found", pa.large_string())]),
    )


def _add(one: Survey, other: Survey) -> Survey:
    first = dict(other.first)
    for reason, number in one.first.items():
        first[reason] = min(number, first.get(reason, number))
    return Survey(
        reasons={name: count + other.reasons[name] for name, count in one.reasons.items()},
        first=first,
        sums={name: count + other.sums[name] for name, count in one.sums.items()},
        hash_signs=max(one.hash_signs, other.hash_signs),
        listed_found=np.union1d(
            np.array(one.listed_found, np.uint64), np.array(other.listed_found, np.uint64)
        ).tolist(),
    )


def _dropped(table: pa.Table) -> pa.Table:
    return table.filter(pc.is_valid(table["number"])).select(["number"])


def _note_clusters(source: Source, buckets: int) -> None:
    """Join the lines of the cluster tables with the records they name."""

    def read(files: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for file in files["item"]:
            yield from read_membership(str(file))

    lines = ray.data.from_items(list(source.tables), override_num_blocks=len(source.tables))
    rows = source.read(named_table).union(lines.map_batches(read, batch_size=1))
    by_name = partial(_range_of, "name_hash", buckets)
    strict = source.strict_tables
    joined = shuffle(rows, buckets, by_name, lambda bucket, table: join_membership(table, strict))
    notes = ray.data.from_arrow_refs(joined)
    if not _write_notes(source.notes, "cluster", notes, buckets):
        raise CorpusError(
            "No line of the cluster tables names a record of the input; give the table that "
            "belongs to these files."
        )


def _with_clusters_of_members(source: Source) -> Source:
    """List the clusters of listed members, too; which those are is noted in MEMBERS."""
    listed = ray.get(source.listed)
    members, clusters = [np.zeros(0, np.uint64)], [listed]
    if len(listed) and (source.tables or source.cluster_tag):
        found = source.listed_members()
        for table in found.iter_batches(batch_size=None, batch_format="pyarrow"):
            members.append(table["member"].to_numpy())
            clusters.append(table["cluster"].to_numpy())
    with made_whole(source.notes / MEMBERS) as file, file.open("wb") as opened:
        np.save(opened, np.unique(np.concatenate(members)))
    return replace(source, listed=ray.put(np.unique(np.concatenate(clusters))))


def _write_notes(folder: Path, kind: str, notes: ray.data.Dataset, buckets: int) -> int:
    """Returns how many there are."""

    def write(bucket: int, table: pa.Table) -> pa.Table:
        Notes(folder, kind).write(table)
        return pa.table({"notes": [table.num_rows]})

    def by_chunk(table: pa.Table) -> np.ndarray:
        return chunk_bucket(table["number"], buckets)

    written = shuffle(notes, buckets, by_chunk, write)
    return sum(pc.sum(table["notes"]).as_py() for table in map(ray.get, written))


def _range_of(column: str, buckets: int, table: pa.Table) -> np.ndarray:
    return range_bucket(table[column], buckets)
