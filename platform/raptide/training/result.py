"""What a finished run leaves, and whether a run is finished."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from raptide.errors import CheckpointError
from raptide.patience import read_surely
from raptide.small_files import read_lines, write_whole
from raptide.training.checkpoints.checkpoint import MODEL, local_checkpoint, newest_checkpoint
from raptide.training.checkpoints.owned import RESULT, Storage, read_run_info
from raptide.training.planning.recipe import Recipe
from raptide.training.watching.audit import Audit, keep_audit, read_audit
from raptide.training.watching.heldout import UNIFORM_ECE, Ece, Evaluations
from raptide.training.watching.tracking import METRICS


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    checkpoint: Path
    step: int
    tokens: int
    heldout_ece: Ece
    unigram_ece: Ece
    uniform_ece: float
    failed_evaluations: int
    """Evaluations beside the training that came to nothing."""

    tokens_per_s: float
    """Median over the logged steps, padding not counted."""
    wandb_offline: bool
    """Whether W&B files wait in the run folder to be synced."""

    audit: Audit | None
    """What the run's audit comes to, if it was kept."""

    @property
    def bundle(self) -> Path:
        return self.checkpoint / MODEL


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether a run's steps, its last evaluation and its result are all there."""
    file = folder / RESULT
    saved = newest_checkpoint(Storage.of_run(folder), only=f"{MODEL}/") if file.exists() else None
    if saved is None:
        return False
    evaluations = Evaluations.of_manifest(saved.manifest)
    all_steps = saved.step >= recipe.training.steps
    over = all_steps or evaluations.is_over(recipe.evaluation)
    return over and evaluations.step == saved.step == _step_of_result(file)


def _step_of_result(file: Path) -> int | None:
    """None where it is no result: the run is finished once more."""
    try:
        return json.loads(read_surely(str(file), file.read_text))["step"]
    except (ValueError, KeyError, TypeError):
        return None


def read_result(folder: Path, recipe: Recipe, *, step: int | None = None) -> RunResult:
    """What a run's newest checkpoint, its metrics and its audit come to.

    Args:
        step: where the workers have ended.

    Raises:
        CheckpointError: there is no checkpoint of that step, or it was not evaluated.
    """
    saved = newest_checkpoint(Storage.of_run(folder), only=f"{MODEL}/")
    if (
        saved is None
        or saved.step != saved.manifest["heldout_step"]
        or step not in (None, saved.step)
    ):
        raise CheckpointError(f"{folder} ended without its last checkpoint; run it with --resume.")
    info = read_run_info(folder)
    speed = "speed/tokens_per_s"
    speeds = [line[speed] for line in read_lines(folder / METRICS) if speed in line]
    return RunResult(
        folder=folder,
        checkpoint=local_checkpoint(folder, saved),
        step=saved.step,
        tokens=saved.manifest["tokens"],
        heldout_ece=Ece(**saved.manifest["heldout_ece"]),
        unigram_ece=Ece(**info["unigram_ece"]),
        uniform_ece=UNIFORM_ECE,
        failed_evaluations=Evaluations.of_manifest(saved.manifest).failed,
        tokens_per_s=statistics.median(speeds or [0.0]),
        wandb_offline=any((folder / "wandb").glob("offline-run-*")),
        audit=read_audit(folder) if recipe.tracking.audit else None,
    )


def write_result(result: RunResult) -> None:
    """Write `result.json`, and what the audit comes to.

    Raises:
        OSError: the file system refuses.
    """
    if result.audit is not None:
        keep_audit(result.folder, result.audit)
    write_whole(result.folder / RESULT, json.dumps(asdict(result), default=str, indent=1) + "\n")
