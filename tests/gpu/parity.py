"""Do GPU and CPU give the same numbers: forward, gradients, alone and in a batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from bench_tools import Bench, model_on, say, say_bound

from raptide.model.config import ModelSettings
from raptide.model.packed import Packed, Targets
from raptide.model.transformer import Esm

SHAPES = {
    "esm1": {"layers": 4, "width": 768, "heads": 12},
    "esm1b": {"layers": 4, "width": 640, "heads": 20},
    "esm2": {"layers": 4, "width": 480, "heads": 20},
}
"""Heads of 64, 32 and 24 values."""

RESIDUES = (1, 1022, 2, 7, 333, 64, 129)

FP32_ERROR = 1e-4
"""Of the norm of what the CPU gives; GPUs without TF32 add up in another order, no more."""

BF16_FACTOR, BF16_ERROR = 2.0, 2e-3
"""A GPU in bf16 may be this much further from the CPU's fp32 than the CPU in bf16 is."""

CPU = torch.device("cpu")

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

Answer = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model and sequences, and what the CPU makes of them."""

    family: str
    model: Esm
    pieces: list[torch.Tensor]
    exact: Answer
    rounded: Answer
    """In bf16."""


def main(device: str, limit_s: float) -> None:
    bench = Bench(device, limit_s)
    torch.backends.cuda.matmul.allow_tf32 = False
    cases = [prepare(bench, family) for family in SHAPES]
    for case in cases:
        for dtype in (torch.float32, torch.bfloat16):
            compare(bench, case, dtype)
            compare_alone(bench, case, dtype)
    for case in cases:
        if bench.late:
            say(f"{case.family} bf16, compiled", "no time left")
        else:
            compare(bench, case, torch.bfloat16, compiled=True)


def prepare(bench: Bench, family: str) -> Case:
    shape = SHAPES[family]
    settings = ModelSettings(family=family, **(shape if bench.real else _tiny(shape)))
    model = model_on(settings, CPU, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # far from uniform, so that differences show
    lengths = RESIDUES if bench.real else tuple(min(n, 40) for n in RESIDUES)
    drawn = [np.random.default_rng(n).integers(4, 24, n).astype(np.uint8) for n in lengths]
    pieces = [torch.from_numpy(settings.alphabet.add_specials(each)).long() for each in drawn]
    exact = answer(model, pieces, CPU, torch.float32)
    return Case(family, model, pieces, exact, answer(model, pieces, CPU, torch.bfloat16))


def _tiny(shape: dict[str, int]) -> dict[str, int]:
    return {"layers": 1, "width": 32, "heads": 2 if shape["heads"] == 12 else 4}


def compare(bench: Bench, case: Case, dtype: torch.dtype, *, compiled: bool = False) -> None:
    found = answer(case.model, case.pieces, bench.device, dtype, compiled=compiled)
    for what in ("logits", "loss", "gradients"):
        bound = FP32_ERROR
        if dtype != torch.float32:
            bound = BF16_FACTOR * error(case.rounded, case.exact, what) + BF16_ERROR
        label = f"{case.family} {NAMES[dtype]}{', compiled' * compiled}"
        say_bound(label, what, error(found, case.exact, what), bound)


def compare_alone(bench: Bench, case: Case, dtype: torch.dtype) -> None:
    """A sequence's numbers must not depend on its batch mates."""
    model, pieces = on_device(case.model, bench.device, dtype), case.pieces
    with torch.inference_mode():
        together = model(pack(pieces, bench.device)).float().split([len(p) for p in pieces])
        worst = max(
            relative(model(pack([piece], bench.device)).float(), logits)
            for piece, logits in zip(pieces, together, strict=True)
        )
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    say_bound(f"{case.family} {NAMES[dtype]}", "alone against in a batch", worst, bound)


def on_device(model: Esm, device: torch.device, dtype: torch.dtype) -> Esm:
    return copy.deepcopy(model).to(device, dtype)


def pack(pieces: list[torch.Tensor], device: torch.device) -> Packed:
    return Packed(torch.cat(pieces), tuple(map(len, pieces))).to(device)


def answer(
    model: Esm,
    pieces: list[torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool = False,
) -> Answer:
    """Logits, losses and all gradients, on the CPU in fp32."""
    there, packed = on_device(model, device, dtype), pack(pieces, device)
    if compiled:
        there.compile_layers()
    at = torch.arange(len(packed.tokens_T))[::5]
    targets = Targets(at, torch.cat(pieces)[at]).to(device)
    losses = there(packed, targets)
    losses.mean().backward()
    with torch.no_grad():
        logits = there(packed)
    gradients = torch.cat([p.grad.float().flatten().cpu() for p in there.parameters()])
    return {
        "logits": logits.float().cpu(),
        "loss": losses.detach().float().cpu(),
        "gradients": gradients,
    }


def error(found: Answer, exact: Answer, what: str) -> float:
    return relative(found[what], exact[what])


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found - exact).norm() / exact.norm())
