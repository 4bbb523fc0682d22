"""A worker's share of a global batch, as micro-batches of packed tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from raptide.alphabet import Alphabet
from raptide.data.streaming.batch import PackedRows
from raptide.model.packed import Packed

NO_TARGET = -1


@dataclass(frozen=True)
class MicroBatch:
    """Packed rows of one forward pass, flattened."""

    packed: Packed
    targets_T: torch.Tensor
    """The true token where a residue was chosen, else -1, [T] int64."""


def share_bounds(
    num_rows: int, rank: int, workers: int, micro_rows: int, accumulation: int
) -> list[tuple[int, int]]:
    """First and last row (exclusive) of each of a rank's micro-batches, [accumulation].

    Each rank takes a contiguous run of slots; slots beyond `num_rows` are empty.
    """
    assert workers * micro_rows * accumulation >= num_rows, "some rows would find no slot"
    first = rank * micro_rows * accumulation
    starts = range(first, first + micro_rows * accumulation, micro_rows)
    return [(min(s, num_rows), min(s + micro_rows, num_rows)) for s in starts]


def micro_batches(
    rows: PackedRows, bounds: list[tuple[int, int]], alphabet: Alphabet, device: torch.device
) -> Iterator[MicroBatch]:
    """The micro-batches within `bounds`, also those without a row.

    Every worker must run equally many forward passes, or the collectives would wait forever.
    """
    for start, end in bounds:
        if start == end:
            yield empty_micro_batch(alphabet, device)
            continue
        fills = [int(segments.sum()) for segments in rows.segments[start:end]]
        tokens = _join(rows.tokens[start:end], fills)
        true = _join(rows.targets[start:end], fills)
        targets = np.where(true == alphabet.pad, NO_TARGET, true)
        lengths = tuple(np.concatenate(rows.segments[start:end]).tolist())
        yield _micro_batch(tokens, targets, lengths, device)


def empty_micro_batch(alphabet: Alphabet, device: torch.device) -> MicroBatch:
    """One sequence of no residues without a target: a pass that changes nothing."""
    tokens = np.array([alphabet.cls, alphabet.eos], np.int64)
    return _micro_batch(tokens, np.full(2, NO_TARGET), (2,), device)


def _micro_batch(
    tokens: np.ndarray, targets: np.ndarray, lengths: tuple[int, ...], device: torch.device
) -> MicroBatch:
    return MicroBatch(
        Packed(torch.from_numpy(tokens).to(device, non_blocking=True), lengths),
        torch.from_numpy(targets).to(device, non_blocking=True),
    )


def _join(matrix: np.ndarray, fills: list[int]) -> np.ndarray:
    """The filled part of each row, end to end, int64."""
    pieces = [row[:fill] for row, fill in zip(matrix, fills, strict=True)]
    return np.concatenate(pieces).astype(np.int64)
