"""A run's storage: whose it is, and which of its folders are checkpoints of the run.

    attempts/000007-1f0c9a3e         the seventh start of the workers; the last one owns the storage
    step-00000200-000007-1f0c9a3e/   what it saved after step 200
    step-00000100/                   saved by an earlier version of raptide

What the owner saved counts, and what counted when it began, which it has written down. What an
attempt saves after another has taken over lies in folders of its own, and never counts.
"""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

import ray.train

import raptide.storage
from raptide.attempts import Attempt, Attempts
from raptide.errors import CheckpointError
from raptide.patience import read_surely
from raptide.storage import PARTIAL

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
"""A run's storage, which is Ray Train's too, where the recipe names no other."""

RUN_INFO = "run.json"
"""What stays the same through all restarts of a run, in its folder."""

RECIPE = "recipe.yaml"
"""The recipe that a run goes on with, in its folder."""

RESULT = "result.json"
"""Written last of all: where it is, nothing of the run is left to do."""

FOLDER = re.compile(r"step-(\d+)(?:-(\d+-[0-9a-f]+))?")

BEFORE, DRIVER = "before", "driver"
"""What an attempt says: the checkpoints that counted when it began, and which driver's it is."""


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


def checkpoint_name(step: int, attempt: Attempt | None) -> str:
    """The folder of the checkpoint that an attempt saves after a step."""
    return f"step-{step:08d}" + (f"-{attempt.name}" if attempt is not None else "")


def checkpoint_step(name: str) -> int:
    """The step that a checkpoint was saved after."""
    return _parse(name)[0]


def checkpoint_order(name: str) -> tuple[int, Attempt]:
    """Sorts checkpoints from the oldest to the newest."""
    step, attempt = _parse(name)
    return step, attempt or Attempt(0, "")


def _parse(name: str) -> tuple[int, Attempt | None]:
    found = FOLDER.fullmatch(name)
    assert found is not None, f"{name} is no checkpoint's folder"
    return int(found[1]), Attempt.of(found[2] or "")


def checkpoint_names(storage: raptide.storage.Storage) -> list[str]:
    """The folders of all checkpoints, whatever they hold and whosever they are, oldest first."""
    names = storage.names("", folders=True)
    return sorted(filter(FOLDER.fullmatch, names), key=checkpoint_order)


def counted_names(storage: raptide.storage.Storage) -> list[str]:
    """Those that are the run's, finished or not, oldest first.

    Raises:
        RaptideError: the storage fails.
    """
    attempts, names = Attempts(storage), checkpoint_names(storage)
    owner = attempts.owner()
    if owner is None:
        return names
    before = attempts.facts(owner).get(BEFORE)

    def counts(name: str) -> bool:
        attempt = _parse(name)[1]
        if attempt == owner:
            return True
        if before is None:  # it could not write them down
            return attempt is None or attempt.number < owner.number
        return name in before

    return list(filter(counts, names))


def begin_attempt(storage: raptide.storage.Storage, *, above: int = 0, driver: str = "") -> Attempt:
    """Take a run's storage over from whoever owned it.

    Args:
        above: starts that were counted elsewhere, by an earlier version of raptide.
        driver: tells it from others.

    Raises:
        Superseded: another began meanwhile.
        RaptideError: the storage fails.
    """
    names = counted_names(storage)
    finished = [name for name in names if storage.holds(f"{name}/{MANIFEST}")]
    return Attempts(storage).begin(above=above, **{BEFORE: finished, DRIVER: driver})
