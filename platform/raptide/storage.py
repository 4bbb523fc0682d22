"""Where files lie: a folder of this machine, or below any URI that pyarrow opens.

A file is written whole or not at all: it gets its name when its last byte is there. What a file
system does not do at first is tried again (patience.py).
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow.fs
from pyarrow import ArrowInvalid
from pyarrow.fs import FileSelector, FileType

from raptide.errors import ConfigError
from raptide.patience import patiently, reason_of, trouble

PARTIAL = "partial"
"""Folder for what is being written, beside what is whole."""

CHUNK = 1 << 22
"""Bytes that are read, hashed and written in one go."""

T = TypeVar("T")


@dataclass(frozen=True)
class Storage:
    """A folder in any pyarrow file system."""

    filesystem: Any
    path: str

    @classmethod
    def of(cls, folder: str | Path) -> Self:
        """The storage in a folder on this machine's file systems."""
        return cls(pyarrow.fs.LocalFileSystem(), str(Path(folder).resolve()))

    @classmethod
    def at(cls, uri: str, what: str = "checkpoint.storage") -> Self:
        """The storage at a URI.

        Args:
            what: the setting that names it, for the error.

        Raises:
            ConfigError: pyarrow knows no such file system.
        """
        try:
            return cls(*pyarrow.fs.FileSystem.from_uri(uri))
        except (ArrowInvalid, OSError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{what} cannot be {uri!r} ({reason}); give a URI such as "
                "s3://bucket/runs or file:///shared/runs."
            ) from None

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)

    def full(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def holds(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.ask(name, lambda path: self.filesystem.get_file_info(path).is_file)

    def is_there(self) -> bool:
        """Whether there is such a folder, or a file instead."""
        kind = self.ask("", lambda path: self.filesystem.get_file_info(path).type)
        return kind != FileType.NotFound

    def changed(self, name: str) -> datetime | None:
        """When a file was written, by the storage's own clock, in UTC; None if it is not there."""
        return self.ask(name, lambda path: self.filesystem.get_file_info(path).mtime)

    def make(self) -> None:
        """Make the folder, and those above it."""
        self.ask("", lambda path: self.filesystem.create_dir(path, recursive=True))

    def names(self, folder: str, *, folders: bool = False) -> list[str]:
        """Names of the files in a folder, sorted; none where there is no such folder.

        Args:
            folders: name the folders in it, too.
        """

        def names(path: str) -> list[str]:
            infos = self.filesystem.get_file_info(FileSelector(path, allow_not_found=True))
            return sorted(info.base_name for info in infos if folders or info.is_file)

        return self.ask(folder, names)

    def read(self, name: str) -> bytes:
        return self.ask(name, self._content)

    def fetch(self, name: str, target: Path, sha256: str | None = None) -> None:
        """Copy a file to a path on this machine's file systems, where it appears whole.

        Args:
            sha256: what it has to hash to.

        Raises:
            StorageStumbled: it hashes to something else, however often it is fetched.
        """
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.{PARTIAL}")

        def fetch(path: str) -> None:
            with self.filesystem.open_input_stream(path) as source, partial.open("wb") as sink:
                digest = copy_stream(source, sink)
            if sha256 not in (None, digest):
                raise OSError(f"it arrives damaged, sha256 {digest[:16]}")

        try:
            self.ask(name, fetch)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def find(self, name: str) -> bytes | None:
        """What is in a file, None where there is no such file."""

        def find(path: str) -> bytes | None:
            try:
                return self._content(path)
            except FileNotFoundError:
                return None

        return self.ask(name, find)

    def write(self, name: str, write: Callable[[Any], None]) -> None:
        """Make a file, whole: `write` is given a file object, more than once if need be.

        Raises:
            RaptideError: the file system refuses for good, or again and again.
        """
        partial = self.full(self._partial(name))
        target = self.full(name)

        def attempt() -> None:
            try:
                for each in {os.path.dirname(partial), os.path.dirname(target)}:
                    patiently(functools.partial(self.filesystem.create_dir, each, recursive=True))
                with self.filesystem.open_output_stream(partial) as file:
                    write(file)
                if self.is_local:
                    _flush(partial)
                self.filesystem.move(partial, target)
            except BaseException:
                self._forget(partial)
                raise

        try:
            patiently(attempt)
        except OSError as error:
            raise trouble(
                error,
                f"{target} cannot be written ({reason_of(error)}); make room or mend the file "
                "system, and start the job again: it goes on where it was.",
            ) from None

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it, if it is there."""

        def delete(path: str) -> None:
            kind = self.filesystem.get_file_info(path).type
            if kind == FileType.Directory:
                self.filesystem.delete_dir(path)
            elif kind == FileType.File:
                self.filesystem.delete_file(path)

        self.ask(name, delete)

    def ask(self, name: str, action: Callable[[str], T]) -> T:
        """What an action returns that is given the whole path of a file or folder.

        Raises:
            RaptideError: the file system refuses for good, or again and again.
        """
        path = self.full(name)
        try:
            return patiently(lambda: action(path))
        except OSError as error:
            raise trouble(
                error,
                f"{path} cannot be reached ({reason_of(error)}); mend the file system or the "
                "permissions, and start the job again: it goes on where it was.",
            ) from None

    def _content(self, path: str) -> bytes:
        with self.filesystem.open_input_stream(path) as file:
            return file.read()

    def _partial(self, name: str) -> str:
        """Where a file is until its last byte is there."""
        return f"{PARTIAL}/{name.replace('/', '-')}.{uuid.uuid4().hex[:8]}"

    def _forget(self, path: str) -> None:
        try:
            if self.filesystem.get_file_info(path).is_file:
                self.filesystem.delete_file(path)
        except OSError:
            pass


def copy_stream(source: Any, sink: Any) -> str:
    """Copy all that a file object gives to another; the SHA-256 of it, in hex."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        sink.write(chunk)
    return digest.hexdigest()


def is_uri(path: str | Path) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", str(path), re.IGNORECASE) is not None


def below(uri: str, name: str) -> str:
    """The URI of what lies in the folder of another one, whose options it keeps."""
    folder, mark, options = uri.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


def storage_of(path: str | Path, what: str) -> Storage:
    """The storage at a path or a URI."""
    return Storage.at(str(path), what) if is_uri(path) else Storage.of(path)


def _flush(path: str) -> None:
    """What has a name after a power cut has its bytes too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
