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

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
import torch

import raptide.storage
from raptide.config import parse_settings
from raptide.data.streaming.batch import Cursor
from raptide.data.streaming.stream import describe_difference
from raptide.errors import BundleError, CheckpointError
from raptide.kept import make_whole
from raptide.model.formats.detect import read_weights
from raptide.model.formats.strangers import recognise
from raptide.storage import below
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

TRANSFERS = 8
"""Files that are read from, or sent to, the storage at once."""

CHUNK = 1 << 22


class Storage(raptide.storage.Storage):
    """Where a run's checkpoints lie."""

    @classmethod
    def of_run(cls, folder: Path) -> Storage:
        """The storage of the run in a folder."""
        info = folder / RUN_INFO
        uri = json.loads(info.read_text())["checkpoints"] if info.is_file() else None
        return cls.of(folder / CHECKPOINTS) if uri is None else cls.at(uri)

    @classmethod
    def of_ray_train(cls) -> Storage:
        """The storage of the Ray Train run that this worker belongs to."""
        context = ray.train.get_context().get_storage()
        return cls(context.storage_filesystem, context.experiment_fs_path)


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
        scheme = "file" if self.storage.is_local else self.storage.filesystem.type_name
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
                self.storage.fetch(f"{self.name}/{file}", target / file)

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

    Raises:
        CheckpointError: a checkpoint has another format version.
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
    manifests = [f"{storage.path}/{name}/{MANIFEST}" for name in _checkpoint_names(storage)]
    return any(
        info.type == pyarrow.fs.FileType.File
        for info in storage.filesystem.get_file_info(manifests)
    )


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


def find_bundle_at(uri: str) -> str:
    """The same for a URI: of a model, a checkpoint, or a folder of checkpoints; a URI again.

    Raises:
        BundleError: there is none.
    """
    storage = Storage.at(uri, "model")
    if storage.is_local:
        return str(find_bundle(Path(storage.path)))
    if storage.path.endswith(".pt") or storage.holds("config.json"):
        return uri
    if storage.holds(f"{MODEL}/config.json"):
        return below(uri, MODEL)
    saved = newest_checkpoint(storage, only=f"{MODEL}/")
    if saved is None:
        raise BundleError(
            f"{uri} is no model folder, no checkpoint, and holds no complete checkpoint; name "
            "another URI."
        )
    return below(uri, f"{saved.name}/{MODEL}")


def run_of(path: Path) -> Path | None:
    """The folder of the run that a path lies in; None if it lies in none."""
    return next((each for each in path.parents if (each / RUN_INFO).is_file()), None)


def local_checkpoint(run: Path, saved: SavedCheckpoint) -> Path:
    """A local folder with a checkpoint's bundle: its own, or one in the run folder."""
    if saved.storage.is_local:
        return Path(saved.storage.path) / saved.name
    target = run / FETCHED / saved.key
    if target.exists():
        return target
    fill = functools.partial(saved.copy_to, only=f"{MODEL}/")
    return make_whole(target.parent, fill, lambda _: saved.key)


def prune(
    storage: Storage, newest: str, keep: int, keep_best: int, spare: Collection[str] = ()
) -> None:
    """Delete the checkpoints before `newest` that are neither among the newest nor the best.

    Args:
        spare: names that stay in any case.
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
    target = f"{storage.path}/{name}/{MANIFEST}"
    with storage.filesystem.open_output_stream(target + ".partial") as file:
        file.write((json.dumps(manifest, indent=1) + "\n").encode())
    storage.filesystem.move(target + ".partial", target)


def discard(storage: Storage, name: str) -> None:
    """Delete a checkpoint, if it is there: an old one, or what an interrupted save has left."""
    folder = f"{storage.path}/{name}"
    if storage.filesystem.get_file_info(folder).type == pyarrow.fs.FileType.Directory:
        storage.filesystem.delete_dir(folder)


def forget_ray_snapshot(storage: Storage) -> None:
    """Remove Ray Train's own list of a run's checkpoints, so that it cannot refuse to resume.

    It names folders that may be gone since, and is not written atomically.
    """
    snapshot = f"{storage.path}/checkpoint_manager_snapshot.json"
    if storage.filesystem.get_file_info(snapshot).type == pyarrow.fs.FileType.File:
        storage.filesystem.delete_file(snapshot)


def _checkpoint_names(storage: Storage) -> Iterator[str]:
    selector = pyarrow.fs.FileSelector(storage.path, allow_not_found=True)
    for info in storage.filesystem.get_file_info(selector):
        if info.type == pyarrow.fs.FileType.Directory and info.base_name.startswith("step-"):
            yield info.base_name


def _verify(storage: Storage, name: str, only: str) -> tuple[dict[str, Any] | None, str]:
    """The manifest if the checkpoint counts, else None and what is wrong with it."""
    folder = f"{storage.path}/{name}"
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
        found = pool.map(lambda file: _sha256(storage, f"{folder}/{file}"), files)
        for file, digest in zip(files, found, strict=True):
            if digest is None:
                return None, f"{file} is missing"
            if digest != (expected := manifest["files"][file]):
                return None, f"{file} is damaged (sha256 {digest}, expected {expected})"
    return manifest, ""


def _read_manifest(storage: Storage, name: str) -> tuple[dict[str, Any] | None, str]:
    """A checkpoint's manifest, else None and what is wrong with it."""
    try:
        with storage.filesystem.open_input_file(f"{storage.path}/{name}/{MANIFEST}") as file:
            return json.loads(file.read()), ""
    except FileNotFoundError:
        return None, f"it has no {MANIFEST}, so it was not finished"
    except (OSError, ValueError) as error:
        return None, f"its {MANIFEST} cannot be read ({error})"


def _sha256(storage: Storage, path: str) -> str | None:
    """Digest of a file in the storage, None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with storage.filesystem.open_input_stream(path) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()
