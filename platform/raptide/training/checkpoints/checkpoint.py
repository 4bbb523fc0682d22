"""Checkpoints of a run, in its storage.

    step-00000200/
      manifest.json   step, cursor, fingerprint, recipe, rotary frequencies, sha256 of every file;
                  written last
      zero/state/     DeepSpeed's files, one or more a rank (pickle: only from your own storage)
      model/          the bundle

A checkpoint counts if every file of its manifest is there with its hash. Ray's own idea of the
latest checkpoint is not used: it registers late and verifies nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
import torch

import raptide.storage
from raptide.config import parse_settings
from raptide.data.streaming.batch import Cursor
from raptide.data.streaming.stream import describe_difference
from raptide.errors import BundleError, CheckpointError, RaptideError
from raptide.model.formats.detect import read_weights
from raptide.model.formats.strangers import recognise
from raptide.patience import read_surely
from raptide.storage import PARTIAL
from raptide.training.checkpoints.scratch import made_once
from raptide.training.planning.recipe import Recipe
from raptide.training.planning.resuming import refuse_changes

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ZERO, ZERO_TAG, MODEL = "zero", "state", "model"
CHECKPOINTS = "checkpoints"
"""A run's storage, which is Ray Train's too, where the recipe names no other."""

RUN_INFO = "run.json"
"""What stays the same through all restarts of a run, in its folder."""

FETCHED = "fetched"
"""Folder of a run for bundles that were fetched from its storage elsewhere."""

SCHEMES = {"local": "file", "gcs": "gs"}
"""Of URIs, by pyarrow's name of the file system, where the two differ."""

TRANSFERS = 8
"""Files that are read from, or sent to, the storage at once."""

CHUNK = 1 << 22


class Storage(raptide.storage.Storage):
    """Where a run's checkpoints lie."""

    @classmethod
    def of_run(cls, folder: Path) -> Storage:
        """The storage of the run in a folder."""
        uri = read_run_info(folder)["checkpoints"] if (folder / RUN_INFO).is_file() else None
        return cls.of(folder / CHECKPOINTS) if uri is None else cls.at(uri)

    @classmethod
    def of_ray_train(cls) -> Storage:
        """The storage of the Ray Train run that this worker belongs to."""
        context = ray.train.get_context().get_storage()
        return cls(context.storage_filesystem, context.experiment_fs_path)

    def _partial(self, name: str) -> str:
        """Beside the file: what a killed worker leaves goes with its checkpoint."""
        return f"{name}.{uuid.uuid4().hex[:8]}.{PARTIAL}"


def read_run_info(folder: Path) -> dict[str, Any]:
    """What stays the same through all restarts of the run in a folder.

    Raises:
        CheckpointError: it is damaged.
        RaptideError: the file system does not give it out.
    """
    file = folder / RUN_INFO
    try:
        return json.loads(read_surely(str(file), file.read_text))
    except ValueError:
        raise CheckpointError(
            f"{file} is damaged; write it again as it was, or start a new run."
        ) from None


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after a step."""
    return f"step-{step:08d}"


def checkpoint_step(name: str) -> int:
    """The inverse of `checkpoint_name`."""
    return int(name.removeprefix("step-"))


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
        return read_weights(self.fetch() / MODEL).frequencies()  # saved by an earlier version

    def fetch(self) -> Path:
        """A local folder with the checkpoint's files: its own, or a copy made once per node."""
        if self.storage.is_local:
            return Path(self.storage.path) / self.name
        return made_once(self.manifest["wandb_run_id"], FETCHED, self.key, self.copy_to)

    def copy_to(self, target: Path, only: str = "") -> None:
        """Copy the files whose names start with `only` into a folder on this machine."""
        for file in self.manifest["files"]:
            if file.startswith(only):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                self.storage.ask(f"{self.name}/{file}", partial(self._copy, target / file))

    def _copy(self, target: Path, source: str) -> None:
        pyarrow.fs.copy_files(
            source,
            str(target),
            source_filesystem=self.storage.filesystem,
            destination_filesystem=pyarrow.fs.LocalFileSystem(),
        )

    @property
    def key(self) -> str:
        """A name for what is derived from this checkpoint and no other."""
        files = json.dumps(self.manifest["files"], sort_keys=True)
        return f"{self.name}-{hashlib.sha256(files.encode()).hexdigest()[:16]}"


def newest_checkpoint(
    storage: Storage, *, only: str = "", skipped: Callable[[str], Any] = print
) -> SavedCheckpoint | None:
    """The newest checkpoint that counts, or None; those that do not are left where they are.

    Args:
        only: verify the files whose names start so; by default all of them.
        skipped: told, in one sentence each, of those that do not count.

    What the storage does not give out may be whole, so nothing older is taken in its place.

    Raises:
        CheckpointError: a checkpoint has another format version.
        RaptideError: the storage does not give one out.
    """
    for name in sorted(_checkpoint_names(storage), reverse=True):
        manifest, problem = _verify(storage, name, only)
        if manifest is not None:
            return SavedCheckpoint(storage, name, manifest)
        skipped(f"Skipping checkpoint {name}: {problem}.")
    return None


def open_checkpoint(storage: Storage, name: str, *, only: str = "") -> SavedCheckpoint | None:
    """The checkpoint of that name if it counts; arguments as for `newest_checkpoint`."""
    manifest, _ = _verify(storage, name, only)
    return None if manifest is None else SavedCheckpoint(storage, name, manifest)


def verify_folder(folder: Path, *, only: str = "") -> dict[str, Any]:
    """The manifest of a checkpoint folder on this machine's file systems.

    Raises:
        CheckpointError: a file is missing or damaged, or has another format version.
    """
    folder = folder.resolve()
    manifest, problem = _verify(Storage.of(folder.parent), folder.name, only)
    if manifest is None:
        raise CheckpointError(f"{folder} is no complete checkpoint: {problem}; take another one.")
    return manifest


def has_finished_one(storage: Storage) -> bool:
    """Whether a checkpoint was ever finished, be it damaged since."""
    return any(storage.holds(f"{name}/{MANIFEST}") for name in _checkpoint_names(storage))


def find_bundle(folder: Path) -> Path:
    """The model that a path stands for: itself, a checkpoint's bundle, or a run's newest.

    Raises:
        BundleError: there is none.
    """
    folder = folder.resolve()
    if (folder / "config.json").is_file() or folder.suffix == ".pt":
        return folder
    if (folder / MODEL / "config.json").is_file():
        return folder / MODEL
    saved = newest_checkpoint(Storage.of_run(folder), only=f"{MODEL}/")
    if saved is None:
        raise BundleError(
            recognise(folder)
            or f"{folder} is no model folder, no checkpoint, and no run with a complete "
            "checkpoint; train one, or name another folder."
        )
    return local_checkpoint(folder, saved) / MODEL


def local_checkpoint(run: Path, saved: SavedCheckpoint) -> Path:
    """A local folder with a checkpoint's bundle: its own, or one in the run folder."""
    if saved.storage.is_local:
        return Path(saved.storage.path) / saved.name
    target = run / FETCHED / saved.key
    if not target.exists():
        new = target.with_suffix(".partial")
        shutil.rmtree(new, ignore_errors=True)
        saved.copy_to(new, only=f"{MODEL}/")
        new.rename(target)
    return target


def prune(
    storage: Storage, newest: str, keep: int, keep_best: int, spare: Collection[str] = ()
) -> None:
    """Delete the checkpoints before `newest` that are neither among the newest nor the best.

    Args:
        spare: names that stay in any case.

    Raises:
        RaptideError: the storage fails; what is left is deleted at the next call.
    """
    earlier = sorted(name for name in _checkpoint_names(storage) if name <= newest)
    manifests = {name: _read_manifest(storage, name)[0] for name in earlier}
    finished = [name for name in earlier if manifests[name] is not None]
    measured: list[tuple[float, str]] = []
    for name in finished[:-keep]:
        manifest = manifests[name]
        assert manifest is not None
        if manifest["heldout_ece"] and manifest["heldout_step"] == manifest["step"]:
            measured.append((manifest["heldout_ece"]["all_chosen"], name))
    best = [name for _, name in sorted(measured)[:keep_best]]
    for name in earlier:
        if name not in (*finished[-keep:], *best, *spare):
            discard(storage, name)


def awaiting_evaluation(storage: Storage, last_step: int) -> list[str]:
    """Checkpoints up to a step whose evaluation was promised and never ended, oldest first."""
    waiting = []
    for name in sorted(_checkpoint_names(storage)):
        manifest, _ = _read_manifest(storage, name)
        due = manifest is not None and manifest.get("awaits_evaluation", False)
        if due and checkpoint_step(name) <= last_step:
            waiting.append(name)
    return waiting


def amend_manifest(storage: Storage, name: str, changes: dict[str, Any]) -> None:
    """Write down what became known after a checkpoint was saved; nothing if it is gone."""
    manifest, _ = _read_manifest(storage, name)
    if manifest is not None:
        write_manifest(storage, name, manifest | changes)


def write_manifest(storage: Storage, name: str, manifest: dict[str, Any]) -> None:
    """Write a checkpoint's manifest, all of it or nothing."""
    content = (json.dumps(manifest, indent=1) + "\n").encode()
    storage.write(f"{name}/{MANIFEST}", lambda file: file.write(content))


def discard(storage: Storage, name: str) -> None:
    """Delete a checkpoint, if it is there: an old one, or what an interrupted save has left.

    Raises:
        RaptideError: the storage fails.
    """
    storage.delete(name)


@contextmanager
def best_effort(warn: Callable[[str], Any], what: str) -> Iterator[None]:
    """Within the block a storage that fails is told of, and ends nothing.

    Args:
        warn: told, in a sentence, what was not done.
        what: in the passive: "Old checkpoints were not deleted".
    """
    try:
        yield
    except RaptideError as error:
        warn(f"{what}: {error}")


def forget_ray_snapshot(storage: Storage) -> None:
    """Remove Ray Train's own list of a run's checkpoints, so that it cannot refuse to resume.

    It names folders that may be gone since, and is not written atomically.
    """
    storage.delete("checkpoint_manager_snapshot.json")


def _checkpoint_names(storage: Storage) -> list[str]:
    return [name for name in storage.names("", folders=True) if name.startswith("step-")]


def _verify(storage: Storage, name: str, only: str) -> tuple[dict[str, Any] | None, str]:
    """The manifest if the checkpoint counts, else None and what is wrong with it."""
    manifest, problem = _read_manifest(storage, name)
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


def _read_manifest(storage: Storage, name: str) -> tuple[dict[str, Any] | None, str]:
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
