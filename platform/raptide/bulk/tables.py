"""Scored tables, each of the name and kind of the one that was given, made of the parts."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raptide.bulk.folder import TABLES, OutputFolder
from raptide.bulk.sources.variants import CsvTable, ParquetTable, VariantTable
from raptide.bulk.units import prefix_of
from raptide.data.compressed import zstd

GROUP_ROWS = 1 << 16
GROUP_BYTES = 64 << 20
"""Of a Parquet file's row groups."""

COMPRESSORS: dict[str, Callable[[Any], Any]] = {
    "": nullcontext,
    "gzip": lambda file: gzip.GzipFile("", "wb", 6, file, mtime=0),
    "bzip2": partial(bz2.BZ2File, mode="wb"),
    "xz": partial(lzma.LZMAFile, mode="wb"),
    "zstd": partial(zstd.ZstdFile, mode="wb"),
}
"""Given an open file, one whose bytes go there compressed."""


def write_tables(output: OutputFolder, tables: Sequence[VariantTable], names: list[str]) -> None:
    """Write what is not there yet; parts stay, so a job that is given again has nothing to do.

    Args:
        tables: the job's sources, in order.
        names: of the score columns.
    """
    units = output.parts()
    for index, table in enumerate(tables):
        target = f"{TABLES}/{table.file}"
        if output.storage.holds(target):  # whole, and of this job: its folder holds no other's
            continue
        mine = [unit for unit in units if unit.startswith(prefix_of(index))]
        write = _writer(output, table, mine, names)
        output.storage.write(target, write)


def _writer(
    output: OutputFolder, table: VariantTable, units: list[str], names: list[str]
) -> Callable[[Any], None]:
    def write(file: Any) -> None:
        parts = _parts(output, units)
        if isinstance(table, ParquetTable):
            _write_parquet(file, table, parts, names)
            return
        assert isinstance(table, CsvTable)
        with COMPRESSORS[table.compression](file) as packed:
            _write_csv(packed, table, parts, names)

    return write


def _parts(output: OutputFolder, units: list[str]) -> Iterator[pa.Table]:
    return (output.read_part(unit) for unit in units)


def _write_csv(file: Any, table: CsvTable, parts: Iterator[pa.Table], names: list[str]) -> None:
    delimiter = table.header.delimiter
    row = table.header.row
    file.write(row.text + "".join(delimiter + name for name in names).encode() + row.end)
    for part in parts:
        columns = (part[name].to_pylist() for name in names)
        texts = (["" if value is None else repr(value) for value in column] for column in columns)
        lines = zip(
            part["row"].to_pylist(), part["end"].to_pylist(), zip(*texts, strict=True), strict=True
        )
        file.write(
            b"".join(
                text + "".join(delimiter + score for score in scores).encode() + end
                for text, end, scores in lines
            )
        )


def _write_parquet(
    file: Any, table: ParquetTable, parts: Iterator[pa.Table], names: list[str]
) -> None:
    schema = table.schema
    for name in names:
        schema = schema.append(pa.field(name, pa.float64()))
    held: list[pa.Table] = []
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for part in parts:
            held.append(part.cast(schema))
            if (
                sum(each.num_rows for each in held) >= GROUP_ROWS
                or sum(each.nbytes for each in held) >= GROUP_BYTES
            ):
                writer.write_table(pa.concat_tables(held))
                held = []
        if held:
            writer.write_table(pa.concat_tables(held))
