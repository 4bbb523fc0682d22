"""DeepSpeed engines: build one, load a checkpoint into it at any size."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raptide.model.config import ModelSettings
from raptide.model.families import AnyModel, make_model
from raptide.model.formats.detect import read_weights
from raptide.model.transformer import rotary_frequencies
from raptide.patience import patiently
from raptide.training.checkpoints.checkpoint import ZERO, ZERO_TAG, SavedCheckpoint, find_bundle
from raptide.training.checkpoints.scratch import made_once
from raptide.training.muon import MuonWithAdamW
from raptide.training.parts import fresh_values, make_in_parts
from raptide.training.planning.deepspeed_config import deepspeed_config
from raptide.training.planning.estimate import DTYPES
from raptide.training.planning.recipe import Recipe

HYPERPARAMETERS = ("betas", "eps", "weight_decay", "momentum", "of_rate")
"""Settings in a parameter group of AdamW's or Muon's; the rate is set in every step."""


def build_engine(recipe: Recipe, workers: int, device: str, saved: SavedCheckpoint | None) -> Any:
    """A DeepSpeed engine around a fresh model; torch.distributed must be up already."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Of use to inference on CPUs alone, and half a minute of compiling on every new machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Else a model that is made in parts takes this for the only rank there is.
    deepspeed.init_distributed(dist_init_required=False)
    config = deepspeed_config(
        recipe,
        workers=workers,
        device=device,
        load_universal=saved is not None and needs_conversion(saved, workers),
    )
    model = build_model(recipe, device, saved, config)
    model.checkpoint_activations = recipe.training.checkpoint_activations
    if recipe.training.compile:
        model.compile_layers()
    muon = MuonWithAdamW(model, recipe.optimizer) if recipe.optimizer.matrices == "muon" else None
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=muon,
        model_parameters=model.parameters(),
        config=config,
        dist_init_required=False,
    )
    if muon is not None:
        muon.follow(engine)
    return engine


def build_model(
    recipe: Recipe, device: str, saved: SavedCheckpoint | None, config: dict[str, Any]
) -> AnyModel:
    """The model, with the weights it starts from unless a checkpoint will bring others.

    Only a start without a checkpoint reads `init_from`, and only rank 0. At stage 3 a transformer
    is never whole on any rank but, with `init_from`, on rank 0.

    Args:
        config: DeepSpeed's.
    """
    shape, start = recipe.model, None
    begins = saved is None and recipe.init_from is not None
    if begins and dist.get_rank() == 0:
        assert recipe.init_from is not None
        start = read_weights(find_bundle(Path(recipe.init_from)))
    if recipe.training.zero_stage == 3 and isinstance(shape, ModelSettings):
        values = fresh_values(recipe.training.seed)
        if start is not None:
            values = partial(_value_of, start.state)
        model: AnyModel = make_in_parts(shape, values, DTYPES[recipe.training.precision], config)
    else:
        model = make_model(shape).initialise(recipe.training.seed)
        if start is not None:
            model.load_state_dict({name: each.float() for name, each in start.state.items()})
        if begins:
            _send(model.state_dict().values(), device)
    if isinstance(shape, ModelSettings) and shape.rotary:
        if saved is not None:  # DeepSpeed's files do not hold them
            model.inv_freq = saved.frequencies().to(device)
        else:
            base = recipe.training.rotary_base
            frequencies = rotary_frequencies(shape.head_width, base)
            if start is not None:
                frequencies = start.frequencies().clone()
            if begins:
                _send([frequencies], device)
            model.inv_freq = frequencies.to(device)  # DeepSpeed moves no model that is in parts
    return model


def _value_of(state: Mapping[str, torch.Tensor], name: str, _: torch.Tensor) -> torch.Tensor:
    return state[name]


def _send(tensors: Iterable[torch.Tensor], device: str) -> None:
    """Rank 0's values to all ranks."""
    for tensor in tensors:
        there = tensor.to(device)  # NCCL sends only between GPUs
        dist.broadcast(there, 0)
        tensor.copy_(there)


def needs_conversion(saved: SavedCheckpoint, workers: int) -> bool:
    """Whether the checkpoint's shards belong to another number of workers (stage 0 has none)."""
    stage = saved.manifest["recipe"]["training"]["zero_stage"]
    return stage > 0 and saved.manifest["workers"] != workers


def load_state(engine: Any, saved: SavedCheckpoint, workers: int) -> None:
    """Load weights and optimizer state, converted first if the number of workers has changed."""
    if needs_conversion(saved, workers):
        converted = made_once(
            *(saved.manifest["wandb_run_id"], "universal", saved.key),
            lambda target: _convert(saved, target),
        )
        folder, tag = converted.parent, converted.name
    else:
        folder, tag = saved.shards(dist.get_rank()) / ZERO, ZERO_TAG
    with _keeping_settings(engine.optimizer), _reading_patiently(engine.checkpoint_engine):
        path, _ = engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
    assert path is not None, f"DeepSpeed found nothing in {folder}"
    dist.barrier()


@contextmanager
def _keeping_settings(optimizer: Any) -> Iterator[None]:
    """Within the block, whatever is loaded, an optimizer keeps what its recipe says.

    Its state brings along the settings of the run before: Adam's at every stage, the clipping norm
    where an optimizer of DeepSpeed's clips.
    """
    groups = optimizer.param_groups
    settings = [
        {name: group[name] for name in HYPERPARAMETERS if name in group} for group in groups
    ]
    clip_norm = getattr(optimizer, "clip_grad", None)
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    if clip_norm is not None:
        optimizer.clip_grad = clip_norm


@contextmanager
def _reading_patiently(files: Any) -> Iterator[None]:
    """Within the block each of DeepSpeed's files is read again where its file system stumbles.

    Args:
        files: DeepSpeed's checkpoint engine.
    """
    load = files.load
    files.load = lambda *args, **kwargs: patiently(partial(load, *args, **kwargs))
    try:
        yield
    finally:
        del files.load


def _convert(saved: SavedCheckpoint, target: Path) -> None:
    """All ranks' shards in DeepSpeed's universal format; copies of them are removed again."""
    stage = saved.manifest["recipe"]["training"]["zero_stage"]
    with saved.here(f"{ZERO}/", target.parent) as source:
        command = [
            *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"),
            *("--input_folder", str(source / ZERO / ZERO_TAG), "--output_folder", str(target)),
            *(["--inject_missing_state"] if stage < 3 else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"DeepSpeed could not convert {saved.name}: {done.stderr}")
