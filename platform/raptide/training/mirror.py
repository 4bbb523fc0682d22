"""A run that lives at a URI: what its checkpoints are beside is made on each node, and sent there.

    s3://bucket/runs/mine/run.json, recipe.yaml, metrics.jsonl, result.json, loss.png, audit.json
                          audit/, hangs/, wandb/   sent by the process that writes them (sender.py)
                          attempts/, step-…/       the checkpoints, as in every storage

A bucket takes whole files only, so each process has the folder of the run on its own node, fetches
what it goes on with, and sends what has changed, as long as the run is its attempt's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, Self

from pyarrow.fs import FileSelector, FileType

from raptide.errors import ConfigError, RaptideError
from raptide.kept import CACHE, cache_folder
from raptide.patience import reason_of
from raptide.small_files import claim
from raptide.storage import copy_stream
from raptide.training.checkpoints.owned import RECIPE, RESULT, RUN_INFO, Storage
from raptide.training.planning.recipe import Recipe, without_key
from raptide.training.watching.audit import AUDIT, SUMMARY
from raptide.training.watching.picture import PICTURE
from raptide.training.watching.tracking import METRICS
from raptide.training.watching.watch import HANGS

STANDING = (RUN_INFO, RECIPE, RESULT)
"""What tells how far a run has come; a long one's other files are hundreds of megabytes."""

FILES = (*STANDING, METRICS, PICTURE, SUMMARY)
FOLDERS = (AUDIT, HANGS, "wandb")
"""Of a run, what is sent and fetched; of all other folders and files, nothing."""

GROWING = 1 << 20
"""Bytes of a file above which one of the same size is taken for the same: it only ever grows."""


@dataclass(frozen=True)
class Mirror:
    """The folder on this node of a run that lives at a URI."""

    uri: str
    folder: Path

    @classmethod
    def of_worker(cls, uri: str, run_id: str) -> Self:
        """The one of a node's workers, in which no other run ever was."""
        return cls(uri, cache_folder() / "runs" / run_id / _name(uri))

    @cached_property
    def storage(self) -> Storage:
        """The place at the URI; to open one may ask a bucket for its region."""
        return Storage.at(self.uri, "the run's URI")

    def fetch(self) -> None:
        """Make the folder one of the run at the URI: of its files, those that tell how it stands.

        Raises:
            ConfigError: what is there is no run, or the copy of one that lives elsewhere.
            RaptideError: the storage fails.
        """
        there = {n: size for n, size in _files(self.storage, "").items() if n in STANDING}
        if RUN_INFO not in there:
            self._refuse_others()
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        self._take(STANDING, there)

    def fetch_all(self) -> None:
        """The same with all of the run's files; `fetch` has found one.

        Raises:
            RaptideError: the storage fails.
        """
        there = {n: size for n, size in _files(self.storage, "").items() if n in FILES}
        for folder in FOLDERS:
            there |= _files(self.storage, folder)
        below = [file for each in FOLDERS for file in self.folder.glob(f"{each}/**/*")]
        here = [str(file.relative_to(self.folder)) for file in below if file.is_file()]
        self._take((*FILES, *here), there)

    def _take(self, here: Iterable[str], there: dict[str, int]) -> None:
        """Make files those at the URI; what is the same already stays.

        Args:
            here: names of those that may be in the folder.
            there: sizes of those at the URI.
        """
        for name in here:
            if name not in there:
                (self.folder / name).unlink(missing_ok=True)
        for name, size in there.items():
            self._fetch(self.storage, name, size)
        self._name_checkpoints()

    def begin(self) -> None:
        """Send a new run, whole or not at all: what tells that there is one comes last.

        Raises:
            ConfigError: another process has begun a run there meanwhile.
        """
        own, storage = (self.folder / RUN_INFO).read_bytes(), self.storage
        if storage.find(RUN_INFO) is None:
            self.send(RECIPE, RUN_INFO)
        if storage.find(RUN_INFO) != own:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise ConfigError(
                f"Another process has begun a run at {self.uri} meanwhile; choose another --output."
            )

    def fetch_own(self, *names: str) -> None:
        """The same as `fetch` for single files, which need not be there.

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

    def _refuse_others(self) -> None:
        """
        Raises:
            ConfigError: there is something at the URI that is not the beginning of a run, or no
                bucket.
        """
        storage = self.storage
        names = storage.names("", folders=True)
        if not all(name.startswith((RECIPE, RUN_INFO)) for name in names):
            raise ConfigError(
                f"{self.uri} holds something, but no run (no {RUN_INFO}), and nothing there is "
                "replaced; choose another --output."
            )
        bucket = storage.path.partition("/")[0]
        if storage.filesystem.type_name == "s3" and not names:
            kind = storage.ask("", lambda _: storage.filesystem.get_file_info(bucket).type)
            if kind == FileType.NotFound:
                raise ConfigError(f"There is no bucket {bucket} for {self.uri}; make it first.")

    def _fetch(self, storage: Storage, name: str, size: int) -> None:
        file = self.folder / name
        same_size = file.is_file() and file.stat().st_size == size
        if size > GROWING:
            if not same_size:
                file.parent.mkdir(parents=True, exist_ok=True)
                storage.fetch(name, file)
            return
        content = storage.find(name)
        if content is not None and not (same_size and file.read_bytes() == content):
            _put(file, content)

    def _name_checkpoints(self) -> None:
        """Where they lie is the URI as it was given now, whose options may be others.

        Raises:
            ConfigError: they lie elsewhere.
        """
        file = self.folder / RUN_INFO
        try:
            info = json.loads(file.read_text())
            there = info["checkpoints"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{RUN_INFO} at {self.uri} is damaged; begin a new run.") from None
        if there is None or _place(there) != _place(self.uri):
            home = "a folder" if there is None else there.partition("?")[0]
            raise ConfigError(
                f"{self.uri} is a copy of a run whose checkpoints belong to {home}; go on with "
                "that one, or begin a run elsewhere with continue_from and a checkpoint."
            )
        if there != self.uri:
            file.write_text(json.dumps(info | {"checkpoints": self.uri}) + "\n")


@contextmanager
def mirrored(uri: str, *, look: bool = False) -> Iterator[Mirror]:
    """What lies at a URI, a run or nothing yet, on this machine; errors speak of the URI.

    Args:
        look: nothing will be changed; others may work on the run meanwhile.

    Raises:
        ConfigError: pyarrow knows no such file system; the URI holds a key, or what is no run;
            another process on this machine works on the run.
        RaptideError: the storage fails.
    """
    refuse_key(uri)
    with tempfile.TemporaryDirectory() if look else _alone_with(uri) as folder:
        mirror = Mirror(uri, Path(folder) / _name(uri))
        try:
            mirror.fetch()
            yield mirror
        except RaptideError as error:
            if str(mirror.folder) not in str(error):
                raise
            raise type(error)(str(error).replace(str(mirror.folder), uri)) from None


@contextmanager
def _alone_with(uri: str) -> Iterator[Path]:
    """A folder of this machine for a run, which no other process has meanwhile."""
    folder = cache_folder() / "runs" / hashlib.sha256(_place(uri).encode()).hexdigest()[:16]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made ({reason_of(error)}); name another folder in {CACHE}."
        ) from None
    with lock:
        if not claim(lock):
            raise ConfigError(
                f"Another process on this machine works on the run at {uri}; wait for its end, "
                "stop it, or choose another --output."
            )
        yield folder


def refuse_key(uri: str) -> None:
    """
    Raises:
        ConfigError: the URI names who asks; it is not repeated.
    """
    try:
        without_key(uri)
    except ValueError as error:
        raise ConfigError(f"The run's URI names who asks, but {error}.") from None


def refuse_copy(folder: Path) -> None:
    """
    Raises:
        ConfigError: the folder is what is on this machine of a run at a URI.
    """
    if folder.resolve().is_relative_to((cache_folder() / "runs").resolve()):
        raise ConfigError(
            f"{folder} is this machine's copy of a run that lives at a URI; name the URI."
        )


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


def _place(uri: str) -> str:
    """A URI without its options."""
    return uri.partition("?")[0].rstrip("/")


def _name(uri: str) -> str:
    return PurePosixPath(_place(uri)).name


def _files(storage: Storage, folder: str) -> dict[str, int]:
    """Sizes of the files in one of a run's FOLDERS and below it, or in itself, by their names."""

    def files(path: str) -> dict[str, int]:
        selector = FileSelector(path, allow_not_found=True, recursive=bool(folder))
        infos = storage.filesystem.get_file_info(selector)
        whole = [info for info in infos if info.type == FileType.File]
        return {str(PurePosixPath(i.path).relative_to(storage.path)): i.size for i in whole}

    return storage.ask(folder, files)


def _put(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _copy(source: Any, sink: Any) -> None:
    source.seek(0)
    copy_stream(source, sink)
