"""Checkpoints of a run, in its storage.

    step-00000200-000007-1f0c9a3e/
      manifest.json   step, cursor, fingerprint, recipe, rotary frequencies, sha256 of every file;
                  written last
      zero/state/     DeepSpeed's files, one or more a rank (pickle: only from your own storage)
      model/          the bundle, in every one or in every so many

A checkpoint counts if every file of its manifest is there with its hash. Ray's own idea of the
latest checkpoint is not used: it registers late and verifies nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from raptide.config import parse_settings
from raptide.data.streaming.batch import Cursor
from raptide.data.streaming.stream import describe_difference
from raptide.errors import BundleError, CheckpointError
from raptide.kept import make_whole
from raptide.model.formats.detect import read_weights
from raptide.model.formats.strangers import recognise
from raptide.storage import CHUNK, below
from raptide.training.checkpoints.owned import (
    FOLDER,
    MANIFEST,
    RUN_INFO,
    Storage,
    checkpoint_step,
    counted_names,
)
from raptide.training.checkpoints.scratch import made_once
from raptide.training.planning.recipe import Recipe
from raptide.training.planning.resuming import refuse_changes

FORMAT_VERSION = 1
ZERO, ZERO_TAG, MODEL = "zero", "state", "model"
FETCHED = "fetched"
"""Folder of a run for bundles that were fetched from its storage elsewhere."""

SCHEMES = {"local": "file", "gcs": "gs"}
"""Of URIs, by pyarrow's name of the file system, where the two differ."""

TRANSFERS = 8
"""Files that are read from, or sent to, the storage at once."""

OF_ONE_RANK = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_(?:optim|model)_states\.pt")
"""DeepSpeed's names of what one rank saves and loads, in `zero/`."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that counts."""

    storage: Storage
    name: str
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def cursor(self) -> Cursor:
        return Cursor(**self.manifest["cursor"])

    @property
    def uri(self) -> str:
        name = self.storage.filesystem.type_name
        scheme = SCHEMES.get(name, name)
        return f"{scheme}://{self.storage.path}/{self.name}"

    def refuse_other_run(self, fingerprint: dict[str, Any], recipe: Recipe) -> None:
        """Refuse to go on with another stream, or with a recipe that does not fit.

        Raises:
            CheckpointError: names the first difference.
        """
        before = parse_settings(Recipe, self.manifest["recipe"], source=f"{self.name}/{MANIFEST}")
        refuse_changes(before, recipe, self.name)
        difference = describe_difference(self.manifest["fingerprint"], fingerprint)
        if difference is not None:
            raise CheckpointError(
                f"{self.name} belongs to another stream ({difference}); resume with the corpus "
                "settings it was made with, or start a new run."
            )

    def frequencies(self) -> torch.Tensor:
        """The model's rotary frequencies, [K / 2] fp32."""
        kept = self.manifest.get("inv_freq")
        if kept is not None:
            return torch.tensor(kept, dtype=torch.float32)
        with self.here(f"{MODEL}/") as folder:  # saved by an earlier version
            return read_weights(folder / MODEL).frequencies()

    def shards(self, rank: int) -> Path:
        """A local folder with what DeepSpeed loads on a rank, at the number of workers that saved.

        It is the checkpoint's own, or one for all ranks of this node, for which each fetches what
        is its own, and the first one what all of them load.
        """
        if self.storage.is_local:
            return Path(self.storage.path) / self.name
        shards = [file for file in self.manifest["files"] if file.startswith(f"{ZERO}/")]
        of_all = [file for file in shards if rank_of(file) is None]
        folder = made_once(
            *(self.manifest["wandb_run_id"], FETCHED, self.key),
            lambda target: self._copy(of_all, target),
        )
        self._copy([file for file in shards if rank_of(file) == rank], folder)
        return folder

    @contextmanager
    def here(self, only: str, room: Path | None = None) -> Iterator[Path]:
        """Within the block, a local folder with the files whose names start with `only`.

        Args:
            room: a folder of this machine for a copy, if one is needed.
        """
        if self.storage.is_local:
            yield Path(self.storage.path) / self.name
            return
        with tempfile.TemporaryDirectory(dir=room) as copy:
            self.copy_to(Path(copy), only)
            yield Path(copy)

    def copy_to(self, target: Path, only: str = "") -> None:
        """Copy the files whose names start with `only` into a folder on this machine."""
        self._copy([file for file in self.manifest["files"] if file.startswith(only)], target)

    def _copy(self, files: Sequence[str], target: Path) -> None:
        """Copy files, several at once; those that are there already are whole.

        Raises:
            StorageStumbled: one arrives damaged again and again.
        """

        def copy(file: str) -> None:
            if not (target / file).exists():
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                digest = self.manifest["files"][file]
                self.storage.fetch(f"{self.name}/{file}", target / file, digest)

        target.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(TRANSFERS) as pool:
            for _ in pool.map(copy, files):
                pass

    @property
    def key(self) -> str:
        """A name for what is derived from this checkpoint and no other."""
        files = json.dumps(self.manifest["files"], sort_keys=True)
        return f"{self.name}-{hashlib.sha256(files.encode()).hexdigest()[:16]}"


def rank_of(file: str) -> int | None:
    """The rank whose file of DeepSpeed's it is; None for one that every rank loads."""
    found = OF_ONE_RANK.fullmatch(PurePosixPath(file).name)
    return None if found is None else int(found[1])


def newest_checkpoint(
    storage: Storage, *, only: str = "", skipped: Callable[[str], Any] = print
) -> SavedCheckpoint | None:
    """The newest checkpoint that counts, or None; those that do not are left where they are.

    Args:
        only: verify the files whose names start so; by default all of them.
            Those without any are passed over.
        skipped: told, in one sentence each, of those that do not count.

    What the storage does not give out may be whole, so nothing older is taken in its place.

    Raises:
        CheckpointError: a checkpoint has another format version.
        RaptideError: the storage does not give one out.
    """
    for name in reversed(counted_names(storage)):
        manifest, problem = verify(storage, name, only)
        if manifest is None:
            skipped(f"Skipping checkpoint {name}: {problem}.")
        elif holds(manifest, only):
            return SavedCheckpoint(storage, name, manifest)
    return None


def open_checkpoint(storage: Storage, name: str, *, only: str = "") -> SavedCheckpoint | None:
    """The checkpoint of that name if it counts; arguments as for `newest_checkpoint`."""
    manifest, _ = verify(storage, name, only)
    return None if manifest is None else SavedCheckpoint(storage, name, manifest)


def verify_folder(folder: Path, *, only: str = "") -> dict[str, Any]:
    """The manifest of a checkpoint folder on this machine's file systems.

    Raises:
        CheckpointError: a file is missing or damaged, or has another format version.
    """
    folder = folder.resolve()
    manifest, problem = verify(Storage.of(folder.parent), folder.name, only)
    if manifest is None:
        raise CheckpointError(f"{folder} is no complete checkpoint: {problem}; take another one.")
    return manifest


def has_finished_one(storage: Storage) -> bool:
    """Whether a checkpoint was ever finished, be it damaged since."""
    return any(storage.holds(f"{name}/{MANIFEST}") for name in counted_names(storage))


def find_bundle(folder: Path) -> Path:
    """The model that a path stands for: itself, a checkpoint's bundle, or a run's newest.

    Raises:
        BundleError: there is none.
    """
    folder = Path(with_attempt(str(folder.resolve()), Storage.of(folder)))
    if (folder / "config.json").is_file() or folder.suffix == ".pt":
        return folder
    if (folder / MODEL / "config.json").is_file():
        return folder / MODEL
    if (folder / MANIFEST).is_file() and FOLDER.fullmatch(folder.name):
        raise BundleError(_no_bundle(folder))
    saved = newest_checkpoint(Storage.of_run(folder), only=f"{MODEL}/")
    if saved is None:
        raise BundleError(
            recognise(folder)
            or f"{folder} is no model folder, no checkpoint, and no run with a complete "
            "checkpoint; train one, or name another folder."
        )
    return local_checkpoint(folder, saved) / MODEL


def find_bundle_at(uri: str) -> str:
    """The same for a URI: of a model, a checkpoint, or a folder of checkpoints; a URI again.

    Raises:
        BundleError: there is none.
    """
    storage = Storage.at(uri, "model")
    if storage.is_local:
        return str(find_bundle(Path(storage.path)))
    uri = with_attempt(uri, storage)
    storage = Storage.at(uri, "model")
    if storage.path.endswith(".pt") or storage.holds("config.json"):
        return uri
    if storage.holds(f"{MODEL}/config.json"):
        return below(uri, MODEL)
    if storage.holds(MANIFEST) and FOLDER.fullmatch(PurePosixPath(storage.path).name):
        raise BundleError(_no_bundle(uri))
    saved = newest_checkpoint(storage, only=f"{MODEL}/")
    if saved is None:
        raise BundleError(
            f"{uri} is no model folder, no checkpoint, and holds no complete checkpoint; name "
            "another URI."
        )
    return below(uri, f"{saved.name}/{MODEL}")


def _no_bundle(checkpoint: object) -> str:
    return (
        f"{checkpoint} was saved without a bundle (checkpoint.bundle_every); name its run or "
        "another checkpoint, or make one of it with export_model.py."
    )


def run_of(path: Path) -> Path | None:
    """The folder of the run that a path lies in; None if it lies in none."""
    return next((each for each in path.parents if (each / RUN_INFO).is_file()), None)


def with_attempt(path: str, storage: Storage) -> str:
    """A path or URI of a checkpoint, or into one, that may name it by its step: `step-00000200`.

    Args:
        storage: of the same folder.
    """
    whole = PurePosixPath(storage.path)
    for folder in (whole, whole.parent):
        named = FOLDER.fullmatch(folder.name) is not None
        if named and not Storage(storage.filesystem, str(folder)).is_there():
            for name in reversed(counted_names(Storage(storage.filesystem, str(folder.parent)))):
                if checkpoint_step(name) == checkpoint_step(folder.name):
                    before, _, within = path.rpartition(folder.name)
                    return f"{before}{name}{within}"
    return path


def local_checkpoint(run: Path, saved: SavedCheckpoint) -> Path:
    """A local folder with a checkpoint's bundle: its own, or one in the run folder."""
    if saved.storage.is_local:
        return Path(saved.storage.path) / saved.name
    target = run / FETCHED / saved.key
    if target.exists():
        return target
    fill = functools.partial(saved.copy_to, only=f"{MODEL}/")
    return make_whole(target.parent, fill, lambda _: saved.key)


def forget_ray_snapshot(storage: Storage) -> None:
    """Remove Ray Train's own list of a run's checkpoints, so that it cannot refuse to resume.

    It names folders that may be gone since, and is not written atomically.
    """
    storage.delete("checkpoint_manager_snapshot.json")


def holds(manifest: dict[str, Any], only: str) -> bool:
    """Whether a checkpoint has files whose names start so."""
    return any(file.startswith(only) for file in manifest["files"])


def verify(storage: Storage, name: str, only: str = "") -> tuple[dict[str, Any] | None, str]:
    """The manifest if the checkpoint counts, else None and what is wrong with it."""
    manifest, problem = read_manifest(storage, name)
    if manifest is None:
        return None, problem
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{name} has checkpoint format {manifest.get('format_version')}, but this version "
            f"reads {FORMAT_VERSION}; resume with the version of raptide that wrote it."
        )
    files = [file for file in manifest["files"] if file.startswith(only)]
    with ThreadPoolExecutor(TRANSFERS) as pool:
        found = pool.map(lambda file: _sha256(storage, f"{name}/{file}"), files)
        try:
            for file, digest in zip(files, found, strict=True):
                if digest is None:
                    return None, f"{file} is missing"
                if digest != (expected := manifest["files"][file]):
                    return None, f"{file} is damaged (sha256 {digest}, expected {expected})"
        finally:
            pool.shutdown(cancel_futures=True)
    return manifest, ""


def read_manifest(storage: Storage, name: str) -> tuple[dict[str, Any] | None, str]:
    """A checkpoint's manifest, else None and what is wrong with it."""
    content = storage.find(f"{name}/{MANIFEST}")
    if content is None:
        return None, f"it has no {MANIFEST}, so it was not finished"
    try:
        return json.loads(content), ""
    except ValueError as error:
        return None, f"its {MANIFEST} cannot be read ({error})"


def _sha256(storage: Storage, name: str) -> str | None:
    """Digest of a file in the storage, None if it is not there."""

    def hashed(path: str) -> str | None:
        digest = hashlib.sha256()
        try:
            with storage.filesystem.open_input_stream(path) as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        except FileNotFoundError:
            return None
        return digest.hexdigest()

    return storage.ask(name, hashed)
