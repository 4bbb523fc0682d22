"""Items as a source of bulk jobs: a Parquet file of our own making, its units cut by real costs."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raptide.bulk.units import Cutter, Records, Sizes, Survey, Unit, short_stretches
from raptide.data.corpus_files import sha256_of_file
from raptide.evaluation.subjects.items import Item

ROWS = 1024
"""Of a row group."""

SCHEMA = pa.schema([("item", pa.large_string()), ("tokens", pa.int64()), ("bytes", pa.int64())])


def write_items(path: Path, items: Sequence[Item], width: int) -> None:
    """Write what is to be read off a model whose vectors have `width` values."""
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for start in range(0, len(items), ROWS):
            some = items[start : start + ROWS]
            columns = [
                [item.write() for item in some],
                [item.tokens for item in some],
                [4 * item.floats(width) for item in some],
            ]
            writer.write_table(pa.table(columns, schema=SCHEMA))


@dataclass(frozen=True)
class ItemFile:
    """A file that `write_items` wrote."""

    path: str

    @property
    def name(self) -> str:
        return self.path

    def survey(self, index: int, sizes: Sizes) -> Survey:
        digest = hashlib.sha256(sha256_of_file(Path(self.path)).encode()).hexdigest()
        with pq.ParquetFile(self.path) as file:
            costs = file.read(["tokens", "bytes"])
        tokens, outputs = (costs[name].to_numpy() for name in ("tokens", "bytes"))
        ends = Cutter(_Known(outputs)).ends(tokens, np.zeros_like(tokens), tokens)
        bounds = sorted({0, *ends, len(tokens)})
        sums = np.concatenate([[0], np.cumsum(tokens)])
        units = [
            Unit(index, digest, first, stop - first, int(sums[stop] - sums[first]), 0, 0, first)
            for first, stop in itertools.pairwise(bounds)
        ]
        return Survey(digest, units)

    def stretches(self, units: list[Unit]) -> Iterator[list[Unit]]:
        return short_stretches(units)

    def read(self, units: Sequence[Unit]) -> Iterator[Records]:
        with pq.ParquetFile(self.path) as file:
            for unit in units:
                yield self._read(file, unit)

    def _read(self, file: pq.ParquetFile, unit: Unit) -> Records:
        first = unit.first // ROWS
        last = (unit.first + unit.records - 1) // ROWS
        table = file.read_row_groups(list(range(first, last + 1)), ["item", "tokens"])
        table = table.slice(unit.first - first * ROWS, unit.records)
        ids = list(map(str, range(unit.first, unit.first + unit.records)))
        items, tokens = table["item"].to_pylist(), table["tokens"].to_pylist()
        return Records(ids, items, tokens, [0] * len(ids), [""] * len(ids))


@dataclass(frozen=True)
class _Known:
    """Sizes of all records, known one by one."""

    outputs: np.ndarray

    def tokens(self, residues: np.ndarray) -> np.ndarray:
        return residues

    def output_bytes(self, residues: np.ndarray) -> np.ndarray:
        return self.outputs
