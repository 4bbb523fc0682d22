"""Equal sequences of different units, computed once.

    dedup/marks/STRETCH.parquet    digests of some units' sequences, a row group a partition
    dedup/copies/PARTITION.parquet which sequences of which units are computed by an earlier unit
    dedup/parts/UNIT.parquet       parts in which those still have no numbers

A first pass writes marks, hash-partitioned; each partition is matched by itself, so that memory
holds one of them at a time. Workers then leave copies out, and a last pass fills them in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from raptide.bulk.folder import DEDUP, PARTS, REJECT_ROW, OutputFolder
from raptide.bulk.units import Records, Source, Unit
from raptide.patience import patiently

PARTITIONS = 64
"""By the first byte of a digest."""

MARKS, COPIES, OPEN = f"{DEDUP}/marks", f"{DEDUP}/copies", f"{DEDUP}/parts"

DIGEST_BYTES = 16
"""Of SHA-256: two of 250 million sequences are taken for each other once in 10^22."""

FILE, LINE = "raptide_file", "raptide_line"
"""Columns of open parts alone: where a row stands, should it be rejected."""

PLAIN = ("id", "sequence_sha256", "length", FILE, LINE)

COPY_REASON = "killed its process: as a record with the same sequence did"

READ_GROUP_ROWS = 512
"""Rows in a row group of an open part: what is read to borrow one of them."""


@dataclass(frozen=True)
class Copies:
    """Where each unit's sequences are computed, if not by itself. Safe to pickle."""

    output: OutputFolder
    names: tuple[str, ...]
    """Of all units, in the order of the input."""

    def of(self, unit: str) -> dict[str, str]:
        """The earlier unit that computes each of a unit's copies, by the copy's digest."""
        number = self.names.index(unit)
        found: dict[str, str] = {}
        for partition in range(PARTITIONS):
            table = self._read(partition, number)
            digests = table["digest"].to_pylist()
            units = table["of"].to_pylist()
            found |= {d.hex(): self.names[o] for d, o in zip(digests, units, strict=True)}
        return found

    def _read(self, partition: int, number: int) -> pa.Table:
        path = self.output.path(f"{COPIES}/{partition:02d}.parquet")
        filesystem = self.output.storage.filesystem
        wanted = [("unit", "=", number)]
        return patiently(lambda: pq.read_table(path, filesystem=filesystem, filters=wanted))


def digest_of(sequence: str) -> str:
    """What a part calls a sequence, 64 hex digits."""
    return hashlib.sha256(sequence.encode()).hexdigest()


def short(digest: str) -> str:
    """What marks and copies call it."""
    return digest[: 2 * DIGEST_BYTES]


def find_copies(output: OutputFolder, sources: Sequence[Source], units: Sequence[Unit]) -> Copies:
    """The first pass, on the whole cluster; what is there already is not found anew."""
    copies = Copies(output, tuple(unit.name for unit in units))
    numbers = {name: number for number, name in enumerate(copies.names)}
    there = set(output.units_in(MARKS))

    def mark(stretch: list[Unit]) -> None:
        found = []
        records = sources[stretch[0].source].read(stretch)
        for unit, some in zip(stretch, records, strict=True):
            sound = [item for item, flaw in zip(some.items, some.flaws, strict=True) if not flaw]
            found.append((numbers[unit.name], list(map(digest_of, sound))))
        write_marks(output, stretch[0].name, found)

    task = ray.remote(num_cpus=1, max_retries=3)(mark)
    stretches = [
        stretch
        for index, source in enumerate(sources)
        for stretch in source.stretches([unit for unit in units if unit.source == index])
        if stretch and stretch[0].name not in there
    ]
    ray.get([task.remote(stretch) for stretch in stretches])
    matched = set(output.units_in(COPIES))
    left = [p for p in range(PARTITIONS) if f"{p:02d}" not in matched]
    ray.get([ray.remote(num_cpus=1)(match).remote(output, partition) for partition in left])
    return copies


def fill_in(copies: Copies, stamp: str) -> None:
    """The last pass, on the whole cluster."""
    there = set(copies.output.parts())
    left = [unit for unit in copies.output.units_in(OPEN) if unit not in there]
    task = ray.remote(num_cpus=1, max_retries=3)(fill)
    ray.get([task.remote(copies, unit, stamp) for unit in left])


def write_marks(
    output: OutputFolder, name: str, units: Sequence[tuple[int, Sequence[str]]]
) -> None:
    """Write down what some units hold.

    Args:
        units: each one's number, and the digests of its sequences, 64 hex digits each.
    """
    numbers = np.concatenate([np.full(len(each), number, np.int32) for number, each in units])
    texts = [digest for _, each in units for digest in each]
    digests = [bytes.fromhex(short(text)) for text in texts]
    places = np.array([digest[0] % PARTITIONS for digest in digests], np.int64)
    table = pa.table({"unit": numbers, "digest": pa.array(digests, pa.binary(DIGEST_BYTES))})

    def write(file: Any) -> None:
        with pq.ParquetWriter(file, table.schema) as writer:
            for partition in range(PARTITIONS):
                chosen = table.take(pa.array(np.flatnonzero(places == partition)))
                writer.write_table(chosen, row_group_size=max(len(chosen), 1))

    output.storage.write(f"{MARKS}/{name}.parquet", write)


def match(output: OutputFolder, partition: int) -> None:
    """Find the copies among the marks of one partition."""
    tables = []
    for name in output.storage.names(MARKS):
        path = f"{MARKS}/{name}"
        tables.append(output.read_in(path, lambda file: file.read_row_group(partition)))
    marks = pa.concat_tables(tables)
    firsts = marks.group_by("digest").aggregate([("unit", "min")])
    once = marks.group_by(["unit", "digest"]).aggregate([])
    found = once.join(firsts, "digest").rename_columns({"unit_min": "of"})
    found = found.filter(pc.not_equal(found["unit"], found["of"])).sort_by("unit")
    name = f"{COPIES}/{partition:02d}.parquet"
    output.storage.write(name, lambda file: pq.write_table(found, file))


def fill(copies: Copies, unit: str, stamp: str) -> None:
    """Make a whole part of an open one.

    A row whose numbers nobody has is rejected: the record that was to be computed in its place has
    killed the engine.
    """
    output = copies.output
    table = read_open(output, unit)
    digests = table["sequence_sha256"].to_pylist()
    values = [name for name in table.column_names if name not in PLAIN]
    lacking = np.flatnonzero(pc.is_null(table[values[0]].combine_chunks()).to_numpy(False))
    where = copies.of(unit)
    wanted: dict[str, list[int]] = {}
    for row in lacking.tolist():
        wanted.setdefault(where[short(digests[row])], []).append(row)
    places = np.arange(len(digests), dtype=np.int64)
    places[lacking] = -1
    pieces, held = [table.select(values)], len(digests)
    for name, rows in wanted.items():
        found, piece = borrow(output, name, [digests[row] for row in rows], values)
        for row, place in zip(rows, found, strict=True):
            places[row] = -1 if place is None else held + place
        pieces.append(piece)
        held += piece.num_rows
    kept = np.flatnonzero(places >= 0)
    if len(kept) < len(places):
        reject(output, unit, table.take(pa.array(np.flatnonzero(places < 0))))
    numbers = pa.concat_tables(pieces).take(pa.array(places[kept]))
    whole = table.select(["id", "sequence_sha256", "length"]).take(pa.array(kept))
    for name in values:
        whole = whole.append_column(name, numbers[name])
    output.write_part(unit, whole.combine_chunks(), stamp)


def reject(output: OutputFolder, unit: str, rows: pa.Table) -> None:
    """Add rows of an open part to its unit's rejects, once."""
    more = pa.table(
        {
            "id": rows["id"],
            "file": rows[FILE],
            "line": rows[LINE],
            "reason": [COPY_REASON] * rows.num_rows,
            "length": rows["length"],
        },
        schema=REJECT_ROW,
    )
    there = output.rejects(unit)
    there = there.filter(pc.not_equal(there["reason"], COPY_REASON))
    output.write_rejects(unit, pa.concat_tables([there, more]).sort_by("line"))


def borrow(
    output: OutputFolder, unit: str, digests: list[str], columns: list[str]
) -> tuple[list[int | None], pa.Table]:
    """Rows of another unit's part: each sequence's place in the table that is returned."""
    folder = OPEN if output.storage.holds(f"{OPEN}/{unit}.parquet") else PARTS
    name = f"{folder}/{unit}.parquet"
    there = output.read_table(name, ["sequence_sha256"])["sequence_sha256"].to_pylist()
    rows = {digest: row for row, digest in reversed(list(enumerate(there)))}
    wanted = sorted({rows[digest] for digest in digests if digest in rows})
    table = output.read_in(name, lambda part: _take(part, wanted, columns))
    places = {row: place for place, row in enumerate(wanted)}
    return [places[rows[d]] if d in rows else None for d in digests], table


def _take(part: pq.ParquetFile, wanted: list[int], columns: list[str]) -> pa.Table:
    """Some rows of a part, in order; of its row groups those alone that hold one."""
    sizes = [part.metadata.row_group(i).num_rows for i in range(part.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    groups = sorted({int(np.searchsorted(starts, row, side="right")) - 1 for row in wanted})
    tables = []
    for group in groups:
        first, last = starts[group : group + 2].tolist()
        inside = [row - first for row in wanted if first <= row < last]
        tables.append(part.read_row_group(group, columns).take(pa.array(inside)))
    schema = pa.schema([part.schema_arrow.field(name) for name in columns])
    return pa.concat_tables(tables) if tables else schema.empty_table()


def open_part(
    part: pa.Table, file: str, records: Records, kept: list[int], copies: dict[int, str]
) -> pa.Table:
    """A unit's part with its copies, which have no numbers yet.

    Args:
        part: without them; its rows are the records `kept`.
        copies: digests of the sequences of those that are computed elsewhere.
    """
    places = {index: place for place, index in enumerate(kept)}
    order = sorted([*kept, *copies])
    rows = pa.array([places.get(index) for index in order], pa.int64())
    digests = part["sequence_sha256"].to_pylist()
    plain = {
        "id": pa.array([records.ids[index] for index in order], pa.large_string()),
        "sequence_sha256": [copies[i] if i in copies else digests[places[i]] for i in order],
        "length": pa.array([records.lengths[index] for index in order], pa.int64()),
    }
    values = [name for name in part.column_names if name not in PLAIN]
    numbers = {name: part[name].combine_chunks().take(rows) for name in values}
    stand = {FILE: [file] * len(order), LINE: [records.lines[index] for index in order]}
    return pa.table({**plain, **numbers, **stand})


def write_open(output: OutputFolder, unit: str, table: pa.Table) -> None:
    output.storage.write(
        f"{OPEN}/{unit}.parquet",
        lambda file: pq.write_table(table, file, row_group_size=READ_GROUP_ROWS),
    )


def read_open(output: OutputFolder, unit: str) -> pa.Table:
    return output.read_table(f"{OPEN}/{unit}.parquet")
