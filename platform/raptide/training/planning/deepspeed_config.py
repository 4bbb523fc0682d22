"""A recipe as DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

from raptide.errors import ConfigError
from raptide.training.planning.estimate import bucket_elements, overlaps
from raptide.training.planning.optimizer import OptimizerSettings
from raptide.training.planning.recipe import Recipe


def deepspeed_config(
    recipe: Recipe, *, workers: int, device: str, load_universal: bool = False
) -> dict[str, Any]:
    """The configuration of one engine.

    Args:
        device: "cpu" or "cuda".
        load_universal: the engine will load a checkpoint converted to the universal format.
    """
    training, optimizer = recipe.training, recipe.optimizer
    accumulation = recipe.accumulation(workers)
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        "reduce_bucket_size": bucket_elements(recipe),
        "overlap_comm": overlaps(training, device),
    }
    if training.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = bucket_elements(recipe)
        zero["stage3_param_persistence_threshold"] = training.zero3_keep_whole_below
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    if training.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": device == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_rows,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": training.micro_batch_rows * accumulation * workers,
        "zero_optimization": zero,
        **_optimizer(optimizer),
        "gradient_clipping": optimizer.clip_norm,
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {"enabled": training.precision == "fp16"},
        "checkpoint": {"load_universal": load_universal},
        "steps_per_print": 2**31,
        # It would wait for the GPU twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }


def _optimizer(settings: OptimizerSettings) -> dict[str, Any]:
    """DeepSpeed's own AdamW, or leave to bring another optimizer (training/muon.py)."""
    if settings.matrices == "muon":
        return {"zero_allow_untested_optimizer": True}
    return {
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": settings.lr,
                "betas": [settings.beta1, settings.beta2],
                "eps": settings.eps,
                "weight_decay": settings.weight_decay,
                "torch_adam": True,  # DeepSpeed's own wants nvcc, or g++, on every node
                **({"fused": True} if settings.fused else {}),
            },
        }
    }


def check_deepspeed(recipe: Recipe, device: str) -> None:
    """Let DeepSpeed check the configuration it will get.

    Raises:
        ConfigError: it takes offence at something.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(deepspeed_config(recipe, workers=1, device=device))
    except (AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"DeepSpeed does not take the recipe's training settings ({reason}); change them."
        ) from None
