"""One update on a global batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from raptide.data.streaming.batch import GlobalBatch
from raptide.training.batches import empty_micro_batch, micro_batches


@dataclass(frozen=True)
class StepResult:
    """What one update came to, over all workers."""

    loss: float
    """Mean over the targets, in nats; NaN if none was finite."""

    left_out: int
    """Targets in micro-batches whose loss was NaN or infinite."""

    look: bool = False
    """Rank 0 asks all ranks to look for a preemption notice."""

    stop: bool = False
    """Rank 0 asks all ranks to end the run."""


def train_step(
    engine: Any,
    batch: GlobalBatch,
    bounds: list[tuple[int, int]],
    rate: float,
    alphabet: Any,
    workers: int,
    *,
    look: bool = False,
    stop: bool = False,
) -> StepResult:
    """One update on a global batch.

    The loss of a micro-batch is a sum, scaled so that the whole step is the mean over the targets
    of the global batch, whatever the number of workers: DeepSpeed divides gradients by workers and
    by accumulation, which the factor takes back. A micro-batch whose loss is not finite gives way
    to an empty one: every worker goes on with equally many passes, and the update leaves it out.

    What rank 0 asks of the others, `look` and `stop`, travels with the loss.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    targets = max(batch.num_targets, 1)
    factor = workers * len(bounds) / targets
    total = torch.zeros(4, dtype=torch.float64, device=engine.device)
    for micro in micro_batches(batch.rows, bounds, alphabet, engine.device):
        losses = engine(micro.packed, micro.targets_T)
        loss = losses.sum()
        if not torch.isfinite(loss):
            total[1] += len(losses)
            nothing = empty_micro_batch(alphabet, engine.device)
            loss = engine(nothing.packed, nothing.targets_T).sum()
        else:
            total[0] += loss.detach()
        engine.backward(loss * factor)
        engine.step()
    total[2], total[3] = float(look), float(stop)
    dist.all_reduce(total)
    nats, left_out, look_sum, stop_sum = total.tolist()
    kept = targets - left_out
    loss = nats / kept if kept > 0 else math.nan
    return StepResult(loss, int(left_out), look_sum > 0, stop_sum > 0)
