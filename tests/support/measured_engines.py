"""One of two ranks that measure what real engines allocate: `measured_engines.py RANK FOLDER`.

Reads `recipes.json` in the folder, recipes by name; writes `NAME-RANK.json`: by how many bytes
the process is at most larger in an update (its third, when DeepSpeed has its routine) than before
it had an engine, and the size of what the rank then saves. The kernel keeps the peak; for tensors
to go when they are freed, the C library is told so by who starts this.
"""

import datetime
import gc
import json
import multiprocessing
import os
import sys
import warnings
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}

import deepspeed  # noqa: F401  once, for all that are forked
import numpy as np
import torch
import torch.distributed as dist

from raptide.alphabet import ESM_33
from raptide.config import parse_settings
from raptide.data.streaming.batch import Cursor, GlobalBatch, PackedRows
from raptide.training.batches import cut_share, share_bounds
from raptide.training.engine import build_engine
from raptide.training.planning.recipe import Recipe
from raptide.training.step import Stepper

WORKERS, UPDATES = 2, 3


def a_share(recipe, rank):
    rng = np.random.default_rng(3)
    rows, width = recipe.stream.batch_rows, recipe.stream.row_tokens
    tokens = rng.integers(4, 24, (rows, width)).astype(np.uint8)
    targets = np.where(rng.random(tokens.shape) < 0.15, tokens, ESM_33.pad).astype(np.uint8)
    packed = PackedRows(tokens, targets, [np.array([width], np.int32)] * rows)
    batch = GlobalBatch(packed, np.zeros((rows, 3), np.int64), Cursor())
    micro_rows, times = recipe.training.micro_batch_rows, recipe.accumulation(WORKERS)
    bounds = share_bounds(rows, rank, WORKERS, micro_rows, times)
    return cut_share(bounds, ESM_33, torch.device("cpu"), batch)


def resident(field):
    """Bytes of this process: VmRSS now, VmHWM at most since `forget_the_peak`."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def forget_the_peak():
    Path("/proc/self/clear_refs").write_text("5")


def train(recipe, share):
    """An engine after some updates; the peak is that of the last one."""
    engine = build_engine(recipe, WORKERS, "cpu", None)
    stepper = Stepper(engine, WORKERS)
    for _ in range(UPDATES):
        gc.collect()
        forget_the_peak()
        stepper.step(share, 1e-3)
    return engine


def measure(name, tree, rank, folder):
    warnings.simplefilter("ignore")
    timeout = datetime.timedelta(seconds=120)
    store = f"file://{folder / f'{name}.store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    recipe = parse_settings(Recipe, tree, source=name)
    share = a_share(recipe, rank)
    one_layer = recipe.model.model_copy(update={"layers": 1})
    train(recipe.model_copy(update={"model": one_layer}), share)  # what is made once
    gc.collect()
    before = resident("VmRSS")
    engine = train(recipe, share)
    told = {"peak": resident("VmHWM") - before, "after": resident("VmRSS") - before}
    engine.save_checkpoint(str(folder / f"{name}-{rank}"), tag="state", save_latest=False)
    files = [file for file in (folder / f"{name}-{rank}").rglob("*.pt") if file.is_file()]
    told["saved"] = sum(file.stat().st_size for file in files)
    (folder / f"{name}-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def main():
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for name, tree in json.loads((folder / "recipes.json").read_text()).items():
        # A process each, since what one engine leaves would count as what the next one frees.
        fresh = multiprocessing.get_context("fork").Process(
            target=measure, args=(name, tree, rank, folder)
        )
        fresh.start()
        fresh.join()
        assert fresh.exitcode == 0, name


if __name__ == "__main__":
    main()
