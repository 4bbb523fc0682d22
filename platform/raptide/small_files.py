"""Small files of a folder on this machine: made whole, or appended to a line at a time.

What is made whole has its name once its last byte is there. What is appended may end in half a
line, of a writer that was killed or a disk that was full: readers pass over it.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from raptide.patience import patiently, reason_of

PIECE = 1 << 16
"""Bytes that are read at a time of a file of lines, about."""


def write_whole(file: Path, text: str) -> None:
    """Make or replace a small file, whole or not at all.

    Raises:
        OSError: the file system refuses for good, or again and again.
    """

    def write() -> None:
        with made_whole(file) as new, new.open("w") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())  # what has a name after a power cut has its bytes too

    patiently(write)


@contextmanager
def made_whole(file: Path) -> Iterator[Path]:
    """A path beside a file, whose place what is written there takes at the end of the block."""
    new = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield new
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def claim(file: IO[Any]) -> bool:
    """Lock an open file without waiting, until it is closed; False if another process has it.

    True, too, on a file system without locks. Between machines it holds where theirs are shared.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


class LinesFile:
    """Appends objects to a file of JSON, one a line; a full disk loses lines and ends nothing."""

    def __init__(self, path: Path, warn: Callable[[str], Any]) -> None:
        """
        Args:
            warn: told, in a sentence, when lines begin to be lost.
        """
        self._path, self._warn = path, warn
        self._file: Any = None
        self._losing = False

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        try:
            self._append(line)
            self._losing = False
        except OSError as error:
            self.close()  # opened again at the next line, behind what there is of this one
            if not self._losing:
                self._warn(f"{self._path} loses lines ({reason_of(error)}); make room for it.")
            self._losing = True

    def _append(self, line: bytes) -> None:
        if self._file is None:
            self._file = self._path.open("a+b", buffering=0)
            if self._file.tell():
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":
                    line = b"\n" + line  # ends the half line that is there
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, as far as they were written whole; none without a file.

    Between two pieces the file is closed: a reader may have more of them than a process may open.

    Raises:
        OSError: the file system does not give it out.
    """
    place = 0
    while True:
        try:
            lines, place = patiently(partial(_lines_from, file, place))
        except FileNotFoundError:
            return
        if not lines:
            return
        for text in lines:
            try:
                record = json.loads(text)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _lines_from(file: Path, place: int) -> tuple[list[bytes], int]:
    with file.open("rb") as opened:
        opened.seek(place)
        return opened.readlines(PIECE), opened.tell()
