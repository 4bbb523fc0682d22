"""Steps of a whole batch by engines of any recipe and number of ranks, and their checkpoints."""

import json
import uuid

import numpy as np
import torch
import torch.distributed as dist

from raptide.alphabet import ESM_33
from raptide.data.streaming.batch import Cursor, GlobalBatch, PackedRows
from raptide.training.batches import cut_share, share_bounds
from raptide.training.checkpoints.checkpoint import ZERO, ZERO_TAG, SavedCheckpoint
from raptide.training.checkpoints.owned import Storage
from raptide.training.step import Stepper

CPU, RATE = torch.device("cpu"), 1e-2
NAME = "step-00000002"


def a_batch(seed, rows):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 24, (rows, 64)).astype(np.uint8)
    targets = np.where(rng.random(tokens.shape) < 0.2, tokens, ESM_33.pad).astype(np.uint8)
    packed = PackedRows(tokens, targets, [np.array([40, 24], np.int32)] * rows)
    return GlobalBatch(packed, np.zeros((rows, 3), np.int64), Cursor())


def take_steps(engine, recipe, rank, workers, *, steps, first=0):
    """Loss and norm of each step; the batch of a step is the same however many ranks there are."""
    stepper, results = Stepper(engine, workers), []
    rows = recipe.stream.batch_rows
    bounds = share_bounds(rows, rank, workers, 1, recipe.accumulation(workers))
    for seed in range(first, first + steps):
        result = stepper.step(cut_share(bounds, ESM_33, CPU, a_batch(seed, rows)), RATE)
        results.append([result.loss, result.grad_norm])
    return results


def saved_after(engine, recipe, folder, *, workers):
    """A checkpoint of an engine after two steps; every rank calls it."""
    engine.save_checkpoint(str(folder / NAME / ZERO), tag=ZERO_TAG, save_latest=False)
    if dist.get_rank() == 0:
        manifest = {
            "step": 2,
            "recipe": recipe.model_dump(),
            "workers": workers,
            "wandb_run_id": uuid.uuid4().hex,
            "inv_freq": engine.module.inv_freq.tolist(),
            "files": {},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))


def saved_in(folder):
    """What `saved_after` has left."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return SavedCheckpoint(Storage.of(folder), NAME, manifest)
