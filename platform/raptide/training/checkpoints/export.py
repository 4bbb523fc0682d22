"""Weights from anything that holds a model: a run, a checkpoint, a bundle, a fair-esm file."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raptide.config import parse_settings
from raptide.errors import CheckpointError
from raptide.model.formats.detect import read_weights
from raptide.model.formats.weights import Weights
from raptide.training.checkpoints.checkpoint import (
    MODEL,
    ZERO,
    ZERO_TAG,
    SavedCheckpoint,
    find_bundle,
    holds,
    local_checkpoint,
    open_checkpoint,
    verify_folder,
)
from raptide.training.checkpoints.owned import MANIFEST, RUN_INFO, Storage, counted_names
from raptide.training.checkpoints.running_mean import AVERAGED
from raptide.training.checkpoints.step_bundle import weights_of
from raptide.training.planning.recipe import Recipe


def read_model(path: Path) -> Weights:
    """The weights that a path stands for; of a run those of its newest complete checkpoint.

    Raises:
        BundleError: there are none.
        CheckpointError: a checkpoint without a bundle is damaged.
    """
    if (path / MANIFEST).is_file() and not (path / MODEL).exists():
        return read_zero_weights(path)
    return read_weights(find_bundle(path))


def read_average(run: Path, number: int) -> Weights:
    """The mean of a run's weights in its last checkpoints with a bundle, summed in fp64.

    Raises:
        CheckpointError: the folder is no run, keeps fewer, or keeps means already.
    """
    if not (run / RUN_INFO).is_file():
        raise CheckpointError(f"{run} is no run, whose checkpoints could be averaged; name one.")
    last = [saved for saved in _last_ones(run) if holds(saved.manifest, f"{MODEL}/")]
    if len(last) < number:
        raise CheckpointError(
            f"Of the last checkpoints that {run} keeps {len(last)} have a bundle, but {number} are "
            "to be averaged; average fewer, or train with a greater checkpoint.keep."
        )
    taken = last[:number]
    sums: dict[str, torch.Tensor] = {}
    for saved in reversed(taken):
        weights = read_weights(local_checkpoint(run, saved) / MODEL)
        if AVERAGED in weights.lineage:
            raise CheckpointError(
                f"Bundles of {run} are means of several checkpoints already "
                "(checkpoint.average_over); export one without --average."
            )
        for name, tensor in weights.state.items():
            sums[name] = sums[name] + tensor if name in sums else tensor.double()
    state = {name: (total / number).float() for name, total in sums.items()}
    lineage = {**weights.lineage, "average_of_steps": [saved.step for saved in reversed(taken)]}
    return replace(weights, state=state, lineage=lineage)


def _last_ones(run: Path) -> list[SavedCheckpoint]:
    """A run's last checkpoints, newest first, as many as it keeps: beyond them lie some of long
    ago, such as the best."""
    storage, found = Storage.of_run(run), list[SavedCheckpoint]()
    for name in reversed(counted_names(storage)):
        saved = open_checkpoint(storage, name, only=f"{MODEL}/")
        if saved is not None:
            found.append(saved)
            if len(found) == found[0].manifest["recipe"]["checkpoint"]["keep"]:
                break
    return found


def read_zero_weights(checkpoint: Path) -> Weights:
    """Full fp32 weights out of DeepSpeed's shards, of any ZeRO stage and number of workers.

    The shards are pickles: only for checkpoints from your own storage.

    Raises:
        CheckpointError: a shard is missing or damaged.
    """
    manifest = verify_folder(checkpoint, only=f"{ZERO}/")
    recipe = parse_settings(Recipe, manifest["recipe"], source=str(checkpoint / MANIFEST))
    state = _merge_shards(checkpoint / ZERO)
    return weights_of(recipe, manifest, state)


def _merge_shards(folder: Path) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if any((folder / ZERO_TAG).glob("*_optim_states.pt")):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            merged: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
                str(folder), tag=ZERO_TAG
            )
    else:  # stage 0: every worker holds everything, and one has saved it
        (file,) = (folder / ZERO_TAG).glob("mp_rank_00_model_states.pt")
        merged = torch.load(file, map_location="cpu", weights_only=False)["module"]
    return {name: tensor.float().clone() for name, tensor in merged.items()}
