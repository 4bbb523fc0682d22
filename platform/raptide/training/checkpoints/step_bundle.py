"""The bundle of a step: its weights are taken while training waits, all else goes on behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from raptide.model.check import write_check
from raptide.model.formats.bundle import BundleWriter, column
from raptide.model.formats.detect import read_weights
from raptide.model.formats.tensor_files import SHARD_BYTES
from raptide.model.formats.weights import Weights, name_beside
from raptide.training.checkpoints.running_mean import RunningMean
from raptide.training.planning.recipe import Recipe, TrainingSettings


class StepBundle:
    """Rank 0 holds a shard of the weights at most, on its way to the scratch."""

    def __init__(self, recipe: Recipe, manifest: dict[str, Any], mean: RunningMean) -> None:
        """
        Args:
            manifest: of the checkpoint, without `files`.
            mean: what the bundle is to hold, if the recipe says so, in place of the weights.
        """
        self._weights = weights_of(recipe, manifest)
        self._training, self._mean = recipe.training, mean
        self._problem: OSError | SafetensorError | None = None

    def gather(self, engine: Any, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Take the weights as they are; every rank calls it.

        What the file system refuses is told by `finish`, since the ranks wait for each other here.
        """
        self._folder, self._writer = folder, None
        if dist.get_rank() == 0:
            self._writer = self._try(BundleWriter, folder, self._weights.settings, shard_bytes)
        self._mean.begin(self._weights.lineage["step"])
        for name, tensor in full_tensors(engine, self._training):
            if self._writer is not None and self._problem is None:
                self._try(self._add, self._writer, name, tensor)

    def finish(self) -> None:
        """Write the rest, while training goes on; rank 0 calls it.

        Raises:
            OSError, SafetensorError: the file system refused.
            BundleError: the model answers a known sequence with something that is no number.
        """
        if self._problem is not None:
            raise self._problem
        assert self._writer is not None, "gathered on another rank"
        for item in name_beside(self._weights, column(self._weights.settings)).items():
            self._writer.add(*item)
        self._writer.close({**self._weights.lineage, **self._mean.facts()})
        write_check(self._folder, read_weights(self._folder).build())
        self._mean.keep(self._folder)

    def _add(self, writer: BundleWriter, name: str, tensor: torch.Tensor) -> None:
        writer.add(writer.names[name], self._mean.mixed(name, tensor))

    def _try(self, act: Any, *args: Any) -> Any:
        try:
            return act(*args)
        except (OSError, SafetensorError) as error:
            self._problem = error
            return None


def weights_of(
    recipe: Recipe, manifest: dict[str, Any], state: dict[str, torch.Tensor] | None = None
) -> Weights:
    """A checkpoint's weights, with what its manifest says of them."""
    left_out = ("cursor", "files", "inv_freq")
    lineage = {name: value for name, value in manifest.items() if name not in left_out}
    kept = manifest.get("inv_freq")
    inv_freq = None if kept is None else torch.tensor(kept, dtype=torch.float32)
    return Weights(recipe.model, state or {}, inv_freq, lineage=lineage)


def full_tensors(
    engine: Any, training: TrainingSettings
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """All weights by name in fp32 on the CPU, one after the other, in memory of their own.

    Every rank goes through them to the end; rank 0 gets them, the others None. Under bf16 and fp16
    these are the optimizer's master weights, so a bundle loses nothing (but for fp16 at stage 0,
    where DeepSpeed gives the rounded ones).
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter], enabled=training.zero_stage == 3):
            full, found = None, None
            if training.precision != "fp32":
                full = safe_get_full_fp32_param(parameter)
            if dist.get_rank() == 0:
                tensor = parameter if full is None else full
                found = tensor.detach().float().cpu().clone(memory_format=torch.contiguous_format)
        yield name, found
