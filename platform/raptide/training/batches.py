"""A worker's share of a global batch, as micro-batches of packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from raptide.alphabet import Alphabet
from raptide.data.streaming.batch import PackedRows
from raptide.data.streaming.shares import BatchShare, rows_of_rank
from raptide.model.packed import Packed, Targets
from raptide.training.planning.recipe import Recipe


@dataclass(frozen=True)
class MicroBatch:
    """Packed rows of one forward pass, flattened."""

    packed: Packed
    targets: Targets

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device, without waiting for it."""
        return MicroBatch(self.packed.to(device), self.targets.to(device))

    def uncovered(self) -> MicroBatch:
        """With the true tokens at the targets' places, for models that are blind to these."""
        tokens_T = self.packed.tokens_T.index_copy(0, self.targets.at_N, self.targets.true_N)
        return MicroBatch(Packed(tokens_T, self.packed.lengths), self.targets)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it holds on its device."""
        packed, targets = self.packed, self.targets
        boundaries = (packed.lengths_B, packed.cu_seqlens)
        return packed.tokens_T, *boundaries, targets.at_N, targets.true_N


@dataclass(frozen=True)
class Share:
    """What one worker computes of a global batch."""

    batch: BatchShare
    micro: tuple[MicroBatch, ...]
    """Equally many on every worker, or the collectives would wait forever."""


def share_bounds(
    num_rows: int, rank: int, workers: int, micro_rows: int, accumulation: int
) -> list[tuple[int, int]]:
    """First and last row (exclusive) of each of a rank's micro-batches, [accumulation].

    Each rank takes a contiguous run of rows; its last micro-batches may be empty.
    """
    first, last = rows_of_rank(num_rows, rank, workers)
    assert last - first <= micro_rows * accumulation, "some rows would find no micro-batch"
    starts = range(first, first + micro_rows * accumulation, micro_rows)
    return [(min(s, last), min(s + micro_rows, last)) for s in starts]


def share_cutter(
    recipe: Recipe, workers: int, device: torch.device
) -> Callable[[BatchShare], Share]:
    """How a worker cuts up its own rows; while batches grow, its last micro-batches are empty."""
    micro_rows, accumulation = recipe.training.micro_batch_rows, recipe.accumulation(workers)

    def cut(batch: BatchShare) -> Share:
        bounds = share_bounds(len(batch.row_ids), 0, 1, micro_rows, accumulation)
        return cut_share(bounds, recipe.model.alphabet, device, batch)

    return cut


def cut_share(
    bounds: list[tuple[int, int]], alphabet: Alphabet, device: torch.device, batch: BatchShare
) -> Share:
    """A worker's micro-batches, on its device.

    Args:
        bounds: of the micro-batches within the rows at hand.
    """
    return Share(batch, tuple(micro_batches(batch.rows, bounds, alphabet, device)))


def micro_batches(
    rows: PackedRows, bounds: list[tuple[int, int]], alphabet: Alphabet, device: torch.device
) -> Iterator[MicroBatch]:
    """The micro-batches within `bounds`, also those without a row.

    What is asked is looked up here, on the host, so that the device never has to.
    """
    for start, end in bounds:
        if start == end:
            yield empty_micro_batch(alphabet, device)
            continue
        fills = [int(segments.sum()) for segments in rows.segments[start:end]]
        tokens = _join(rows.tokens[start:end], fills)
        true = _join(rows.targets[start:end], fills)
        at = np.flatnonzero(true != alphabet.pad)
        lengths = tuple(np.concatenate(rows.segments[start:end]).tolist())
        yield _micro_batch(tokens, lengths, at, true[at]).to(device)


def empty_micro_batch(alphabet: Alphabet, device: torch.device) -> MicroBatch:
    """One sequence of no residues without a target: a pass that changes nothing."""
    tokens, none = np.array([alphabet.cls, alphabet.eos], np.int64), np.empty(0, np.int64)
    return _micro_batch(tokens, (2,), none, none).to(device)


def _micro_batch(
    tokens: np.ndarray, lengths: tuple[int, ...], at: np.ndarray, true: np.ndarray
) -> MicroBatch:
    targets = Targets(torch.from_numpy(at), torch.from_numpy(true))
    return MicroBatch(Packed(torch.from_numpy(tokens), lengths), targets)


def _join(matrix: np.ndarray, fills: list[int]) -> np.ndarray:
    """The filled part of each row, end to end, int64."""
    pieces = [row[:fill] for row, fill in zip(matrix, fills, strict=True)]
    return np.concatenate(pieces).astype(np.int64)
