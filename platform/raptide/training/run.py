"""What the driver tells every worker of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raptide.data.streaming.stream import StreamPlan
from raptide.training.mirror import Mirror
from raptide.training.planning.recipe import Recipe
from raptide.training.watching.validation import Bench


@dataclass(frozen=True)
class Run:
    """One run, the same for all its workers and restarts."""

    recipe: Recipe
    plan: StreamPlan
    folder: str
    """On the driver's machine, and on all where the run does not live at a URI."""
    uri: str | None
    run_id: str
    """W&B's id, the same through all restarts."""
    code_version: str
    device: str
    driver: str
    """Tells the process that started the workers from all others."""
    board: Any
    """Handle of its progress board."""
    bench: Bench | None
    """What checkpoints are asked beside their held-out ECE."""

    @property
    def mirror(self) -> Mirror | None:
        """Of a run that lives at a URI, on this node."""
        return None if self.uri is None else Mirror.of_worker(self.uri, self.run_id)

    @property
    def folder_here(self) -> Path:
        """Where this node's workers write."""
        mirror = self.mirror
        return Path(self.folder) if mirror is None else mirror.folder
