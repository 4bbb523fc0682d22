"""One of two ranks that train at ZeRO 3 with every parameter cut up: `two_ranks.py RANK FOLDER`.

Twice two steps from the same weights: once with an empty second micro-batch on rank 1, once with
one that breaks inside in the first step. Writes what came of them, how far the weights are apart
after the first, and at the start from those of a whole model, how many passes the rank has made,
and how far from a mean its weights are once rank 0 has put it into the engine.
"""

import dataclasses
import datetime
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters

from raptide.alphabet import ESM_33
from raptide.config import parse_settings
from raptide.data.streaming.batch import Cursor, GlobalBatch, PackedRows
from raptide.model.families import make_model
from raptide.model.formats.detect import write_weights
from raptide.model.formats.weights import Weights
from raptide.training.batches import cut_share, empty_micro_batch, share_bounds
from raptide.training.checkpoints.running_mean import AVERAGED, RunningMean
from raptide.training.checkpoints.step_bundle import full_tensors
from raptide.training.engine import build_engine
from raptide.training.planning.recipe import Recipe
from raptide.training.step import Stepper

ROWS, CPU = 4, torch.device("cpu")

TREE = {
    "name": "x",
    "corpus": "none",
    "stream": {"row_tokens": 64, "crop_tokens": 64, "batch_rows": ROWS},
    "model": {"layers": 2, "width": 32, "heads": 4},
    "training": {
        "steps": 2,
        "micro_batch_rows": 1,
        "precision": "fp32",
        "zero_stage": 3,
        "zero3_keep_whole_below": 0,
        "bucket_elements": 500,
    },
    "cluster": {"workers": 2, "device": "cpu"},
    "checkpoint": {"average_over": 2},
    "evaluation": {"asynchronous": True},
}


def a_share(rank):
    rng = np.random.default_rng(3)
    tokens = rng.integers(4, 24, (ROWS, 64)).astype(np.uint8)
    targets = np.where(rng.random(tokens.shape) < 0.2, tokens, ESM_33.pad).astype(np.uint8)
    rows = PackedRows(tokens, targets, [np.array([40, 24], np.int32)] * ROWS)
    batch = GlobalBatch(rows, np.zeros((ROWS, 3), np.int64), Cursor())
    return cut_share(share_bounds(ROWS, rank, 2, 1, 2), ESM_33, CPU, batch)


def train(recipe, rank, breaks):
    engine = build_engine(recipe, 2, "cpu", None)
    start = weights_of(engine, recipe)
    share, passes = a_share(rank), []
    if rank == 1 and not breaks:
        share = dataclasses.replace(share, micro=(share.micro[0], empty_micro_batch(ESM_33, CPU)))

    def spoil(layer, inputs, output):
        passes.append(1)
        return output * float("nan") if rank == 1 and breaks and len(passes) == 2 else output

    engine.module.layers[0].register_forward_hook(spoil)
    stepper = Stepper(engine, 2)
    first = dataclasses.asdict(stepper.step(share, 1e-2))
    state = weights_of(engine, recipe)
    second = dataclasses.asdict(stepper.step(share, 1e-2))
    return {"results": [first, second], "passes": len(passes)}, start, state


def weights_of(engine, recipe):
    """On rank 0; nothing on others."""
    found = full_tensors(engine, recipe.training)
    return {name: tensor for name, tensor in found if tensor is not None}


def distance(found, expected):
    return max((float((found[n] - expected[n]).abs().max()) for n in found), default=0.0)


def put_mean_into_engine(recipe, rank, folder):
    """Rank 0 alone has read it."""
    model = make_model(recipe.model).initialise(99)
    engine, mean = build_engine(recipe, 2, "cpu", None), RunningMean(recipe, folder / "mean")
    if rank == 0:
        weights = dataclasses.replace(Weights.of(model), lineage={AVERAGED: 1})
        write_weights(folder / "model", weights)
        mean.begin(recipe.training.steps)
        mean.keep(folder / "model")
    mean.put_into(engine)
    found = {}
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return distance(found, model.state_dict())


def main():
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    timeout = datetime.timedelta(seconds=60)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    recipe = parse_settings(Recipe, TREE, source="two ranks")
    empty, start, expected = train(recipe, rank, breaks=False)
    broken, _, found = train(recipe, rank, breaks=True)
    meant = put_mean_into_engine(recipe, rank, folder)
    drawn = make_model(recipe.model).initialise(recipe.training.seed).state_dict()
    told = {
        "empty": empty,
        "broken": broken,
        "farthest": distance(found, expected),
        "farthest_at_start": distance(start, drawn),
        "farthest_from_mean": meant,
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
