"""Packed tokens in the order in which a recurrent network reads them.

A step in time reads one token of every sequence that is long enough, the longest sequence first:
the layout of torch's PackedSequence. So no state passes from one sequence to the next, and no
padding is computed on. Shape letters: see model/packed.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from raptide.model.device import send
from raptide.model.packed import Packed


@dataclass(frozen=True)
class Reading:
    """One way through all sequences at once."""

    sizes: torch.Tensor
    """Sequences that each step reads a token of, [longest] int64, on the CPU as torch wants it."""

    order_T: torch.Tensor
    """Places in the pack in the order they are read, [T] int64."""

    back_T: torch.Tensor
    """Where in that order each place stands, [T] int64."""

    def run(self, lstm: nn.LSTM, x_TD: torch.Tensor) -> torch.Tensor:
        """State after each token, in the order of the pack, [T, D]; every sequence starts at 0."""
        states, _ = lstm(PackedSequence(x_TD.index_select(0, self.order_T), self.sizes))
        return states.data.index_select(0, self.back_T)


def read_both_ways(packed: Packed) -> tuple[Reading, Reading]:
    """From each sequence's first token on, and from its last one back."""
    lengths = np.array(packed.lengths)
    place_T = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rank_B = np.argsort(np.argsort(-lengths, kind="stable"))
    rank_T = np.repeat(rank_B, lengths)
    device = packed.tokens_T.device
    return (
        _reading(place_T, rank_T, device),
        _reading(np.repeat(lengths, lengths) - 1 - place_T, rank_T, device),
    )


def _reading(time_T: np.ndarray, rank_T: np.ndarray, device: torch.device) -> Reading:
    order = np.lexsort((rank_T, time_T))
    return Reading(
        torch.from_numpy(np.bincount(time_T)),
        send(torch.from_numpy(order), device),
        send(torch.from_numpy(np.argsort(order)), device),
    )
