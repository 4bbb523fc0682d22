"""What becomes of checkpoints that are saved: told more of, kept, deleted."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from raptide.config import parse_settings
from raptide.errors import RaptideError
from raptide.training.checkpoints.checkpoint import MODEL, holds, read_manifest
from raptide.training.checkpoints.owned import (
    MANIFEST,
    Storage,
    checkpoint_names,
    checkpoint_order,
    checkpoint_step,
    counted_names,
)
from raptide.training.planning.recipe import Recipe


def amend_manifest(storage: Storage, name: str, changes: dict[str, Any]) -> None:
    """Write down what became known after a checkpoint was saved; nothing if it is gone."""
    manifest, _ = read_manifest(storage, name)
    if manifest is not None:
        write_manifest(storage, name, manifest | changes)


def write_manifest(storage: Storage, name: str, manifest: dict[str, Any]) -> None:
    """Write a checkpoint's manifest, all of it or nothing."""
    content = (json.dumps(manifest, indent=1) + "\n").encode()
    storage.write(f"{name}/{MANIFEST}", lambda file: file.write(content))


def awaiting_evaluation(storage: Storage, last_step: int) -> list[str]:
    """Checkpoints up to a step whose evaluation was promised and never ended, oldest first."""
    waiting = []
    for name in counted_names(storage):
        manifest, _ = read_manifest(storage, name)
        due = manifest is not None and manifest.get("awaits_evaluation", False)
        if due and checkpoint_step(name) <= last_step:
            waiting.append(name)
    return waiting


def prune(
    storage: Storage, newest: str, keep: int, keep_best: int, spare: Collection[str] = ()
) -> None:
    """Delete the checkpoints before `newest` that are neither among the newest nor the best, nor
    the last one with a bundle, nor the last one before a rate falls.

    Those that do not count go, too.

    Args:
        spare: names that stay in any case.

    Raises:
        RaptideError: the storage fails; what is left is deleted at the next call.
    """
    last = checkpoint_order(newest)
    earlier = [name for name in checkpoint_names(storage) if checkpoint_order(name) <= last]
    counted = set(counted_names(storage))
    found = {name: read_manifest(storage, name)[0] for name in earlier if name in counted}
    manifests = {name: manifest for name, manifest in found.items() if manifest is not None}
    finished = list(manifests)
    measured: list[tuple[float, str]] = []
    for name in finished[:-keep]:
        manifest = manifests[name]
        if manifest["heldout_ece"] and manifest["heldout_step"] == manifest["step"]:
            measured.append((manifest["heldout_ece"]["all_chosen"], name))
    # A run is served and evaluated by the newest one that holds a bundle.
    bundled = [name for name in finished if holds(manifests[name], f"{MODEL}/")]
    best = [name for _, name in sorted(measured)[:keep_best]]
    level = _last_level_ones(manifests)
    for name in earlier:
        if name not in (*finished[-keep:], *bundled[-1:], *best, *spare, *level):
            storage.delete(name)


def _last_level_ones(manifests: dict[str, dict[str, Any]]) -> list[str]:
    """The last checkpoint before the rate falls, of each length that a run was to have.

    Args:
        manifests: by name, oldest first.
    """
    last = {}
    for name, manifest in manifests.items():
        level = parse_settings(Recipe, manifest["recipe"], source=name).last_level_step
        if level is not None and manifest["step"] <= level:
            last[level] = name
    return list(last.values())


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
