"""One of two ranks that train with Muon: `muon_ranks.py RANK FOLDER`.

For every recipe in `recipes.json` three steps of the whole batch, saved after the second, and the
third once more from there; writes the losses, the norms of the gradients, and from rank 0 all
weights.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from muon_steps import saved_after, saved_in, take_steps

from raptide.config import parse_settings
from raptide.training.checkpoints.step_bundle import full_tensors
from raptide.training.engine import build_engine, load_state
from raptide.training.planning.recipe import Recipe


def main():
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    told = {}
    for name, tree in json.loads((folder / "recipes.json").read_text()).items():
        recipe = parse_settings(Recipe, tree, source=name)
        engine = build_engine(recipe, 2, "cpu", None)
        results = take_steps(engine, recipe, rank, 2, steps=2)
        saved_after(engine, recipe, folder / name, workers=2)
        results += take_steps(engine, recipe, rank, 2, steps=1, first=2)
        told[name] = results
        keep_weights(engine, recipe, folder / f"{name}.pt")
        dist.barrier()
        saved = saved_in(folder / name)
        engine = build_engine(recipe, 2, "cpu", saved)
        load_state(engine, saved, 2)
        told[f"{name}, resumed"] = take_steps(engine, recipe, rank, 2, steps=1, first=2)
        keep_weights(engine, recipe, folder / f"{name}, resumed.pt")
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def keep_weights(engine, recipe, file):
    state = dict(full_tensors(engine, recipe.training))
    if dist.get_rank() == 0:
        torch.save(state, file)


if __name__ == "__main__":
    main()
