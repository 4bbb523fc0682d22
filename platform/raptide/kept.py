"""Folders kept by the digest of what they hold, where nothing else prunes them.

    shelf/
      <digest>/        files, whole: the folder appears by one rename
      <digest>.lock    held while it is being made, so that others on this machine wait for it

Any number of processes may put, open and remove at once. One that has opened a folder holds a
shared lock on it until it ends, and what is locked is never removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from raptide.errors import ConfigError, RaptideError

CACHE = "RAPTIDE_CACHE"
"""Environment variable: the folder for what a node keeps, in place of ~/.cache/raptide."""

PARTIAL = "partial-"

ABANDONED_S = 86_400.0
"""Age of a partial folder whose maker is gone."""

Fill = Callable[[Path], None]
"""Writes files into the new, empty folder that it is given."""


def cache_folder() -> Path:
    """Where a node keeps what it has fetched or made."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "raptide"
    return Path(os.environ.get(CACHE) or home).expanduser()


class Shelf:
    """Folders of files by their digest, in a folder on this machine's file systems."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_node(cls) -> Shelf:
        """The shelf for models that all processes of a user share on this node."""
        folder = cache_folder() / "models"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be made ({error.strerror}); name a folder for models in {CACHE}."
            ) from None
        return cls(folder)

    def put(self, fill: Fill) -> str:
        """Keep what `fill` writes; its digest, 64 hex digits."""
        digest = self._make(fill)
        os.utime(self.folder / digest)
        return digest

    def open(self, digest: str, fill: Fill) -> Path:
        """The folder of that digest, which stays until this process ends.

        What is missing, or has been damaged, is made by `fill`, once on this machine.

        Raises:
            RaptideError: `fill` writes something else.
        """
        target = self.folder / digest
        self.folder.mkdir(parents=True, exist_ok=True)
        if not _hold_whole(target, digest):
            with (self.folder / f"{digest}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                while not _hold_whole(target, digest):
                    _remove(target)
                    if (made := self._make(fill)) != digest:
                        raise RaptideError(f"{digest[:16]} was wanted, but {made[:16]} was found.")
        os.utime(target)
        return target

    def trim(self, max_bytes: float) -> None:
        """Remove the folders that were opened longest ago beyond `max_bytes`, unless in use."""
        held_bytes = 0
        folders = [each for each in self.folder.iterdir() if each.is_dir()]
        for folder in sorted(folders, key=_opened, reverse=True):
            if folder.name.startswith(PARTIAL):
                abandoned = time.time() - _opened(folder) > ABANDONED_S
            else:
                held_bytes += _bytes_of(folder)
                abandoned = held_bytes > max_bytes
            if abandoned:
                _remove_if_free(folder)

    def _make(self, fill: Fill) -> str:
        return make_whole(self.folder, fill, digest_of).name


def make_whole(parent: Path, fill: Fill, name: Callable[[Path], str]) -> Path:
    """A folder that appears by one rename when it is whole; of several makers the first wins.

    Args:
        name: what it is called in `parent`, by what was written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=parent))
    try:
        fill(partial)
        target = parent / name(partial)
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def digest_of(folder: Path) -> str:
    """SHA-256 over the names and the bytes of a folder's files, 64 hex digits."""
    whole = hashlib.sha256()
    for file in sorted(each for each in folder.iterdir() if each.is_file()):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
        whole.update(hashlib.sha256(file.name.encode()).digest() + content)
    return whole.hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file that is never written again, or where none can be had a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _hold_whole(folder: Path, digest: str) -> bool:
    """Hold a folder until this process ends if it is all there, or let it go."""
    held = _hold(folder)
    if held is None:
        return False
    try:
        whole = digest_of(folder) == digest
    except FileNotFoundError:  # another process has found it damaged
        whole = False
    if not whole:
        os.close(held)
    return whole


def _hold(folder: Path) -> int | None:
    """Lock a folder against removal while the returned descriptor is open; None if it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
        return descriptor
    os.close(descriptor)  # it was removed before it was locked
    return _hold(folder)


def _remove_if_free(folder: Path) -> None:
    """Remove it, unless a process holds it or the file system cannot tell."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
        finally:
            os.close(descriptor)


def _remove(folder: Path) -> None:
    """If it is there; by a rename first, so that nobody finds half of it."""
    gone = folder.with_name(f"{PARTIAL}{os.getpid()}-{time.monotonic_ns()}")
    with suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _opened(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _bytes_of(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:  # somebody else is removing it
        return 0
