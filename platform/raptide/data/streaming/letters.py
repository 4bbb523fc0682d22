"""How often each residue letter occurs in what is trained on, counted by Ray Data.

A worker that runs a task imports the module of its function, so this one stays free of torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray

from raptide.alphabet import count_letters
from raptide.data.corpus import Corpus
from raptide.data.streaming.rows import draw_members
from raptide.data.streaming.stream import StreamPlan
from raptide.errors import plain_errors


def count_training(plan: StreamPlan, index: int) -> np.ndarray:
    """How often each letter occurs in the training residues of a source, [27] int64.

    They are those of epoch 0 under the sampling in use.
    """
    source = plan.sources[index]
    blocks = plan.training_blocks(source.open())

    def count(places: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        corpus = source.open()
        counts = [_count_block(plan, index, corpus, blocks[i]) for i in places["id"]]
        yield {"counts": np.stack(counts)}

    tasks = min(len(blocks), 256)
    counted = ray.data.range(len(blocks), override_num_blocks=tasks).map_batches(count)
    with plain_errors():
        return np.sum([batch["counts"].sum(0) for batch in counted.iter_batches()], axis=0)


def _count_block(plan: StreamPlan, index: int, corpus: Corpus, row: dict[str, Any]) -> np.ndarray:
    block = corpus.read_block(row)
    members = draw_members(block, plan.settings.sampling, plan.source_seed(index), 0)
    chosen = np.zeros(len(block.residue_splits) - 1, bool)
    chosen[members] = True
    return count_letters(block.residues[np.repeat(chosen, np.diff(block.residue_splits))])
