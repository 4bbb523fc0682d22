"""What one step is measured by; docs/training.md explains each name."""

from __future__ import annotations

import math
import resource

import torch

from raptide.data.streaming.batch import GlobalBatch
from raptide.training.planning.estimate import step_flops
from raptide.training.planning.recipe import Recipe
from raptide.training.step import StepResult


def loss_metrics(result: StepResult, rate: float) -> dict[str, float]:
    """What the step came to; a norm that is no number is no metric."""
    metrics = {
        "train/loss": result.loss,
        "train/ece": math.exp(min(result.loss, 50.0)),
        "train/lr": rate,
        "train/nonfinite_targets": result.left_out,
    }
    return metrics if result.skipped else metrics | {"train/grad_norm": result.grad_norm}


def speed_metrics(
    recipe: Recipe, batch: GlobalBatch, seconds: float, wait_s: float, workers: int
) -> dict[str, float]:
    """How fast it went; MFU comes on top where the device's peak is known.

    Args:
        seconds: from the end of the step before, the wait for the batch included.
        wait_s: seconds of these without a batch.
    """
    tokens, places = batch.num_tokens, batch.rows.tokens.size
    flops = step_flops(recipe.model, batch) / seconds / workers
    return {
        "speed/step_s": seconds,
        "speed/tokens_per_s": tokens / seconds,
        "speed/padded_tokens_per_s": places / seconds,
        "speed/padding_percent": 100 * (1 - tokens / places),
        "speed/data_wait_fraction": wait_s / seconds,
        "speed/model_tflops": flops / 1e12,
    }


def memory_gb(device: str) -> float:
    """Peak memory of this worker: of the GPU, or resident on a CPU."""
    if device == "cuda":  # not exercised without a GPU
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
