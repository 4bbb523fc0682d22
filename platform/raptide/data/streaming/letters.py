"""How often each residue letter occurs in what is trained on, counted by Ray Data.

A worker that runs a task imports the module of its function, so this one stays free of torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import ray

from raptide.alphabet import count_letters
from raptide.data.streaming.rows import draw_members
from raptide.data.streaming.stream import StreamPlan, open_plan
from raptide.errors import plain_errors

MOST_BLOCKS = 512
"""Blocks that are counted: clusters lie in the order of a hash, so that the first half a billion
residues stand for all, and no run begins with reading a whole corpus."""


def count_training(plan: StreamPlan, index: int) -> np.ndarray:
    """How often each letter occurs in the training residues of a source, [27] int64.

    They are those of epoch 0 under the sampling in use; of a large corpus, of its first blocks.
    """
    blocks = min(len(open_plan(plan).blocks[index]), MOST_BLOCKS)

    def count(places: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        yield {"counts": np.stack([_count_block(plan, index, int(i)) for i in places["id"]])}

    counted = ray.data.range(blocks, override_num_blocks=min(blocks, 256)).map_batches(count)
    with plain_errors():
        return np.sum([batch["counts"].sum(0) for batch in counted.iter_batches()], axis=0)


def _count_block(plan: StreamPlan, index: int, place: int) -> np.ndarray:
    opened = open_plan(plan)
    block = opened.corpora[index].read_block(opened.blocks[index][place])
    members = draw_members(block, plan.settings.sampling, plan.source_seed(index), 0)
    chosen = np.zeros(len(block.residue_splits) - 1, bool)
    chosen[members] = True
    return count_letters(block.residues[np.repeat(chosen, np.diff(block.residue_splits))])
