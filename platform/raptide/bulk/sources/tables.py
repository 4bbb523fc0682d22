"""Records of Parquet tables with the columns `id` and `sequence`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raptide.alphabet import decode_residues, encode_residues
from raptide.bulk.units import Cutter, Records, Sizes, Survey, Unit, short_stretches
from raptide.errors import ConfigError, SequenceError
from raptide.patience import patiently
from raptide.storage import Storage

BATCH_ROWS = 4096
CHUNK = 1 << 22

PARQUET = b"PAR1"


@dataclass(frozen=True)
class ParquetFile:
    """One Parquet file: `id` and `sequence` are strings."""

    storage: Storage
    file: str

    @property
    def name(self) -> str:
        return self.storage.full(self.file)

    def survey(self, index: int, sizes: Sizes) -> Survey:
        digest = sha256_of(self.storage, self.name)
        with self._open() as table:
            lengths = (
                pc.binary_length(pc.cast(batch["sequence"], pa.large_string())).fill_null(0)
                for batch in table.iter_batches(BATCH_ROWS, columns=["sequence"])
            )
            return Survey(digest, units_of_rows(index, digest, sizes, lengths))

    def stretches(self, units: list[Unit]) -> Iterator[list[Unit]]:
        return short_stretches(units)

    def read(self, units: Sequence[Unit]) -> Iterator[Records]:
        with self._open() as file:
            rows = RowReader(file, units[0].first, ["id", "sequence"])
            for unit in units:
                table = rows.take(unit.first, unit.records)
                names = pc.cast(table["id"], pa.large_string()).to_pylist()
                letters = pc.cast(table["sequence"], pa.large_string()).to_pylist()
                ids = ["" if name is None else name for name in names]
                yield judge(ids, letters, unit.first + 1)

    def _open(self) -> pq.ParquetFile:
        return open_parquet(self.storage, self.name, ("id", "sequence"))


def is_parquet(storage: Storage, file: str) -> bool:
    """Told by its first bytes.

    Raises:
        ConfigError: it cannot be read.
    """
    path = storage.full(file)

    def look() -> bool:
        with storage.filesystem.open_input_file(path) as opened:
            return opened.read(len(PARQUET)) == PARQUET

    try:
        return patiently(look)
    except OSError as error:
        raise ConfigError(
            f"--input {path} cannot be read ({error.strerror or error}); change its permissions, "
            "or leave it out."
        ) from None


def open_parquet(storage: Storage, path: str, needed: Sequence[str]) -> pq.ParquetFile:
    """Open a Parquet file that has some columns.

    Raises:
        ConfigError: it is none, or has not.
    """
    try:
        file = pq.ParquetFile(patiently(lambda: storage.filesystem.open_input_file(path)))
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is no whole Parquet file ({reason}); write it again.") from None
    lacking = [name for name in needed if name not in file.schema_arrow.names]
    if lacking:
        there = ", ".join(file.schema_arrow.names)[:200]
        raise ConfigError(
            f"{path} needs the columns {' and '.join(needed)}, but has no "
            f"{' and no '.join(lacking)} among {there}; rename its columns."
        )
    return file


class RowReader:
    """Rows of a Parquet file in order, from some row on, a bounded number in memory."""

    def __init__(self, file: pq.ParquetFile, first: int, columns: list[str] | None) -> None:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        group = max(0, int(np.searchsorted(starts, first, side="right")) - 1)
        self._place = int(starts[group])
        groups = list(range(group, len(sizes)))
        self._batches = file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns)
        self._held: list[Any] = []

    def take(self, first: int, count: int) -> pa.Table:
        """`count` rows from the `first`-th on; what lies before is passed over."""
        while True:
            held = sum(batch.num_rows for batch in self._held)
            if self._place + held >= first + count:
                break
            batch = next(self._batches)
            while self._held and self._place + self._held[0].num_rows <= first:
                self._place += self._held.pop(0).num_rows
            self._held.append(batch)
        table = pa.Table.from_batches(self._held)
        taken = table.slice(first - self._place, count)
        self._held = table.slice(first - self._place + count).to_batches()
        self._place = first + count
        return taken


def units_of_rows(source: int, digest: str, sizes: Sizes, lengths: Iterator[Any]) -> list[Unit]:
    """Units of a table, given its rows' residues batch by batch."""
    cutter = Cutter(sizes)
    begun, residues, rows = [(0, 0)], 0, 0
    for batch in lengths:
        counts = np.asarray(batch, np.int64)
        sums = np.concatenate([[0], np.cumsum(counts)])
        begun += [(rows + end, residues + int(sums[end])) for end in cutter.ends(counts, counts)]
        rows += len(counts)
        residues += int(sums[-1])
    stops = [*begun[1:], (rows, residues)]
    return [
        Unit(source, digest, first, stop - first, end - begin, 0, 0, first + 1)
        for (first, begin), (stop, end) in zip(begun, stops, strict=True)
        if stop > first
    ]


def judge(ids: list[str], sequences: Sequence[str | None], first_line: int) -> Records:
    """Records as they stand in a table; what is no protein is flawed, not refused."""
    found = Records(ids, [], [], list(range(first_line, first_line + len(ids))), [])
    for letters in sequences:
        residues, flaw = read_letters(letters or "")
        found.items.append("" if flaw else decode_residues(residues))
        found.lengths.append(len(residues) if not flaw else len(letters or ""))
        found.flaws.append(flaw)
    return found


def read_letters(letters: str) -> tuple[np.ndarray, str]:
    """Residue ids of some letters, and why they are none, or ""."""
    if not letters.strip():
        return np.empty(0, np.uint8), "empty: no residues"
    try:
        return encode_residues(letters), ""
    except SequenceError as error:
        return np.empty(0, np.uint8), f"bad letters: {error}"


def sha256_of(storage: Storage, path: str) -> str:
    def digest() -> str:
        whole = hashlib.sha256()
        with storage.filesystem.open_input_stream(path) as file:
            while chunk := file.read(CHUNK):
                whole.update(chunk)
        return whole.hexdigest()

    return patiently(digest)
