"""Tables whose rows name a protein and a variant of it; all rows and columns pass through."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raptide.bulk.sources.files import Layout, Marks, open_plainly, skip_to, stretches_of_file
from raptide.bulk.sources.mutants import MUTANT, Meaning, Proteins, choose_meaning
from raptide.bulk.sources.rows import Header, Row, read_header, read_rows
from raptide.bulk.sources.tables import (
    BATCH_ROWS,
    RowReader,
    is_parquet,
    open_parquet,
    sha256_of,
)
from raptide.bulk.units import Cutter, Records, Sizes, Survey, Unit, short_stretches
from raptide.bulk.variants import VariantWork
from raptide.data.compressed import compression_of
from raptide.errors import ConfigError, InputError
from raptide.storage import Storage

TARGET = b"target_sequence"
"""In a Parquet file's metadata."""


class _Rows(NamedTuple):
    """Some consecutive rows, n of them."""

    columns: dict[str, list[str]]
    """The cells that are looked at, [n] each; null is ""."""

    layout: Layout
    """Where they stand; its residues are not known yet."""


@dataclass(frozen=True)
class VariantTable(ABC):
    """What CSV and Parquet tables have in common."""

    storage: Storage
    file: str
    """Within the storage: what the scored table will be called, too."""
    meaning: Meaning

    @property
    def name(self) -> str:
        return self.storage.full(self.file)

    @property
    @abstractmethod
    def columns(self) -> Sequence[str]:
        """Their names, in order."""

    @abstractmethod
    def survey(self, index: int, sizes: Sizes) -> Survey: ...

    @abstractmethod
    def stretches(self, units: list[Unit]) -> Iterator[list[Unit]]: ...

    @abstractmethod
    def read(self, units: Sequence[Unit]) -> Iterator[Records]: ...

    def _survey(
        self, index: int, sizes: Sizes, batches: Iterable[_Rows], marks: Marks, digest: Any
    ) -> Survey:
        assert isinstance(sizes, VariantWork), "only variants are computed of such tables"
        cutter = Cutter(sizes)
        for rows in batches:
            given = self._given(rows.columns)
            letters = list(map(self.meaning.letters, given))
            lengths = np.array(list(map(len, letters)), np.int64)
            # Mutants of one length count as one protein's; to put each back would take long.
            proteins = lengths.tolist() if self.meaning.by == "mutated_sequence" else letters
            variants = rows.columns[MUTANT]
            tokens = sizes.tokens_beside(proteins, lengths.tolist(), variants)
            ends = cutter.ends(lengths, rows.layout.bytes + lengths, tokens)
            marks.add(rows.layout._replace(residues=lengths), ends)
        if self.meaning.proteins:
            digest.update(self.meaning.proteins.digest.encode())
        units = marks.units(index, digest.hexdigest())
        return Survey(digest.hexdigest(), [unit for unit in units if unit.records])

    def _records(self, columns: dict[str, list[str]], lines: list[int], kept: pa.Table) -> Records:
        mutants = columns[MUTANT]
        pairs = zip(self._given(columns), mutants, strict=True)
        judged = [self.meaning.judge(given, mutant) for given, mutant in pairs]
        items, lengths, flaws = zip(*judged, strict=True)
        names = columns.get("id", mutants)
        return Records(names, list(items), list(lengths), lines, list(flaws), kept)

    def _given(self, columns: dict[str, list[str]]) -> list[str]:
        return columns.get(self.meaning.by, [""] * len(columns[MUTANT]))


@dataclass(frozen=True)
class CsvTable(VariantTable):
    """CSV, TSV or what semicolons separate, plain or compressed. Kept are a row's bytes."""

    header: Header
    compression: str
    """As in `data/compressed.py`; "" for none."""

    @property
    def columns(self) -> Sequence[str]:
        return self.header.columns

    def survey(self, index: int, sizes: Sizes) -> Survey:
        digest = hashlib.sha256()
        marks = Marks(self.header.size, self.header.line)
        with open_plainly(self.storage, self.file, self.name, InputError, digest) as file:
            skip_rows(file, self.header.size)
            rows = self._batches(read_rows(file, self.name, self.header, self.header.line))
            return self._survey(index, sizes, rows, marks, digest)

    def _batches(self, rows: Iterator[Row]) -> Iterator[_Rows]:
        while batch := [row for _, row in zip(range(BATCH_ROWS), rows, strict=False)]:
            sizes = np.array([row.skipped + len(row.text) + len(row.end) for row in batch])
            lines = [row.skipped_lines + row.text.count(b"\n") + 1 for row in batch]
            starts = np.cumsum(sizes) - sizes
            layout = Layout(int(sizes.sum()), starts, sizes, np.array(lines), np.empty(0, np.int64))
            yield _Rows(self._columns(batch), layout)

    def stretches(self, units: list[Unit]) -> Iterator[list[Unit]]:
        return stretches_of_file(self.storage, self.file, units)

    def read(self, units: Sequence[Unit]) -> Iterator[Records]:
        with open_plainly(self.storage, self.file, self.name, InputError) as file:
            place = 0
            for unit in units:
                place = skip_to(file, place, unit.start, self.name, ConfigError)
                found = read_rows(file, self.name, self.header, unit.line)
                rows = [row for _, row in zip(range(unit.records), found, strict=False)]
                place += sum(row.skipped + len(row.text) + len(row.end) for row in rows)
                yield self._unit(rows)

    def _unit(self, rows: list[Row]) -> Records:
        wide = len(self.header.columns)
        fill = self.header.delimiter.encode()
        texts = [row.text + fill * (wide - len(row.cells)) for row in rows]
        kept = pa.table(
            {
                "row": pa.array(texts, pa.large_binary()),
                "end": pa.array([row.end for row in rows], pa.binary()),
            }
        )
        found = self._records(self._columns(rows), [row.line for row in rows], kept)
        for place, row in enumerate(rows):
            if len(row.cells) != wide:
                found.flaws[place] = f"misshapen: {len(row.cells)} cells in {wide} columns"
        return found

    def _columns(self, rows: list[Row]) -> dict[str, list[str]]:
        columns = self.header.columns
        places = {name: columns.index(name) for name in self.meaning.choose(columns)}
        return {
            name: [row.cells[place] if place < len(row.cells) else "" for row in rows]
            for name, place in places.items()
        }


def skip_rows(file: Any, size: int) -> None:
    """Read on to a byte, so that what is skipped is hashed too."""
    while size:
        size -= len(file.read(size))


@dataclass(frozen=True)
class ParquetTable(VariantTable):
    """Parquet. Kept are all columns."""

    schema: pa.Schema

    @property
    def columns(self) -> Sequence[str]:
        return self.schema.names

    def survey(self, index: int, sizes: Sizes) -> Survey:
        digest = hashlib.sha256(sha256_of(self.storage, self.name).encode())
        with self._open() as file:
            metadata = file.metadata
            groups = [metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
            row_bytes = sum(groups) // max(metadata.num_rows, 1)
            return self._survey(index, sizes, self._batches(file, row_bytes), Marks(), digest)

    def _batches(self, file: pq.ParquetFile, row_bytes: int) -> Iterator[_Rows]:
        columns = self.meaning.choose(self.schema.names)
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            nothing = np.zeros(batch.num_rows, np.int64)
            layout = Layout(0, nothing, nothing + row_bytes, nothing + 1, nothing)
            yield _Rows(self._columns(batch), layout)

    def stretches(self, units: list[Unit]) -> Iterator[list[Unit]]:
        return short_stretches(units)

    def read(self, units: Sequence[Unit]) -> Iterator[Records]:
        with self._open() as file:
            rows = RowReader(file, units[0].first, None)
            for unit in units:
                table = rows.take(unit.first, unit.records)
                lines = range(unit.first + 1, unit.first + unit.records + 1)
                yield self._records(self._columns(table), list(lines), table)

    def _columns(self, table: Any) -> dict[str, list[str]]:
        return {
            name: pc.cast(table[name], pa.large_string()).fill_null("").to_pylist()
            for name in self.meaning.choose(self.schema.names)
        }

    def _open(self) -> pq.ParquetFile:
        return open_parquet(self.storage, self.name, (MUTANT,))


def open_table(storage: Storage, file: str, offset: int, proteins: Proteins | None) -> VariantTable:
    """A table, before any row of it is read.

    Raises:
        ConfigError: it cannot be read, or its columns name no variants.
    """
    name = storage.full(file)
    if is_parquet(storage, file):
        with open_parquet(storage, name, ()) as table:
            schema = table.schema_arrow
        target = (schema.metadata or {}).get(TARGET, b"").decode()
        meaning = choose_meaning(name, schema.names, target, offset, proteins)
        for column in meaning.choose(schema.names):
            _refuse_no_text(name, column, schema.field(column).type)
        return ParquetTable(storage, file, meaning, schema)
    with open_plainly(storage, file, name, InputError) as plain:
        header = read_header(plain, name, MUTANT)
    with storage.filesystem.open_input_file(name) as raw:
        compression = compression_of(io.BufferedReader(raw))
    meaning = choose_meaning(name, header.columns, "", offset, proteins)
    return CsvTable(storage, file, meaning, header, compression)


def _refuse_no_text(name: str, column: str, kind: pa.DataType) -> None:
    try:
        pa.nulls(0, kind).cast(pa.large_string())
    except pa.ArrowNotImplementedError:
        raise ConfigError(
            f"{name} has a column {column!r} of type {kind}, which is no text; write it as strings."
        ) from None
