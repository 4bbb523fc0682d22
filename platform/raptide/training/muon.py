"""Muon: matrices move in orthogonal steps, everything else by AdamW.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; steps are as large
as AdamW's, by Liu et al., arXiv 2502.16982, so that both take rates of one size.

The momentum is kept where AdamW keeps its first moment, and in the same form. So DeepSpeed cuts it
up, saves it and converts it to other numbers of workers as it does for AdamW; and since only the
step itself is orthogonal, what DeepSpeed measures, clips and leaves out are gradients, as ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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


def muon_step(direction: torch.Tensor) -> torch.Tensor:
    """The orthogonal step in a direction, for rate 1.

    Args:
        direction: [rows, columns] bfloat16.

    Returns [rows, columns] bfloat16 with singular values of RMS · sqrt(max(rows, columns)), within
    a third or so.
    """
    quick = multiplies_bf16_faster(direction.device)
    near = _near_orthogonal(direction if quick else direction.float())
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

    def of_rank(self, size: int) -> Iterator[tuple[slice, torch.Size, slice, slice]]:
        """Matrices with elements in this rank's part.

        Args:
            size: elements of a part.

        Yields where a matrix lies in the whole, its shape, where in the part those of its elements
        lie that are the rank's, and which they are.
        """
        mine, start = self.rank * size, 0
        for shape in self.shapes:
            end = start + shape.numel()
            first, last = max(start, mine), min(end, mine + size)
            if first < last:
                here, which = slice(first - mine, last - mine), slice(first - start, last - start)
                yield slice(start, end), shape, here, which
            start = end


class MuonWithAdamW(torch.optim.Optimizer):
    """Two groups of parameters, each with a rate of its own.

    DeepSpeed uses it as it uses torch's AdamW: with parameters as they are, or with one flat part
    of each group in their place.
    """

    def __init__(self, model: torch.nn.Module, settings: OptimizerSettings) -> None:
        named = list(model.named_parameters())
        matrices = [each for name, each in named if is_matrix(name, each)]
        others = [each for name, each in named if not is_matrix(name, each)]
        self._shapes = tuple(each.shape for each in matrices)
        self._partitions: Partitions | None = None
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
        """Find the matrices in the flat parts that an engine at ZeRO 1 or 2 has made of them."""
        zero = engine.optimizer
        laid = zero.round_robin_bit16_groups[0]
        names = {id(each): name for name, each in engine.module.named_parameters()}
        assert tuple(each.shape for each in laid) == self._shapes, "matrices in another order"
        assert all(is_matrix(names[id(each)], each) for each in laid)
        assert not any(zero.round_robin_bit16_padding[0]), "gaps between matrices"
        group = zero.real_dp_process_group[0]
        self._partitions = Partitions(self._shapes, dist.get_rank(group), group)

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
            # Gradients that are no numbers have become zeros: then nothing moves, though the
            # momentum would, and by a whole step.
            used = weights.grad.any().to(weights.dtype)
            _move(weights, muon_step(self._direction(weights, group)) * used, group)

    def _move_part(self, group: dict[str, Any], partitions: Partitions) -> None:
        """Every rank sees all directions, and works on the matrices that it holds something of."""
        (part,) = group["params"]
        direction = self._direction(part, group)
        whole = direction.new_empty(len(part) * dist.get_world_size(partitions.group))
        dist.all_gather_into_tensor(whole, direction, group=partitions.group)
        for lies, shape, here, which in partitions.of_rank(len(part)):
            step = muon_step(whole[lies].view(shape))
            _move(part[here], step.flatten()[which], group)

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
