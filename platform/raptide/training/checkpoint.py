"""Checkpoints in Ray Train's storage.

    step-00000200/
      manifest.json   step, cursor, fingerprint, recipe, sha256 of every file; written last
      zero/state/     DeepSpeed's files, one or more a rank (pickle: only from your own storage)
      model/          the bundle

A checkpoint counts if every file of its manifest is there with its hash. Ray's own idea of the
latest checkpoint is not used: it registers late and verifies nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
import torch.distributed as dist

from raptide.data.corpus import sha256_of_file
from raptide.data.stream import Cursor, describe_difference
from raptide.errors import BundleError, CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ZERO, ZERO_TAG, MODEL = "zero", "state", "model"
CHECKPOINTS = "checkpoints"
"""Folder of a run that is Ray Train's storage."""


@dataclass(frozen=True)
class Storage:
    """Where a run's checkpoints lie; any pyarrow file system."""

    filesystem: Any
    path: str

    @classmethod
    def of(cls, folder: str | Path) -> Storage:
        """The storage of a run on this machine's file systems."""
        return cls(pyarrow.fs.LocalFileSystem(), str(Path(folder).resolve()))

    @classmethod
    def of_ray_train(cls) -> Storage:
        """The storage of the Ray Train run that this worker belongs to."""
        context = ray.train.get_context().get_storage()
        return cls(context.storage_filesystem, context.experiment_fs_path)


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

    def refuse_other_run(self, fingerprint: dict[str, Any], zero_stage: int) -> None:
        """Refuse to go on with another stream, or between ZeRO stages that do not convert.

        Raises:
            CheckpointError: names the first difference.
        """
        difference = describe_difference(self.manifest["fingerprint"], fingerprint)
        if difference is not None:
            raise CheckpointError(
                f"{self.name} belongs to another stream ({difference}); resume with the settings "
                "it was made with, or start a new run."
            )
        before = self.manifest["recipe"]["training"]["zero_stage"]
        if before != zero_stage:
            raise CheckpointError(
                f"{self.name} was written with ZeRO stage {before} and cannot go on with stage "
                f"{zero_stage}; resume with training.zero_stage={before}."
            )

    def fetch(self, scratch: Path) -> Path:
        """A local folder with the checkpoint's files: its own if it is local, else a copy."""
        source = f"{self.storage.path}/{self.name}"
        if isinstance(self.storage.filesystem, pyarrow.fs.LocalFileSystem):
            return Path(source)
        target = scratch / self.name
        for file in self.manifest["files"]:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            pyarrow.fs.copy_files(
                f"{source}/{file}",
                str(target / file),
                source_filesystem=self.storage.filesystem,
                destination_filesystem=pyarrow.fs.LocalFileSystem(),
            )
        return target


def newest_checkpoint(storage: Storage, *, only: str = "") -> SavedCheckpoint | None:
    """The newest checkpoint that counts, or None; those that do not are left where they are.

    Args:
        only: verify the files whose names start so; by default all of them.

    Raises:
        CheckpointError: a checkpoint has another format version.
    """
    for name in sorted(_checkpoint_names(storage), reverse=True):
        manifest, problem = _verify(storage, name, only)
        if manifest is not None:
            return SavedCheckpoint(storage, name, manifest)
        print(f"Skipping checkpoint {name}: {problem}", flush=True)
    return None


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
    saved = newest_checkpoint(Storage.of(folder / CHECKPOINTS), only=f"{MODEL}/")
    if saved is None:
        raise BundleError(
            f"{folder} is no model folder, no checkpoint, and no run with a complete checkpoint; "
            "train one, or name another folder."
        )
    return folder / CHECKPOINTS / saved.name / MODEL


def save_checkpoint(
    engine: Any,
    manifest: dict[str, Any],
    write_bundle: Callable[[Path], None],
    *,
    scratch: Path,
    keep: int,
    keep_best: int,
) -> None:
    """Save through Ray Train; every rank calls it. The manifest follows once all files are up.

    Args:
        manifest: what rank 0 writes, without `files`.
        write_bundle: called with the bundle's folder on rank 0.
        scratch: an empty folder of this rank, empty again afterwards.
        keep: the newest checkpoints that stay; older ones go once the manifest is written.
        keep_best: of those that were evaluated when they were saved, so many more stay.
    """
    name = f"step-{manifest['step']:08d}"
    engine.save_checkpoint(str(scratch / ZERO), tag=ZERO_TAG, save_latest=False)
    if dist.get_rank() == 0:
        write_bundle(scratch / MODEL)
    files = _gather_hashes(scratch)
    if dist.get_rank() == 0:
        discard(Storage.of_ray_train(), name)
    dist.barrier()
    ray.train.report(
        {key: manifest[key] for key in ("step", "train_loss", "heldout_ece")},
        checkpoint=ray.train.Checkpoint.from_directory(str(scratch)),
        checkpoint_dir_name=name,
    )
    for part in scratch.iterdir():
        shutil.rmtree(part)
    dist.barrier()  # every rank's files are in the storage now
    if dist.get_rank() == 0:
        storage = Storage.of_ray_train()
        full = {"format_version": FORMAT_VERSION, **manifest, "files": files}
        _write_atomically(storage, f"{name}/{MANIFEST}", json.dumps(full, indent=1) + "\n")
        prune(storage, name, keep, keep_best)


def prune(storage: Storage, newest: str, keep: int, keep_best: int) -> None:
    """Delete the checkpoints before `newest` that are neither among the newest nor the best."""
    old = sorted(name for name in _checkpoint_names(storage) if name <= newest)[:-keep]
    measured: list[tuple[float, str]] = []
    for name in old if keep_best else ():
        manifest = _read_manifest(storage, name)[0]
        if manifest and manifest["heldout_ece"] and manifest["heldout_step"] == manifest["step"]:
            measured.append((manifest["heldout_ece"]["all_chosen"], name))
    best = [name for _, name in sorted(measured)[:keep_best]]
    for name in old:
        if name not in best:
            discard(storage, name)


def discard(storage: Storage, name: str) -> None:
    """Delete a checkpoint, if it is there: an old one, or what an interrupted save has left."""
    folder = f"{storage.path}/{name}"
    if storage.filesystem.get_file_info(folder).type == pyarrow.fs.FileType.Directory:
        storage.filesystem.delete_dir(folder)


def forget_ray_snapshot(folder: Path) -> None:
    """Remove Ray Train's own list of a run's checkpoints, so that it cannot refuse to resume.

    It names folders that may be gone since, and is not written atomically.
    """
    (folder / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)


def _gather_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that any rank holds, by relative path."""
    mine = {
        str(path.relative_to(folder)): sha256_of_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    merged: dict[str, str] = {}
    for files in everyone:
        for name, digest in files.items():
            assert merged.setdefault(name, digest) == digest, f"two ranks wrote {name}"
    return merged


def _write_atomically(storage: Storage, name: str, text: str) -> None:
    target = f"{storage.path}/{name}"
    with storage.filesystem.open_output_stream(target + ".partial") as file:
        file.write(text.encode())
    storage.filesystem.move(target + ".partial", target)


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
    for file_name, expected in manifest["files"].items():
        if not file_name.startswith(only):
            continue
        try:
            found = _sha256(storage, f"{folder}/{file_name}")
        except OSError:
            return None, f"{file_name} is missing"
        if found != expected:
            return None, f"{file_name} is damaged (sha256 {found}, expected {expected})"
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


def _sha256(storage: Storage, path: str) -> str:
    digest = hashlib.sha256()
    with storage.filesystem.open_input_stream(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
