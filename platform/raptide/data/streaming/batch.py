"""What a global batch is: its settings, its rows, its place in the stream.

Shared by those who make batches and those who train on them; needs neither Ray nor Arrow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from raptide.alphabet import ALPHABETS, FIRST_RESIDUE, RESIDUES
from raptide.config import Settings

Sampling = Literal["representatives", "members", "all"]

PAD = ALPHABETS["esm-33"].pad
assert all(alphabet.pad == PAD for alphabet in ALPHABETS.values())


class RowSettings(Settings):
    """How sequences become packed rows."""

    sampling: Sampling = "representatives"
    """`representatives` reads the first member of each cluster (UR50/S), `members` draws one per
    cluster and epoch (UR50/D), `all` reads every member (UR100)."""

    row_tokens: int = Field(1024, ge=4)
    """Tokens in a packed row, specials included."""

    crop_tokens: int = Field(1024, ge=4)
    """Tokens kept of a longer sequence, specials included; at most `row_tokens`."""

    mask_fraction: float = Field(0.15, gt=0.0, lt=1.0)
    """Share of residues chosen for prediction."""

    @model_validator(mode="after")
    def _crop_fits(self) -> RowSettings:
        if self.crop_tokens > self.row_tokens:
            raise ValueError(
                f"crop_tokens ({self.crop_tokens}) must be at most row_tokens ({self.row_tokens})"
            )
        return self


class StreamSettings(RowSettings):
    """How a corpus becomes global batches."""

    batch_rows: int = Field(128, ge=1)
    """Packed rows in a global batch, over all workers."""

    first_batch_rows: int | None = Field(None, ge=1)
    """Packed rows in the first one, where batches grow; at most `batch_rows`."""

    batch_warmup_steps: int = Field(0, ge=0)
    """Steps over which they grow, along a line; 0 takes `batch_rows` from the first step on."""

    fraction: float = Field(1.0, gt=0.0, le=1.0)
    """Share of the training blocks in use; subsets nest, since the order is a hash."""

    seed: int = Field(1, ge=0, lt=2**63)
    """Seeds the block order, the drawn members, the crops and the masks."""

    lookahead_mb: int = Field(256, ge=16)
    """Object-store memory, in MB, that rows prepared ahead may take; changes no batch."""

    @model_validator(mode="after")
    def _batches_grow(self) -> StreamSettings:
        first = self.first_batch_rows
        if (first is None) != (self.batch_warmup_steps == 0):
            raise ValueError(
                "first_batch_rows and batch_warmup_steps say together how batches grow; give both"
            )
        if first is not None and first > self.batch_rows:
            raise ValueError(
                f"first_batch_rows ({first}) must be at most batch_rows ({self.batch_rows})"
            )
        return self

    def rows_at(self, number: int) -> int:
        """Packed rows in one global batch; the first one's number is 0."""
        if self.first_batch_rows is None or number >= self.batch_warmup_steps:
            return self.batch_rows
        grown = (self.batch_rows - self.first_batch_rows) * number // self.batch_warmup_steps
        return self.first_batch_rows + grown

    def rows_before(self, number: int) -> int:
        """Packed rows in all global batches before one."""
        growing = min(number, self.batch_warmup_steps)
        return sum(map(self.rows_at, range(growing))) + (number - growing) * self.batch_rows


@dataclass(frozen=True)
class PackedRows:
    """R packed rows."""

    tokens: np.ndarray
    """Input tokens, masked, [R, row_tokens] uint8, padded at the end of each row."""

    targets: np.ndarray
    """The true token where a residue was chosen, `<pad>` elsewhere, [R, row_tokens] uint8."""

    segments: list[np.ndarray]
    """Lengths of each row's segments in order, R arrays of int32; their sum is the row's fill."""

    def uncovered(self) -> PackedRows:
        """The same sequences as they are, with every residue for a target.

        For models that are blind to the residue which they predict, so that none has to be masked.
        """
        tokens = np.where(self.targets != PAD, self.targets, self.tokens)
        is_residue = (tokens >= FIRST_RESIDUE) & (tokens < FIRST_RESIDUE + len(RESIDUES))
        targets = np.where(is_residue, tokens, np.uint8(PAD))
        return PackedRows(tokens, targets, self.segments)


@dataclass(frozen=True)
class Cursor:
    """A place in the stream: the next packed row to be read."""

    epoch: int = 0
    block: int = 0
    """Place within the epoch's block order."""

    row: int = 0
    """Packed row within that block; may be one past its last."""


@dataclass(frozen=True)
class GlobalBatch:
    """A step's packed rows and the cursor behind them."""

    rows: PackedRows
    row_ids: np.ndarray
    """(epoch, block, row) of each packed row, [R, 3] int64."""

    next_cursor: Cursor

    @property
    def num_places(self) -> int:
        """Tokens of all rows, with padding."""
        return self.rows.tokens.size

    @cached_property
    def num_targets(self) -> int:
        """Residues to predict, over all rows."""
        return int(np.count_nonzero(self.rows.targets != PAD))

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all rows, padding left out."""
        return int(self._lengths.sum())

    @cached_property
    def squared_lengths(self) -> float:
        """Sum of the squares of the sequences' tokens, for the arithmetic of attention."""
        return float((self._lengths**2).sum())

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.concatenate([*self.rows.segments, np.empty(0, np.int32)]).astype(np.float64)

    def uncovered(self) -> GlobalBatch:
        """The same for models that are blind to what they predict (`PackedRows.uncovered`)."""
        return replace(self, rows=self.rows.uncovered())

    def counted(self) -> GlobalBatch:
        """The same, with its counts made."""
        _ = self.num_targets, self.num_tokens, self.squared_lengths
        return self
