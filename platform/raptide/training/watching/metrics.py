"""What one step is measured by; docs/training.md explains each name."""

from __future__ import annotations

import math
import resource

import torch

from raptide.data.streaming.shares import BatchShare
from raptide.training.planning.estimate import peak_flops, step_flops
from raptide.training.planning.optimizer import learning_rate
from raptide.training.planning.recipe import Recipe
from raptide.training.step import StepResult


class StepMetrics:
    """Measures steps of one worker; asked when a line is due, since not all of it is free."""

    def __init__(self, recipe: Recipe, device: str, workers: int) -> None:
        self._recipe, self._device, self._workers = recipe, device, workers
        self._peak_flops = peak_flops(recipe, device)

    def loss(self, step: int, result: StepResult) -> dict[str, float]:
        """What a step came to; a norm that is no number is no metric."""
        metrics = {
            "train/loss": result.loss,
            "train/ece": math.exp(min(result.loss, 50.0)),
            "train/lr": learning_rate(self._recipe.optimizer, step, self._recipe.training.steps),
            "train/nonfinite_targets": result.left_out,
        }
        return metrics if result.skipped else metrics | {"train/grad_norm": result.grad_norm}

    def speed(self, batch: BatchShare, seconds: float, wait_s: float) -> dict[str, float]:
        """How fast it went, and in how much room; MFU where the device's peak is known.

        Args:
            seconds: from the end of the step before, the wait for the batch included.
            wait_s: seconds of these without a batch.
        """
        tokens, places = batch.num_tokens, batch.num_places
        flops = step_flops(self._recipe.model, batch) / seconds / self._workers
        metrics = {
            "speed/step_s": seconds,
            "speed/tokens_per_s": tokens / seconds,
            "speed/padded_tokens_per_s": places / seconds,
            "speed/padding_percent": 100 * (1 - tokens / places),
            "speed/data_wait_fraction": wait_s / seconds,
            "speed/model_tflops": flops / 1e12,
            "system/memory_gb": memory_gb(self._device),
            "system/workers": self._workers,
        }
        return (
            metrics
            if self._peak_flops is None
            else metrics | {"speed/mfu": flops / self._peak_flops}
        )


def memory_gb(device: str) -> float:
    """Peak memory of this worker: of the GPU, or resident on a CPU."""
    if device == "cuda":  # not exercised without a GPU
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
