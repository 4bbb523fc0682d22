"""Contacts from attention: a logistic regression over the corrected maps of all heads.

    p(i touches j) = sigmoid(bias + sum over heads of weight * APC(A + A^T)[i, j])

A is a head's attention between residues, specials cut away after the softmax; APC is the average
product correction of Dunn et al., 2008. The construction is that of Rao et al., ICLR 2021, which
the authors' contact heads follow. Shape letters: see packed.py; here L residues.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ContactHead:
    """The regression's coefficients, as they are stored."""

    weight: torch.Tensor
    """[1, layers * heads], layer by layer."""

    bias: torch.Tensor
    """[1]."""

    def probabilities(self, corrected: Iterable[torch.Tensor]) -> torch.Tensor:
        """Probability that two residues touch (Cβ within 8 Å), [L, L] fp32.

        Args:
            corrected: `corrected_maps` of one sequence, layer by layer.
        """
        total: torch.Tensor | None = None
        done = 0
        for maps_HLL in corrected:
            weight_H = self.weight[0, done : done + len(maps_HLL)].to(maps_HLL)
            layer = torch.einsum("h,hij->ij", weight_H, maps_HLL)
            total = layer if total is None else total + layer
            done += len(maps_HLL)
        assert total is not None
        assert done == self.weight.numel()
        return torch.sigmoid(total + self.bias.to(total))


def corrected_maps(maps: Iterable[torch.Tensor], append_eos: bool) -> Iterator[torch.Tensor]:
    """Attention maps [H, T, T] of one sequence to symmetric, corrected ones, [H, L, L].

    Takes one layer at a time; a layer's peak is about four maps, 16 * H * L^2 bytes in fp32.
    """
    for maps_HTT in maps:
        end = maps_HTT.shape[1] - (1 if append_eos else 0)
        maps_HLL = maps_HTT[:, 1:end, 1:end]
        yield average_product_correct(maps_HLL + maps_HLL.mT)


def average_product_correct(maps_HLL: torch.Tensor) -> torch.Tensor:
    """Subtract from each entry what its row's and column's sums alone would give."""
    row = maps_HLL.sum(-1, keepdim=True)
    column = maps_HLL.sum(-2, keepdim=True)
    total = maps_HLL.sum((-1, -2), keepdim=True)
    return torch.addcmul(maps_HLL, row, column / total, value=-1)
