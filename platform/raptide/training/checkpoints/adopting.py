"""A new run that goes on from a checkpoint of another."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath

from raptide.config import parse_settings
from raptide.errors import CheckpointError
from raptide.patience import patiently, reason_of, trouble
from raptide.storage import copy_stream, is_uri, storage_of
from raptide.training.checkpoints.checkpoint import (
    TRANSFERS,
    SavedCheckpoint,
    newest_checkpoint,
    open_checkpoint,
    verify,
    with_attempt,
)
from raptide.training.checkpoints.keeping import write_manifest
from raptide.training.checkpoints.owned import (
    FOLDER,
    RUN_INFO,
    Storage,
    checkpoint_name,
    checkpoint_step,
    counted_names,
)
from raptide.training.planning.recipe import Recipe


def find_checkpoint(start: str) -> SavedCheckpoint:
    """The checkpoint that `continue_from` names: itself, or the newest one of a run, of one that
    has cooled down the last before.

    Args:
        start: a run's folder, or folder or URI of a checkpoint, which may leave out the attempt
            (`step-00000200`), or of many.

    Raises:
        CheckpointError: there is none that counts.
    """
    if not is_uri(start) and (Path(start) / RUN_INFO).is_file():
        storage = Storage.of_run(Path(start))
    else:
        there = storage_of(start, "continue_from")
        named = with_attempt(start, Storage(there.filesystem, there.path))
        there = storage_of(named, "continue_from")
        folder = PurePosixPath(there.path)
        if FOLDER.fullmatch(folder.name):
            return _named(start, Storage(there.filesystem, str(folder.parent)), folder.name)
        storage = Storage(there.filesystem, there.path)
    saved = newest_checkpoint(storage)
    if saved is None:
        raise CheckpointError(
            f"continue_from: {start} holds no complete checkpoint; name a run, or the folder of a "
            "checkpoint, for example runs/demo/checkpoints/step-00000200."
        )
    return _before_cooldown(start, saved)


def _before_cooldown(start: str, newest: SavedCheckpoint) -> SavedCheckpoint:
    """Where the rate was level last: from its end on it would jump."""
    level = parse_settings(Recipe, newest.manifest["recipe"], source=newest.uri).last_level_step
    if level is None or newest.step <= level:
        return newest
    for name in reversed(counted_names(newest.storage)):
        saved = open_checkpoint(newest.storage, name) if checkpoint_step(name) <= level else None
        if saved is not None:
            return saved
    raise CheckpointError(
        f"continue_from: {start} has cooled down since step {level}, and keeps no checkpoint of "
        f"before; name {newest.uri} itself, whose rate jumps, or another run."
    )


def _named(start: str, storage: Storage, name: str) -> SavedCheckpoint:
    manifest, problem = verify(storage, name)
    if manifest is None:
        raise CheckpointError(
            f"continue_from: {start} is no complete checkpoint ({problem}); name another one."
        )
    return SavedCheckpoint(storage, name, manifest)


def refuse_to_adopt(saved: SavedCheckpoint, recipe: Recipe, fingerprint: dict[str, object]) -> None:
    """Refuse a checkpoint that a new run's recipe does not fit.

    Raises:
        CheckpointError: names the first field that differs and may not.
    """
    before = parse_settings(Recipe, saved.manifest["recipe"], source=saved.uri)
    kept = recipe.checkpoint.model_copy(update={"storage": before.checkpoint.storage})
    starts = {"init_from": before.init_from, "continue_from": before.continue_from}
    saved.refuse_other_run(fingerprint, recipe.model_copy(update={"checkpoint": kept, **starts}))
    if saved.step >= recipe.training.steps:
        raise CheckpointError(
            f"{saved.uri} is of step {saved.step}, but training.steps is {recipe.training.steps}; "
            "ask for more steps, or go on from an earlier checkpoint."
        )


def adopt(saved: SavedCheckpoint, storage: Storage, recipe: Recipe, run_id: str) -> None:
    """Copy a checkpoint into a new run's storage, as if the run had saved it.

    It counts once its manifest is there, which comes last: whoever ends before starts over.

    Raises:
        RaptideError: one of the storages fails, or a file arrives damaged again and again.
    """

    name = checkpoint_name(saved.step, None)  # no attempt of this run's has made it

    def copy(file: str) -> None:
        source, target = saved.storage.full(f"{saved.name}/{file}"), storage.full(f"{name}/{file}")
        storage.filesystem.create_dir(str(PurePosixPath(target).parent), recursive=True)
        with (
            saved.storage.filesystem.open_input_stream(source) as whence,
            storage.filesystem.open_output_stream(target) as sink,
        ):
            if copy_stream(whence, sink) != saved.manifest["files"][file]:
                raise OSError(errno.EIO, "arrived damaged", source)

    try:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            for _ in pool.map(lambda file: patiently(partial(copy, file)), saved.manifest["files"]):
                pass
    except OSError as error:
        raise trouble(
            error,
            f"{saved.uri} cannot be copied to {storage.path} ({reason_of(error)}); see to that and "
            "give the command again, with --start-or-resume.",
        ) from None
    own = {"wandb_run_id": run_id, "recipe": recipe.model_dump(), "awaits_evaluation": False}
    write_manifest(storage, name, saved.manifest | own)
