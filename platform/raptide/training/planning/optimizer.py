"""What moves the weights, and by how much in which step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raptide.config import Settings

LINEAR_UNTIL, LINEAR_END = 0.9, 0.1
"""Share of the steps, and of the rate, at which linear decay ends (Lin et al., Science 2023)."""


class OptimizerSettings(Settings):
    """AdamW (Adam where `weight_decay` is 0) or Muon, with warm-up and decay."""

    lr: float = Field(1e-4, gt=0.0)
    """Learning rate at the end of the warm-up."""

    matrices: Literal["adamw", "muon"] = "adamw"
    """What moves the matrices inside the layers; everything else is always AdamW's. Muon takes
    orthogonal steps, at ZeRO 0 in fp32 and at ZeRO 1 and 2."""

    muon_lr: float | None = Field(None, gt=0.0)
    """Muon's own learning rate, which rises and falls as `lr` does; None takes `lr`, since steps of
    both are of one size."""

    muon_momentum: float = Field(0.95, ge=0.0, lt=1.0)

    warmup_steps: int = Field(16_000, ge=1)

    decay: Literal["inverse_sqrt", "linear", "stable"] = "inverse_sqrt"
    """After the warm-up: with 1/sqrt(step) as ESM-1; in a line to a tenth at 90% of the steps and
    level from there as ESM-2; or level until the cool-down, so that a run can be made longer from
    where it was level last (`continue_from`)."""

    cooldown: float = Field(0.2, ge=0.0, le=1.0)
    """Share of the steps, the last ones, in which a `stable` rate falls in a line to 0 (Hägele et
    al., NeurIPS 2024)."""

    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.999, ge=0.0, lt=1.0)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.0, ge=0.0)

    fused: bool = True
    """Update all weights in one kernel of torch's."""

    clip_norm: float = Field(1.0, ge=0.0)
    """Largest norm of the whole gradient, before Muon makes steps of it; 0 never clips."""

    @property
    def muon_rate(self) -> float:
        """Muon's learning rate at the end of the warm-up."""
        return self.lr if self.muon_lr is None else self.muon_lr


def cooldown_begin(settings: OptimizerSettings, steps: int) -> int:
    """The last step with the whole rate, of a run of so many steps with a `stable` one."""
    return max(settings.warmup_steps, round(steps * (1 - settings.cooldown)))


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Rate of the update that ends `step` (from 1) of `steps`: linear warm-up, then the decay."""
    warmup = settings.warmup_steps
    if step <= warmup:
        return settings.lr * step / warmup
    if settings.decay == "inverse_sqrt":
        return settings.lr * (warmup / step) ** 0.5
    if settings.decay == "stable":
        level = cooldown_begin(settings, steps)
        return settings.lr * min(1.0, (steps + 1 - step) / (steps + 1 - level))
    done = (step - warmup) / max(LINEAR_UNTIL * steps - warmup, 1)
    return settings.lr * (1 - (1 - LINEAR_END) * min(done, 1.0))
