"""Any file as plain bytes: gz, bz2, xz and zst, told by their first bytes and not by their names.

A compressed file is a row of frames (gzip calls them members, xz and bz2 streams). All are read,
zstd's skippable ones too, as pzstd writes them. Zeros after a gz or xz frame are padding. Anything
else that follows a frame is refused: what a decoder passes over in silence, nobody misses in time.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from isal import igzip_lib

from raptide.errors import InputError
from raptide.patience import patiently

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

READ_BYTES = 1 << 20
"""Bytes that are read, and at most given out, at once."""

LONGEST_MAGIC = 6

STANDARD_INPUT = "-"
"""The path that stands for standard input."""


class _Format(NamedTuple):
    name: str
    magic: re.Pattern[bytes]
    """What every frame begins with."""
    decompressor: Callable[[], Any]
    padded: bool
    """Whether zeros may stand between and after frames."""


FORMATS = (
    _Format(
        "gzip",
        re.compile(rb"\x1f\x8b"),
        lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP),
        True,
    ),
    _Format("bzip2", re.compile(rb"BZh[1-9]"), bz2.BZ2Decompressor, False),
    _Format(
        "xz", re.compile(rb"\xfd7zXZ\x00"), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), True
    ),
    _Format(
        "zstd",
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        zstd.ZstdDecompressor,
        False,
    ),
)

DECODER_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    ValueError,
    cast(type[Exception], igzip_lib.IsalError),
    lzma.LZMAError,
    zstd.ZstdError,
)


def open_plain(path: str | Path, error: type[InputError] = InputError) -> io.BufferedReader:
    """Open a file for reading, decompressed; a pipe, or standard input (`-`), as well.

    Args:
        error: what is raised, also while reading, where the file is damaged.

    Raises:
        OSError: the file system refuses, also while reading, for good or again and again.
    """
    if str(path) == STANDARD_INPUT:
        return decompress(io.FileIO(0, closefd=False), str(path), error)
    return decompress(patiently(lambda: _PatientFile(path)), str(path), error)


def decompress(raw: Any, path: str, error: type[InputError] = InputError) -> io.BufferedReader:
    """The same for an open file; `path` is what messages call it."""
    # Of a pipe, a first read may bring less than a format is told by.
    file: io.BufferedReader = io.BufferedReader(raw if raw.seekable() else cast(Any, _Pipe(raw)))
    kind = _format_of(file)
    if kind is None:
        return file
    frames = _Frames(file, kind, lambda reason: error(f"{path}: {reason}"))
    return io.BufferedReader(cast(io.RawIOBase, frames), READ_BYTES)


def is_compressed(path: str | Path) -> bool:
    with Path(path).open("rb") as file:
        return compression_of(file) != ""


def compression_of(file: io.BufferedReader) -> str:
    """Of an open file at its start, where it stays: gzip, bzip2, xz, zstd, or "" if it is plain."""
    kind = _format_of(file)
    return kind.name if kind else ""


def _format_of(file: io.BufferedReader) -> _Format | None:
    start = file.peek(LONGEST_MAGIC)[:LONGEST_MAGIC]
    return next((each for each in FORMATS if each.magic.match(start)), None)


class _PatientFile(io.FileIO):
    """What the file system does not give out at first is asked for again, of the file opened anew:
    a handle that is stale stays so."""

    def readinto(self, buffer: Any) -> int:
        return patiently(partial(self._attempt, buffer))

    def _attempt(self, buffer: Any) -> int:
        try:
            return os.readv(self.fileno(), [buffer])
        except OSError:
            if self.seekable():
                place = self.tell()
                with io.FileIO(self.name) as again:
                    os.dup2(again.fileno(), self.fileno())
                self.seek(place)
            raise


class _Pipe(io.RawIOBase):
    """A pipe whose first read brings at least LONGEST_MAGIC bytes, if there are as many."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self._least = LONGEST_MAGIC

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)
        while 0 < count < self._least and (more := self._raw.readinto(memoryview(buffer)[count:])):
            count += more
        self._least = 0
        return count


class _Frames(io.RawIOBase):
    """The frames of one file, one after the other."""

    def __init__(self, file: BinaryIO, kind: _Format, error: Callable[[str], InputError]) -> None:
        self._file = file
        self._kind = kind
        self._error = error
        self._left = b""
        """Read from the file, and given to no frame yet."""
        self._read_bytes = 0
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), READ_BYTES)
        while True:
            if self._frame is None and not self._begin_frame():
                return 0
            taken = self._take()  # what the file system says of it is no damage
            try:
                data = self._frame.decompress(taken, max_length=wanted)
            except DECODER_ERRORS as reason:
                raise self._damaged(reason) from None
            if self._frame.eof:
                self._left = self._frame.unused_data
                self._frame = None
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _take(self) -> bytes:
        """What the frame needs next; nothing while it still holds input of before."""
        if not self._frame.needs_input:
            return b""
        data, self._left = self._left or self._more(), b""
        if not data:
            raise self._damaged("it ends in the middle")
        return data

    def _damaged(self, reason: object) -> InputError:
        return self._error(
            f"the file cannot be decompressed as {self._kind.name} ({reason}, near byte "
            f"{self._read_bytes:,}); fetch or copy it again."
        )

    def _begin_frame(self) -> bool:
        """Whether another frame follows."""
        if self._kind.padded:
            self._left = self._left.lstrip(b"\0")
            while not self._left and (more := self._more()):
                self._left = more.lstrip(b"\0")
        while len(self._left) < LONGEST_MAGIC and (more := self._more()):
            self._left += more
        if not self._left:
            return False
        if not self._kind.magic.match(self._left):
            place = self._read_bytes - len(self._left)
            raise self._error(
                f"what follows byte {place:,} is no {self._kind.name} any more, so something was "
                "appended or lost there; fetch or copy it again."
            )
        self._frame = self._kind.decompressor()
        return True

    def _more(self) -> bytes:
        data = self._file.read(READ_BYTES)
        self._read_bytes += len(data)
        return data
