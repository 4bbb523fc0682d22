"""Packed tokens: several sequences end to end, with their boundaries.

Shape letters used in this package:
    T tokens of all sequences   B sequences   D width   H heads   K head width   V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Packed:
    """B sequences end to end."""

    tokens_T: torch.Tensor
    """Token ids, [T] int64."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, specials included, B entries that sum to T."""

    @cached_property
    def lengths_B(self) -> torch.Tensor:
        return torch.tensor(self.lengths, device=self.tokens_T.device)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """Boundaries, [B + 1] int32."""
        ends = torch.cumsum(self.lengths_B, 0, dtype=torch.int32)
        return torch.nn.functional.pad(ends, (1, 0))

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

    @property
    def longest(self) -> int:
        return max(self.lengths)
