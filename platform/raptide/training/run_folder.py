"""A run's folder: there whole or not at all, of one recipe, and of one process at a time."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import yaml

from raptide.config import load_settings
from raptide.errors import CheckpointError, ConfigError
from raptide.small_files import claim, write_whole
from raptide.training.checkpoints.checkpoint import has_finished_one
from raptide.training.checkpoints.owned import RECIPE, RUN_INFO, Storage
from raptide.training.planning.recipe import Recipe
from raptide.training.planning.resuming import changed_fields
from raptide.training.result import is_finished
from raptide.training.watching.heldout import Ece

Standing = Literal["none", "begun", "saved", "finished"]
"""How far the run in a folder has come: `begun` has no checkpoint yet."""


def load_resumed(folder: Path) -> Path:
    """The recipe file of a run to resume.

    Raises:
        CheckpointError: the folder holds no run.
    """
    if not (folder / RECIPE).is_file():
        raise CheckpointError(
            f"{folder} holds no run to resume (no {RECIPE}); name the folder of an earlier run."
        )
    return folder / RECIPE


def standing_of_run(folder: Path, recipe: Recipe) -> Standing:
    """How far a recipe's run in a folder has come.

    Raises:
        CheckpointError: the folder holds something else than a run.
        ConfigError: it holds the run of another recipe; every field that differs is named.
    """
    if not _holds_anything(folder):
        return "none"
    changed = changed_fields(load_settings(Recipe, load_resumed(folder)), recipe)
    if changed:
        named = ", ".join(f"{name} {old} there, {new} here" for name, (old, new) in changed.items())
        raise ConfigError(
            f"{folder} holds the run of another recipe ({named}); give that recipe, change the run "
            f"with --resume {folder} section.field=value, or choose another --output."
        )
    if is_finished(folder, recipe):
        return "finished"
    return "saved" if has_finished_one(Storage.of_run(folder)) else "begun"


def refuse_folder(folder: Path, replace: bool) -> None:
    """A new run takes no other's place unasked, and none whose checkpoints are never found again:
    DeepSpeed looks for its files with glob."""
    if _holds_anything(folder) and not replace:
        raise ConfigError(
            f"The run folder {folder} exists already; go on with --resume {folder}, start over "
            "with --replace, or choose another --output."
        )
    if _holds_anything(folder) and not (folder / RECIPE).is_file():
        raise ConfigError(
            f"{folder} is no run folder (no {RECIPE} in it), so it is not replaced; choose "
            "another --output."
        )
    if pattern := re.search(r"[\[\]*?]", str(folder.resolve())):
        raise ConfigError(
            f"A run folder's path may not hold {pattern[0]!r}, or DeepSpeed could not load its "
            f"checkpoints, but {folder.resolve()} does; choose another --output."
        )


def refuse_to_delete(folder: Path, start: str, field: str) -> None:
    """A run is not replaced by one that starts from it.

    Args:
        start: a path, or one in the storage of the run's checkpoints.
        field: of the recipe, which names it.

    Raises:
        ConfigError: it lies in what --replace would delete.
    """
    deleted = [folder.resolve()]
    if (folder / RUN_INFO).exists():
        storage = Storage.of_run(folder)
        deleted += [Path(storage.path), Path(storage.path).resolve()]  # it may be a link
    if any(Path(each).is_relative_to(place) for place in deleted for each in _both(start)):
        raise ConfigError(
            f"{field} lies in {folder}, which --replace would delete; choose another --output, or "
            "copy it to another place first."
        )


def _both(start: str) -> tuple[str, str]:
    """As it stands, as in a bucket, and as a path of this machine."""
    return start, str(Path(start).resolve())


def _holds_anything(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def begin_run(folder: Path, recipe: Recipe, baseline: Ece, uri: str | None = None) -> None:
    """Make the folder of a new run, with what stays the same through all its restarts.

    It appears whole, so of two processes that begin a run in one place, one is refused, and a
    process that ends in the middle leaves no half of a run.

    Args:
        uri: of a run that lives there, with its checkpoints.

    Raises:
        ConfigError: the place was taken meanwhile.
    """
    run_id = uuid.uuid4().hex[:12]
    info = {
        "wandb_run_id": run_id,
        "unigram_ece": asdict(baseline),
        "checkpoints": uri or _storage_uri(recipe, run_id),
    }
    partial = folder.with_name(f"{folder.name}.{run_id}.partial")
    partial.mkdir(parents=True)
    try:
        write_whole(partial / RUN_INFO, json.dumps(info) + "\n")
        keep_recipe(partial, recipe)
        partial.rename(folder)  # takes the place of nothing but an empty folder
    except OSError as error:
        raise ConfigError(
            f"The run folder {folder} cannot be made ({error.strerror}): another process may have "
            "begun a run there; choose another --output."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def keep_recipe(folder: Path, recipe: Recipe) -> None:
    """Write down the recipe that a run goes on with.

    Raises:
        OSError: the file system refuses.
    """
    write_whole(folder / RECIPE, yaml.safe_dump(recipe.model_dump(), sort_keys=False))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within the block, no other process trains the run in a folder; a dead one's claim is gone.

    Raises:
        ConfigError: another process does.
    """
    with (folder / RUN_INFO).open("r+") as file:
        if not claim(file):
            raise ConfigError(
                f"Another process trains the run in {folder}; wait for its end, stop it, or "
                "choose another --output."
            )
        yield


def delete_run(folder: Path) -> None:
    """Delete an earlier run, with its checkpoints wherever they lie."""
    if not folder.exists():
        return
    with alone_in(folder) if (folder / RUN_INFO).exists() else nullcontext():
        storage = Storage.of_run(folder)
        names = storage.names("", folders=True)
        last = (RUN_INFO, RECIPE)  # what tells of a run, which are there together or a recipe alone
        for name in [*(name for name in names if name not in last), *last]:
            storage.delete(name)
        if "/" in storage.path:  # else it is a whole bucket
            storage.delete("")
        shutil.rmtree(folder, ignore_errors=True)


def _storage_uri(recipe: Recipe, run_id: str) -> str | None:
    """Where a new run's checkpoints go, a folder of its own; None for the run folder."""
    uri = recipe.checkpoint.storage
    if uri is None:
        return None
    parts = urlsplit(uri)  # options may stand behind the path: s3://bucket/runs?region=…
    return parts._replace(path=f"{parts.path.rstrip('/')}/{recipe.name}-{run_id}").geturl()
