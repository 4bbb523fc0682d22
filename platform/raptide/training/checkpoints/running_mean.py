"""The mean of a run's weights over its last checkpoints, which its bundles hold in their place.

After the checkpoint of number n, with weights w and N the recipe's `average_over`:

    mean = mean + (w - mean) / min(n, N)

So the first N have equal parts, and later on each new one has one part in N. All that is needed to
go on is a bundle: what a run was killed after is what it comes back to, at any number of workers.
A checkpoint whose bundle could not be written has no part in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raptide.kept import link_or_copy
from raptide.model.families import count_parameters
from raptide.model.formats.bundle import LINEAGE
from raptide.model.formats.detect import read_weights
from raptide.patience import patiently, reason_of, trouble
from raptide.training.checkpoints.checkpoint import MODEL, SavedCheckpoint, holds
from raptide.training.planning.recipe import Recipe

AVERAGED = "averaged_checkpoints"
"""How many have gone into a bundle's mean, by its lineage; those that were written and could not be
sent are among them."""


class RunningMean:
    """Rank 0 keeps the last one in its scratch; on other ranks there is none, and nowhere where the
    recipe asks for none."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        """
        Args:
            folder: of the scratch, for it alone.
        """
        self._recipe, self._folder = recipe, folder
        self._over = recipe.checkpoint.average_over or 0
        self._count = self._next = 0
        self._state: Mapping[str, torch.Tensor] = {}

    def take_up(self, saved: SavedCheckpoint | None) -> None:
        """Go on from a checkpoint's bundle if it holds a mean; rank 0 calls it.

        Also where the recipe asks for none any more: the checkpoint may be the run's last one, and
        still to be evaluated.

        Raises:
            RaptideError: it cannot be copied to the scratch, or the storage does not give it out.
        """
        described, room = f"{MODEL}/{LINEAGE}", self._folder.parent
        if saved is None or not holds(saved.manifest, described):
            return
        with saved.here(described, room) as copy:
            if AVERAGED not in json.loads(patiently((copy / described).read_text)):
                return
        try:
            with saved.here(f"{MODEL}/", room) as copy:
                self._hold(copy / MODEL)
        except OSError as error:
            sentence = (
                f"The mean of the weights in {saved.name} cannot be copied to {room} "
                f"({reason_of(error)}); see to that, and resume."
            )
            raise trouble(error, sentence) from None

    @property
    def bytes_to_come(self) -> int:
        """What the scratch will hold for it and does not yet."""
        needs_room = self._over and not self._count
        return 4 * count_parameters(self._recipe.model) if needs_room else 0

    def begin(self, step: int) -> None:
        """What `mixed` is asked next are the weights of the checkpoint of this step.

        Those that come out of turn, since a node goes away say, hold the mean as it was; else it
        would depend on such things.
        """
        if not self._over:  # any more
            self._count = 0
        recipe = self._recipe
        in_turn = step % recipe.checkpoint.every_steps == 0 or step == recipe.training.steps
        self._next = self._count + bool(self._over and in_turn)

    def mixed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The mean, with the part that the weights of this checkpoint have in it; fp32."""
        if self._count == 0:
            return tensor
        part = (self._next - self._count) / min(self._next, self._over)
        return torch.lerp(self._state[name], tensor, part)

    def facts(self) -> dict[str, Any]:
        """What the lineage of its bundle says besides."""
        return {AVERAGED: self._next} if self._next else {}

    def keep(self, bundle: Path) -> None:
        """Go on from this bundle, which has been written whole."""
        if self._next > self._count:
            self._hold(bundle)

    def _hold(self, bundle: Path) -> None:
        """Under names of its own: a checkpoint's folder is removed once it has been sent."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(exist_ok=True)
        for file in bundle.iterdir():
            link_or_copy(file, self._folder / file.name)
        weights = read_weights(self._folder)
        self._state, self._count = weights.state, weights.lineage[AVERAGED]

    def put_into(self, engine: Any) -> None:
        """Let an engine that trains no more have the mean as its weights; every rank calls it."""
        from deepspeed.runtime.zero import GatheredParameters

        there = torch.tensor(self._count, device=engine.device)
        dist.broadcast(there, 0)
        if not there:
            return
        in_parts = self._recipe.training.zero_stage == 3
        for name, parameter in engine.module.named_parameters():
            with GatheredParameters([parameter], modifier_rank=0, enabled=in_parts):
                if dist.get_rank() == 0:
                    parameter.data.copy_(self._state[name])
                if not in_parts:
                    dist.broadcast(parameter.data, 0)
