"""What a Stepper asks of DeepSpeed, by torch alone: fp32 master weights, clipping, fused AdamW."""

from __future__ import annotations

from typing import Any

import torch

from raptide.model.transformer import Esm


class BareEngine:
    """A model in half precision on one device, its optimizer in fp32."""

    def __init__(self, model: Esm, device: torch.device, accumulation: int = 1) -> None:
        self.module, self.device = model, device
        self._parameters = list(model.parameters())
        self._master = [p.detach().float().clone() for p in self._parameters]
        self.optimizer = torch.optim.AdamW(self._master, lr=1e-4, fused=True)
        self._accumulation, self._passes = accumulation, 0

    def __call__(self, *inputs: Any) -> torch.Tensor:
        return self.module(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._accumulation).backward()

    def step(self) -> None:
        self._passes += 1
        if self._passes % self._accumulation:
            return
        for master, parameter in zip(self._master, self._parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(self._master, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.module.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._master)
