"""Evaluation of checkpoints beside the training, in a task that Ray Train starts."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from raptide.data.streaming.stream import StreamPlan
from raptide.model.formats.detect import read_weights
from raptide.training.checkpoints.checkpoint import MODEL, Storage, open_checkpoint
from raptide.training.planning.estimate import DTYPES
from raptide.training.planning.recipe import Recipe
from raptide.training.watching.heldout import HeldoutEvaluator, heldout_rows


@dataclass(frozen=True)
class CheckpointEvaluation:
    """Measures held-out ECE of a checkpoint's bundle, in the precision that it is trained in."""

    recipe: Recipe
    plan: StreamPlan
    device: str
    board: Any
    """Handle of the board, from which rank 0 takes what was found."""

    def __call__(self, checkpoint: ray.train.Checkpoint) -> dict[str, Any]:
        path = Path(checkpoint.path)
        storage = Storage(checkpoint.filesystem, str(path.parent))
        saved = open_checkpoint(storage, path.name, only=f"{MODEL}/")
        if saved is None:  # it could not be saved, or is gone since
            ray.get(self.board.add_evaluation.remote(path.name, None))
            return {}
        with tempfile.TemporaryDirectory() as scratch:
            saved.copy_to(Path(scratch), only=f"{MODEL}/")
            model = read_weights(Path(scratch) / MODEL).build()
        device = torch.device(self.device)
        model.to(device, DTYPES[self.recipe.training.precision])
        rows = heldout_rows(self.plan, self.recipe.evaluation)
        evaluator = HeldoutEvaluator(rows, self.plan, self.recipe.training.micro_batch_rows)
        evaluation = evaluator.measure(model, device)
        ray.get(self.board.add_evaluation.remote(path.name, evaluation))
        return asdict(evaluation)
