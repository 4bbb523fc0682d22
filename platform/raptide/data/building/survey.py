"""The first pass over the input of a corpus: which cluster each record belongs to where tables say
so, what is dropped, and how much is left. What it finds becomes notes for the second pass.

Only names and hashes are shuffled here, some 50 bytes a record; residues wait for the second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    clusters_of_headers,
    marked_table,
    named_table,
    place,
    placed_table,
)
from raptide.data.building.shuffle import range_bucket, shuffle
from raptide.data.fasta import FastaBatch, FastaPart, read_fasta

SURVEY_BYTES = 256 << 20
"""Bytes of input whose names and hashes one task of a shuffle holds."""

SUMS = {"residues": "length", "stated_members": "stated"}
"""What is summed over the kept records, and the column it comes from."""


@dataclass(frozen=True)
class Source:
    """The input as both passes read it; small, so that it travels to every task."""

    parts: Sequence[FastaPart]
    tables: Sequence[str]
    """Files of cluster tables."""

    cluster_tag: str | None
    holdout_fraction: float
    listed: Any
    """Object reference of the listed clusters' second hashes, [n] uint64, sorted."""

    notes: Path

    def marked(self, cleaning: CleaningSettings) -> ray.data.Dataset:
        """Every record without its residues (`records.marked_table`)."""
        notes = Notes(self.notes, "cluster")

        def read(batch: FastaBatch, first: int) -> pa.Table:
            placing = self._placing(self._clusters(batch, first, notes))
            return marked_table(batch, first, placing, cleaning)

        return read_parts(self.parts, read)

    def placed(self, wanted: Callable[[pa.Table], np.ndarray]) -> ray.data.Dataset:
        """Every kept record in full (`records.placed_table`).

        Args:
            wanted: which of some records to give, [n] bool.
        """
        notes, dropped = Notes(self.notes, "cluster"), Notes(self.notes, "dropped")

        def read(batch: FastaBatch, first: int) -> pa.Table:
            clusters = self._clusters(batch, first, notes)
            table = placed_table(batch, pa.array(clusters, pa.string()), self._placing(clusters))
            keep = wanted(table)
            for table_of_dropped in dropped.read(first, len(clusters)):
                keep[table_of_dropped["number"].to_numpy() - first] = False
            return table.filter(pa.array(keep))

        return read_parts(self.parts, read)

    def _clusters(self, batch: FastaBatch, first: int, notes: Notes) -> list[str]:
        clusters = list(clusters_of_headers(batch, self.cluster_tag))
        for table in notes.read(first, len(clusters)):
            numbers = (table["number"].to_numpy() - first).tolist()
            for index, cluster in zip(numbers, table["cluster"].to_pylist(), strict=True):
                clusters[index] = cluster
        return clusters

    def _placing(self, clusters: list[str]) -> pa.Table:
        return place(clusters, self.holdout_fraction, ray.get(self.listed))


def read_parts(
    parts: Sequence[FastaPart], function: Callable[[FastaBatch, int], pa.Table]
) -> ray.data.Dataset:
    """Call the function with each batch of the parts and the number of its first record, lazily."""

    # A generator: only out of those does Ray Data let our own errors through.
    def read(rows: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for index in rows["item"].tolist():
            first = first_number(index)
            for batch in read_fasta(parts[index]):
                yield function(batch, first)
                first += len(batch.names)

    indices = ray.data.from_items(list(range(len(parts))), override_num_blocks=len(parts))
    return indices.map_batches(read, batch_size=1)


def survey(source: Source, cleaning: CleaningSettings, input_bytes: int) -> dict[str, int]:
    """Write the notes; returns how many records there are of each reason, and the SUMS.

    Raises:
        FastaError: a file is no protein FASTA.
        CorpusError: a cluster table contradicts itself or the input.
    """
    buckets = 1 + input_bytes // SURVEY_BYTES
    if source.tables:
        _note_clusters(source, buckets)

    def mark(bucket: int, records: pa.Table) -> pa.Table:
        reasons = reasons_by_copies(records, cleaning.drop_duplicates)
        return _dropped_and_totals(records, reasons)

    by_content = partial(_range_of, "content", buckets)
    marked = shuffle(source.marked(cleaning), buckets, by_content, mark).materialize()
    total = dict.fromkeys([*REASONS, *SUMS], 0)
    for table in marked.iter_batches(batch_size=None, batch_format="pyarrow"):
        for totals in table["totals"].drop_null().to_pylist():
            total = {name: count + totals[name] for name, count in total.items()}
    if total[REASONS[KEPT]] < sum(total[reason] for reason in REASONS):
        dropped = marked.map_batches(_dropped, batch_format="pyarrow", batch_size=None)
        _write_notes(source.notes, "dropped", dropped, buckets)
    return total


def _dropped_and_totals(records: pa.Table, reasons: np.ndarray) -> pa.Table:
    """A row with the number of each dropped record, and one with how many there are of each reason
    and the sums over what is kept."""
    counts = np.bincount(reasons, minlength=len(REASONS)).tolist()
    totals = dict(zip(REASONS, counts, strict=True))
    for total, column in SUMS.items():
        totals[total] = int(records[column].to_numpy()[reasons == KEPT].sum())
    dropped = records["number"].to_numpy()[reasons != KEPT]
    return pa.table(
        {"number": [*dropped, None], "totals": [None] * len(dropped) + [totals]},
        schema=pa.schema(
            [
                ("number", pa.int64()),
                ("totals", pa.struct([(name, pa.int64()) for name in totals])),
            ]
        ),
    )


def _dropped(table: pa.Table) -> pa.Table:
    return table.filter(pc.is_valid(table["number"])).select(["number"])


def _note_clusters(source: Source, buckets: int) -> None:
    """Join the lines of the cluster tables with the records they name."""

    def read(files: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for file in files["item"]:
            yield from read_membership(str(file))

    lines = ray.data.from_items(list(source.tables), override_num_blocks=len(source.tables))
    rows = read_parts(source.parts, named_table).union(lines.map_batches(read, batch_size=1))
    by_name = partial(_range_of, "name_hash", buckets)
    joined = shuffle(rows, buckets, by_name, lambda bucket, table: join_membership(table))
    _write_notes(source.notes, "cluster", joined, buckets)


def _write_notes(folder: Path, kind: str, notes: ray.data.Dataset, buckets: int) -> None:
    def write(bucket: int, table: pa.Table) -> pa.Table:
        Notes(folder, kind).write(table)
        return pa.table({"notes": [table.num_rows]})

    def by_chunk(table: pa.Table) -> np.ndarray:
        return chunk_bucket(table["number"], buckets)

    shuffle(notes, buckets, by_chunk, write).take_all()


def _range_of(column: str, buckets: int, table: pa.Table) -> np.ndarray:
    return range_bucket(table[column], buckets)
