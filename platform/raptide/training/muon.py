"""Muon: matrices move in orthogonal steps, everything else by AdamW.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; steps are as large
as AdamW's, by Liu et al., arXiv 2502.16982, so that both take rates of one size.

The momentum is kept where AdamW keeps its first moment, and in the same form. So DeepSpeed cuts it
up, saves it and converts it to other numbers of workers as it does for AdamW; and since only the
step itself is orthogonal, what DeepSpeed measures, clips and leaves out are gradients, as ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from raptide.model.device import multiplies_bf16_faster
from raptide.model.families import is_matrix
from raptide.training.planning.optimizer import OptimizerSettings

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
"""Of the Newton-Schulz iteration (Jordan et al.): all singular values end up near 1."""

RMS = 0.2
"""Root mean square of a step's elements at rate 1, about AdamW's (Liu et al.)."""

MOMENTUM, UNUSED = "exp_avg", "exp_avg_sq"
"""AdamW's names, by which DeepSpeed converts states; the second is not kept."""


def muon_step(direction: torch.Tensor, *, in_bf16: bool) -> torch.Tensor:
    """The orthogonal step in a direction, for rate 1.

    Args:
        direction: [rows, columns] bfloat16.
        in_bf16: compute in it, rather than in fp32.

    Returns [rows, columns] bfloat16 with singular values of RMS · sqrt(max(rows, columns)), within
    a third or so.
    """
    near = _near_orthogonal(direction if in_bf16 else direction.float())
    return near.to(direction.dtype) * (RMS * math.sqrt(max(direction.shape)))


def _near_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The same singular vectors, with values near 1, in the precision of the matrix.

    The polynomial a s + b s^3 + c s^5 of the singular values, again and again (Jordan et al.).
    """
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)  # so that no singular value is above 1
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


@dataclass(frozen=True)
class Partitions:
    """How ZeRO 1 and 2 lay matrices one after the other, and cut that into a part for each rank."""

    shapes: tuple[torch.Size, ...]
    rank: int
    group: Any
    """torch.distributed's, of the ranks that have a part each."""

    def of_rank(self, size: int) -> dict[int, tuple[slice, torch.Size, slice, slice]]:
        """Matrices with elements in this rank's part, by their place in `shapes`.

        Args:
            size: elements of a part.

        Returns for each where it lies in the whole, its shape, where in the part those of its
        elements lie that are the rank's, and which they are.
        """
        found, mine, start = {}, self.rank * size, 0
        for index, shape in enumerate(self.shapes):
            end = start + shape.numel()
            first, last = max(start, mine), min(end, mine + size)
            if first < last:
                here, which = slice(first - mine, last - mine), slice(first - start, last - start)
                found[index] = slice(start, end), shape, here, which
            start = end
        return found


class MuonWithAdamW(torch.optim.Optimizer):
    """Two groups of parameters, each with a rate of its own.

    DeepSpeed uses it as it uses torch's AdamW: with parameters as they are, or with one flat part
    of each group in their place.

    Gradients that are no numbers have become zeros (step.py). Then no matrix moves, though the
    momentum would, and by a whole step.
    """

    def __init__(self, model: torch.nn.Module, settings: OptimizerSettings) -> None:
        named = list(model.named_parameters())
        matrices = [each for name, each in named if is_matrix(name, each)]
        others = [each for name, each in named if not is_matrix(name, each)]
        self._shapes = tuple(each.shape for each in matrices)
        self._partitions: Partitions | None = None
        self._in_bf16 = False
        self._adamw = torch.optim.AdamW(
            others,
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=settings.fused,
        )
        muon = {
            "params": matrices,
            "lr": settings.muon_rate,
            "momentum": settings.muon_momentum,
            "weight_decay": settings.weight_decay,
            "of_rate": settings.muon_rate / settings.lr,
        }
        super().__init__([muon, *self._adamw.param_groups], {})
        self.register_state_dict_post_hook(_with_unused)

    def follow(self, engine: Any) -> None:
        """Find the matrices in what an engine has made of them, and agree with the other ranks.

        Where each makes its own steps, those of machines that differ would drift apart.
        """
        names = {id(each): name for name, each in engine.module.named_parameters()}
        zero = engine.optimizer
        if zero is self:
            groups = [group["params"] for group in self.param_groups]
        else:
            groups = zero.round_robin_bit16_groups
            assert not any(zero.round_robin_bit16_padding[0]), "gaps between matrices"
            group = zero.real_dp_process_group[0]
            self._partitions = Partitions(self._shapes, dist.get_rank(group), group)
        assert tuple(each.shape for each in groups[0]) == self._shapes, "matrices in another order"
        for kind, members in zip((True, False), groups, strict=True):
            for each in members:
                name = names[id(each)]
                assert is_matrix(name, each) == kind, f"{name} is in the other group"
        faster = torch.tensor(int(multiplies_bf16_faster(engine.device)), device=engine.device)
        dist.all_reduce(faster, dist.ReduceOp.MIN)
        self._in_bf16 = bool(faster)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update with the gradients there are; DeepSpeed may ask for one group at a time."""
        others = [group for group in self.param_groups if "momentum" not in group]
        for group in self.param_groups:
            if "momentum" not in group:
                continue
            if self._partitions is None:
                self._move_matrices(group)
            else:
                self._move_part(group, self._partitions)
        self._adamw.param_groups, self._adamw.state = others, self.state
        self._adamw.step()

    def _move_matrices(self, group: dict[str, Any]) -> None:
        for weights in group["params"]:
            if weights.grad is None:  # as AdamW leaves out what no loss depends on
                continue
            used = weights.grad.any().to(weights.dtype)
            step = muon_step(self._direction(weights, group), in_bf16=self._in_bf16)
            _move(weights, step * used, group)

    def _move_part(self, group: dict[str, Any], partitions: Partitions) -> None:
        """Every rank sees all directions, and works on the matrices that it holds something of."""
        (part,) = group["params"]
        used = self._used(part.grad, partitions)
        direction = self._direction(part, group)
        whole = direction.new_empty(len(part) * dist.get_world_size(partitions.group))
        dist.all_gather_into_tensor(whole, direction, group=partitions.group)
        for index, (lies, shape, here, which) in partitions.of_rank(len(part)).items():
            step = muon_step(whole[lies].view(shape), in_bf16=self._in_bf16) * used[index]
            _move(part[here], step.flatten()[which], group)

    def _used(self, gradient: torch.Tensor, partitions: Partitions) -> torch.Tensor:
        """Which matrices any rank has a gradient of, [matrices] bfloat16."""
        used = torch.zeros(len(self._shapes), device=gradient.device)
        for index, (_, _, here, _) in partitions.of_rank(len(gradient)).items():
            used[index] = gradient[here].any()
        dist.all_reduce(used, dist.ReduceOp.MAX, group=partitions.group)
        return used.bfloat16()

    def _direction(self, weights: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Nesterov's: the momentum as it would be if the gradient came again; bfloat16."""
        gradient, state = weights.grad, self.state[weights]
        assert gradient is not None
        state.pop(UNUSED, None)  # a conversion brings it along
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(weights)
        state[MOMENTUM].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(state[MOMENTUM], group["momentum"]).bfloat16()


def _move(weights: torch.Tensor, step: torch.Tensor, group: dict[str, Any]) -> None:
    weights.mul_(1 - group["lr"] * group["weight_decay"])
    weights.add_(step, alpha=-group["lr"])


def _with_unused(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """DeepSpeed's conversion asks all for both moments: zeros, of one element on disk."""
    kept = state["state"]
    for index, each in kept.items():
        if MOMENTUM in each and UNUSED not in each:
            momentum = each[MOMENTUM]
            kept[index] = each | {UNUSED: momentum.new_zeros(()).expand(momentum.shape)}
