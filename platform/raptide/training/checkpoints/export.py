"""Weights from anything that holds a model: a run, a checkpoint, a bundle, a fair-esm file."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch

from raptide.config import parse_settings
from raptide.model.formats.detect import read_weights
from raptide.model.formats.weights import Weights
from raptide.training.checkpoints.checkpoint import (
    MODEL,
    ZERO,
    ZERO_TAG,
    find_bundle,
    verify_folder,
)
from raptide.training.checkpoints.owned import MANIFEST
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


def read_zero_weights(checkpoint: Path) -> Weights:
    """Full fp32 weights out of DeepSpeed's shards, of any ZeRO stage and number of workers.

    The shards are pickles: only for checkpoints from your own storage.

    Raises:
        CheckpointError: a shard is missing or damaged.
    """
    manifest = verify_folder(checkpoint, only=f"{ZERO}/")
    recipe = parse_settings(Recipe, manifest["recipe"], source=str(checkpoint / MANIFEST))
    state = _merge_shards(checkpoint / ZERO)
    left_out = ("cursor", "files", "inv_freq")
    lineage = {name: value for name, value in manifest.items() if name not in left_out}
    kept = manifest.get("inv_freq")
    inv_freq = None if kept is None else torch.tensor(kept, dtype=torch.float32)
    return Weights(recipe.model, state, inv_freq, lineage=lineage)


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
