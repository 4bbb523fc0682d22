"""Packed tokens: several sequences end to end, with their boundaries.

Shape letters used in this package:
    T tokens of all sequences   B sequences   D width   H heads   K head width   V vocabulary
    N targets
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from raptide.model.device import send


class Spans(NamedTuple):
    """Where sequences lie in queries, keys and values, for one kernel over all of them."""

    cu_q: torch.Tensor
    """Boundaries in the queries, [B + 1] int32."""

    cu_k: torch.Tensor
    """Boundaries in keys and values, [B + 1] int32: as in the queries, or each sequence longer by
    one that is not of its own tokens."""

    longest_q: int
    longest_k: int

    own_T: torch.Tensor | None = None
    """Place of each token's own key and value where there are others, [T] int64."""


@dataclass(frozen=True)
class Packed:
    """B sequences end to end."""

    tokens_T: torch.Tensor
    """Token ids, [T] int64."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, specials included, B entries that sum to T."""

    def to(self, device: torch.device) -> Packed:
        """The same on a device, with its boundaries, without waiting for it."""
        there = Packed(send(self.tokens_T, device), self.lengths)
        _ = there.lengths_B, there.cu_seqlens
        return there

    @cached_property
    def lengths_B(self) -> torch.Tensor:
        """[B] int64."""
        return send(torch.tensor(self.lengths), self.tokens_T.device)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """Boundaries, [B + 1] int32."""
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        return send(ends, self.tokens_T.device)

    @cached_property
    def sequence_T(self) -> torch.Tensor:
        """Which sequence each token belongs to, [T] int64."""
        index = torch.arange(len(self.lengths), device=self.tokens_T.device)
        return torch.repeat_interleave(index, self.lengths_B, output_size=len(self.tokens_T))

    @cached_property
    def position_T(self) -> torch.Tensor:
        """Place of each token within its sequence, from 0, [T] int64."""
        index = torch.arange(len(self.tokens_T), device=self.tokens_T.device)
        return index - self.cu_seqlens[:-1].long()[self.sequence_T]

    @cached_property
    def spans(self) -> Spans:
        """Boundaries for attention of every token to its own sequence."""
        return Spans(self.cu_seqlens, self.cu_seqlens, self.longest, self.longest)

    @cached_property
    def spans_with_extra(self) -> Spans:
        """The same with one key and value more behind those of every sequence."""
        device = self.tokens_T.device
        index = torch.arange(len(self.lengths) + 1, device=device, dtype=torch.int32)
        cu_k = self.cu_seqlens + index
        own_T = torch.arange(len(self.tokens_T), device=device) + self.sequence_T
        return Spans(self.cu_seqlens, cu_k, self.longest, self.longest + 1, own_T)

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class Targets:
    """What is asked of packed tokens."""

    at_N: torch.Tensor
    """Places in the pack that are asked for, ascending, [N] int64."""

    true_N: torch.Tensor
    """The tokens that belong there, [N] int64."""

    def to(self, device: torch.device) -> Targets:
        """The same on a device, without waiting for it."""
        return Targets(send(self.at_N, device), send(self.true_N, device))
