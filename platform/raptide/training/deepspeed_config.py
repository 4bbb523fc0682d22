"""A recipe as DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

from raptide.training.recipe import Recipe


def deepspeed_config(
    recipe: Recipe, *, workers: int, device: str, load_universal: bool = False
) -> dict[str, Any]:
    """The configuration of one engine.

    Args:
        device: "cpu" or "cuda"; the fused Adam exists only on the latter.
        load_universal: the engine will load a checkpoint converted to the universal format.
    """
    training, optimizer = recipe.training, recipe.optimizer
    accumulation = recipe.accumulation(workers)
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.zero_stage == 3:
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
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": [optimizer.beta1, optimizer.beta2],
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": device == "cpu",
            },
        },
        "gradient_clipping": optimizer.clip_norm,
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {"enabled": training.precision == "fp16"},
        "checkpoint": {"load_universal": load_universal},
        "steps_per_print": 2**31,
    }
