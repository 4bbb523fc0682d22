"""Rows of CSV and TSV files as they stand, byte for byte, beside what their cells say."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from raptide.errors import ConfigError, InputError

DELIMITERS = ",\t;"

LONGEST_LINE = 32 << 20
LONGEST_CELL = 4 << 20
"""Bytes; a quote that is never closed makes longer ones."""


class Row(NamedTuple):
    text: bytes
    """Without the end of its line."""

    end: bytes
    """Of its line; the last row of a file may have none."""

    cells: list[str]
    line: int
    """Its first."""

    skipped: int
    """Bytes and ..."""

    skipped_lines: int
    """... lines that are empty before it."""


@dataclass(frozen=True)
class Header:
    """The first row of a table, and how its cells are told apart."""

    row: Row
    delimiter: str
    columns: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes before the next row."""
        return self.row.skipped + len(self.row.text) + len(self.row.end)

    @property
    def line(self) -> int:
        """Of the next row."""
        return self.row.line + self.row.text.count(b"\n") + 1


def read_header(file: Any, name: str, needed: str) -> Header:
    """The header of an open table, in which the column `needed` tells the delimiter.

    Raises:
        ConfigError: there is no such column.
    """
    row = next(_read(file, name, ",", 1, strict=False), None)
    if row is None:
        raise ConfigError(f"{name} is empty; a table begins with the names of its columns.")
    text = _decode(row.text).removeprefix("\ufeff")
    for delimiter in DELIMITERS:
        columns = next(csv.reader(text.splitlines(True), delimiter=delimiter))
        if needed in columns:
            return Header(row._replace(cells=columns), delimiter, tuple(columns))
    raise ConfigError(
        f"{name} has no column {needed!r} in its first line ({text[:200]!r}), told apart by "
        "commas, tabs or semicolons; rename its columns."
    )


def read_rows(file: Any, name: str, header: Header, line: int) -> Iterator[Row]:
    """The rows of an open file that stands at the beginning of one; lines without a cell are none.

    Args:
        line: its number.

    Raises:
        InputError: a quote is not closed, or what follows one is no delimiter.
    """
    return _read(file, name, header.delimiter, line, strict=True)


def _read(file: Any, name: str, delimiter: str, line: int, strict: bool) -> Iterator[Row]:
    held: list[bytes] = []

    def lines() -> Iterator[str]:
        while text := file.readline(LONGEST_LINE):
            held.append(text)
            yield _decode(text)

    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(lines(), delimiter=delimiter, strict=strict)
    skipped = skipped_lines = 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{name}:{line} cannot be read as a table ({error}); close its quotes, double "
                "those within, and end lines with a line feed."
            ) from None
        if cells is None:
            return
        text = b"".join(held)
        if cells:
            end = b"\r\n" if text.endswith(b"\r\n") else text[len(text.rstrip(b"\n")) :]
            yield Row(text.removesuffix(end), end, cells, line, skipped, skipped_lines)
            skipped = skipped_lines = 0
        else:
            skipped, skipped_lines = skipped + len(text), skipped_lines + len(held)
        line += len(held)
        held.clear()


def _decode(text: bytes) -> str:
    """UTF-8, or else Latin-1, as headers of FASTA files are read."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")
