"""A run that lives at a URI: what its checkpoints are beside is made on each node, and sent there.

    s3://bucket/runs/mine/run.json, recipe.yaml, metrics.jsonl, result.json, loss.png, audit.json
                          audit/, hangs/, wandb/   sent by the process that writes them (sender.py)
                          attempts/, step-…/       the checkpoints, as in every storage

A bucket takes whole files only, so each process has the folder of the run on its own node, fetches
what it goes on with, and sends what has changed. Two processes never send the same file, unless one
belongs to an attempt that another has taken over: what that one sends lasts until the next send of
its successor, which has all that came before.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Self

from pyarrow.fs import FileSelector, FileType

from raptide.errors import ConfigError
from raptide.kept import cache_folder
from raptide.storage import copy_stream
from raptide.training.checkpoints.owned import RECIPE, RUN_INFO, Storage
from raptide.training.planning.recipe import Recipe, without_key
from raptide.training.watching.audit import AUDIT
from raptide.training.watching.watch import HANGS

FOLDERS = (AUDIT, HANGS, "wandb")
"""Of a run, whose files are sent and fetched; of all others, none."""


@dataclass(frozen=True)
class Mirror:
    """The folder on this node of a run that lives at a URI."""

    uri: str
    folder: Path

    @classmethod
    def of_driver(cls, uri: str) -> Self:
        """The one of whoever starts, resumes or looks at a run; the same for all on a machine."""
        place, _, _ = uri.partition("?")
        digest = hashlib.sha256(place.rstrip("/").encode()).hexdigest()[:16]
        return cls(uri, cache_folder() / "runs" / digest / PurePosixPath(place).name)

    @classmethod
    def of_worker(cls, uri: str, run_id: str) -> Self:
        """The one of a node's workers, in which no other run ever was."""
        name = PurePosixPath(uri.partition("?")[0]).name
        return cls(uri, cache_folder() / "runs" / run_id / name)

    @property
    def storage(self) -> Storage:
        return Storage.at(self.uri, "--output")

    def fetch(self) -> None:
        """Make the folder's small files those at the URI; what is the same already stays.

        Raises:
            ConfigError: what is there is no run.
            RaptideError: the storage fails.
        """
        storage = self.storage
        there = _files(storage, "")
        if RUN_INFO not in there:
            names = storage.names("", folders=True)
            if not all(name.startswith((RECIPE, RUN_INFO)) for name in names):  # begun, not whole
                raise ConfigError(
                    f"{self.uri} holds something, but no run (no {RUN_INFO}), and nothing there is "
                    "replaced; choose another --output."
                )
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for folder in FOLDERS:
            there |= _files(storage, folder)
        for file in self._files():
            if str(file.relative_to(self.folder)) not in there:
                file.unlink()
        for name in there:
            content, file = storage.find(name), self.folder / name
            if content is not None and not (file.is_file() and file.read_bytes() == content):
                _put(file, content)

    def begin(self) -> None:
        """Send a new run, whole or not at all: what tells that there is one comes last.

        Raises:
            ConfigError: another process has begun a run there meanwhile.
        """
        self.send(RECIPE, RUN_INFO)
        if self.storage.read(RUN_INFO) != (self.folder / RUN_INFO).read_bytes():
            raise ConfigError(
                f"Another process has begun a run at {self.uri}; choose another --output."
            )

    def fetch_own(self, *names: str) -> None:
        """The same for single files, which need not be there.

        What is on this node stays if it begins with what is at the URI: nobody else has gone on.
        """
        storage = self.storage
        for name in names:
            content, file = storage.find(name), self.folder / name
            if content is None:
                file.unlink(missing_ok=True)
            elif not (file.is_file() and file.read_bytes().startswith(content)):
                _put(file, content)

    def send(self, *names: str) -> None:
        """Send files.

        Raises:
            RaptideError: the storage fails.
        """
        for name in names:
            with (self.folder / name).open("rb") as source:
                self.storage.write(name, partial(_copy, source))

    def _files(self) -> list[Path]:
        below = [file for each in FOLDERS for file in self.folder.glob(f"{each}/**/*")]
        return [file for file in (*self.folder.glob("*"), *below) if file.is_file()]


def _files(storage: Storage, folder: str) -> set[str]:
    """Names in the run of the files in one of its FOLDERS and below it, or of those in itself."""

    def files(path: str) -> set[str]:
        selector = FileSelector(path, allow_not_found=True, recursive=bool(folder))
        infos = storage.filesystem.get_file_info(selector)
        whole = [info for info in infos if info.type == FileType.File]
        return {str(PurePosixPath(info.path).relative_to(storage.path)) for info in whole}

    return storage.ask(folder, files)


def _put(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _copy(source: Any, sink: Any) -> None:
    source.seek(0)
    copy_stream(source, sink)


def mirror_of(uri: str) -> Mirror:
    """What lies at a URI, a run or nothing yet, fetched to this machine.

    Raises:
        ConfigError: pyarrow knows no such file system; the URI holds a key, or what is no run.
        RaptideError: the storage fails.
    """
    try:
        without_key(uri)
    except ValueError as error:
        raise ConfigError(f"The run's URI names who asks ({error}).") from None
    mirror = Mirror.of_driver(uri)
    mirror.fetch()
    return mirror


def refuse_two_storages(recipe: Recipe, mirror: Mirror) -> None:
    """
    Raises:
        ConfigError: the recipe wants checkpoints elsewhere than the rest of the run.
    """
    if recipe.checkpoint.storage is not None:
        raise ConfigError(
            f"The run is to live at {mirror.uri} with its checkpoints, but the recipe has a "
            f"checkpoint.storage ({recipe.checkpoint.storage}); leave one of the two out."
        )
