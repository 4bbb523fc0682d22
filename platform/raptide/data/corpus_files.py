"""The files of a corpus's folder, on this machine's file systems or at a URI."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from raptide.errors import CorpusError
from raptide.patience import FarTrouble, patiently, unreadable
from raptide.storage import CHUNK, Storage, below, is_uri

Found = TypeVar("Found")


@contextmanager
def numbered() -> Iterator[None]:
    """Within the block, what a file system complains of without a number gets one: errors without
    are Parquet's, of damage."""
    try:
        yield
    except OSError as error:
        if error.errno is None and not isinstance(error, FileNotFoundError):
            raise FarTrouble(errno.EIO, str(error)) from None
        raise


class FarFile:
    """A file at a URI, with errors that have numbers."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        with numbered():
            return self._file.read(None if size < 0 else size)

    def seek(self, place: int, whence: int = 0) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed


@dataclass(frozen=True)
class CorpusFiles:
    """A folder with a corpus."""

    where: str
    """Its path as it was given, or its URI."""

    @classmethod
    def at(cls, where: str | Path) -> CorpusFiles:
        """Those in a folder.

        Raises:
            ConfigError: pyarrow knows no file system of that URI.
        """
        if not is_uri(where):
            return cls(str(where))
        storage = Storage.at(str(where), "corpus")
        return cls(storage.path if storage.is_local else str(where))

    @property
    def is_far(self) -> bool:
        return is_uri(self.where)

    @cached_property
    def _storage(self) -> Storage:
        return Storage.at(self.where, "corpus")

    def name(self, file: str) -> str:
        """Path or URI of a file."""
        return below(self.where, file) if self.is_far else str(Path(self.where) / file)

    def content(self, file: str) -> bytes:
        """What is in a file.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the file system does not give it out.
        """
        if not self.is_far:
            return patiently((Path(self.where) / file).read_bytes)
        return patiently(lambda: self._open(file).read())

    def parquet(
        self, file: str, read: Callable[[pq.ParquetFile], pa.Table], place: str = ""
    ) -> pa.Table:
        """What is read in a Parquet file, opened anew where the file system stumbles.

        Args:
            place: in the file, for the error.

        Raises:
            CorpusError: the file is missing, or Parquet says that it is damaged.
            RaptideError: the file system does not give it out.
        """

        def attempt() -> pa.Table:
            try:
                source = self._open(file) if self.is_far else self.name(file)
                with pq.ParquetFile(source, page_checksum_verification=True) as opened:
                    return read(opened)
            except (OSError, pa.ArrowInvalid, IndexError) as error:
                if isinstance(error, OSError) and error.errno:  # Parquet's own have no number
                    raise
                raise CorpusError(
                    f"{self.name(file)}{place} cannot be read ({error}); the corpus is damaged, "
                    "build it again."
                ) from None

        return self._surely(attempt, file, place)

    def sha256(self, file: str) -> str:
        """
        Raises:
            CorpusError: there is no such file.
            RaptideError: the file system does not give it out.
        """
        return self._surely(lambda: self._digest(file), file)

    def _surely(self, action: Callable[[], Found], file: str, place: str = "") -> Found:
        """What an action on a file gives, or an error that names the file."""
        try:
            return patiently(action)
        except FileNotFoundError:
            raise CorpusError(
                f"{self.name(file)} is missing, which the corpus's manifest names; copy it again, "
                "or build again."
            ) from None
        except OSError as error:
            raise unreadable(f"{self.name(file)}{place}", error) from None

    def _digest(self, file: str) -> str:
        if not self.is_far:
            return sha256_of_file(Path(self.where) / file)
        digest = hashlib.sha256()
        source = self._open(file)
        while chunk := source.read(CHUNK):
            digest.update(chunk)
        return digest.hexdigest()

    def _open(self, file: str) -> FarFile:
        with numbered():
            opened = self._storage.filesystem.open_input_file(self._storage.full(file))
        return FarFile(opened)


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
