"""Forward passes over many sequences: batches by token budget, in lanes, windows, pooling, masking.

Residues come as ids ([L] uint8 arrays), numbers go out as numpy arrays. Shape letters: see
model/packed.py; here L residues, W what there is of each residue (layers, or one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from raptide.calls.windows import (
    WINDOW_RESIDUES,
    Window,
    add_part,
    cut_windows,
    weigh,
    window_around,
)
from raptide.inference.batching import even_tokens, plan_batches
from raptide.inference.lanes import LEAST_TOKENS, Lanes
from raptide.methods import Pooling
from raptide.model.contacts import corrected_maps
from raptide.model.device import send, threads_for
from raptide.model.families import AnyModel
from raptide.model.packed import Packed
from raptide.model.transformer import Esm

LEAST_SHARE = 2 * LEAST_TOKENS
"""Tokens that a batch in a lane may have at least, however many lanes share those of one batch."""

LONGEST_RESIDUES = 16384
"""Longest sequence taken whole by models whose positions set no limit of their own."""


class Forward:
    """One model on one device; stateless between calls, so threads may share it."""

    def __init__(self, model: AnyModel, device: torch.device, max_batch_tokens: int) -> None:
        self.model = model
        self._device = device
        self._max_batch_tokens = max_batch_tokens
        self._alphabet = model.settings.alphabet
        on_cpu = device.type == "cpu"
        parameters = sum(each.numel() for each in model.parameters())
        self.lanes = Lanes(threads_for(parameters) if on_cpu else None)

    @property
    def max_residues(self) -> int:
        """Residues of the longest sequence that is computed whole."""
        limit = self.model.settings.max_tokens
        return limit - self._alphabet.num_specials if limit else LONGEST_RESIDUES

    @property
    def _window_residues(self) -> int:
        return min(self.max_residues, WINDOW_RESIDUES)

    def represent(
        self, sequences: Sequence[np.ndarray], layers: list[int], pooling: Pooling
    ) -> list[np.ndarray]:
        """Representations after `layers` of each sequence, fp32: [W, D], or [W, L, D] unpooled."""

        def compute(packed: Packed) -> torch.Tensor:
            return torch.stack(self.model.represent(packed, layers), 1)

        return self._pooled(sequences, compute, pooling)

    def logits(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Logits of each sequence's residues, unmasked, [L, V] fp32."""

        def compute(packed: Packed) -> torch.Tensor:
            return self.model(packed)[:, None]

        return [table[0] for table in self._pooled(sequences, compute, "residue")]

    def masked_log_p(
        self, pieces: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Log probabilities at positions while each alone is masked.

        Passes of all pieces share batches. In a sequence longer than the model takes, a position is
        seen in the middle of a window of its own.

        Args:
            pieces: sequences with the positions of interest in them.

        Returns:
            For each position in turn the index of its piece and its row, [V] fp32.
        """
        specials = self._alphabet.num_specials
        sizes = [(self._masked_residues(len(each)) + specials, len(at)) for each, at in pieces]
        longest = max((tokens for tokens, times in sizes if times), default=0)
        total = sum(tokens * times for tokens, times in sizes)
        lanes = self.lanes.worth(longest, total)
        budget = self._batch_tokens(lanes)
        if lanes > 1:
            budget = min(budget, even_tokens(total, budget, lanes) + longest - 1)
        batches = self._masked_batches(pieces, budget)
        for found in self.lanes.map(self._predict_masked, batches, lanes):
            yield from found

    def _masked_batches(
        self, pieces: Sequence[tuple[np.ndarray, np.ndarray]], budget: int
    ) -> Iterator[list[tuple[int, np.ndarray, int]]]:
        """Passes, in turn: the index of the piece, tokens, and where in them the mask is."""
        batch: list[tuple[int, np.ndarray, int]] = []
        held = 0
        for index, (residues, positions) in enumerate(pieces):
            for position in positions:
                row, place = self._mask(residues, int(position))
                if batch and held + len(row) > budget:
                    yield batch
                    batch, held = [], 0
                batch.append((index, row, place))
                held += len(row)
        if batch:
            yield batch

    def _masked_residues(self, length: int) -> int:
        """Of a sequence, how many a masked pass sees."""
        return length if length <= self.max_residues else self._window_residues

    def _mask(self, residues: np.ndarray, position: int) -> tuple[np.ndarray, int]:
        """Tokens of one masked pass, and where in them the mask is."""
        length = len(residues)
        size = self._masked_residues(length)
        start = window_around(position, length, size)
        row = self._alphabet.add_specials(residues[start : start + size])
        row[position - start + 1] = self._alphabet.mask
        return row, position - start + 1

    def _predict_masked(
        self, batch: list[tuple[int, np.ndarray, int]]
    ) -> list[tuple[int, np.ndarray]]:
        assert isinstance(self.model, Esm), "other families read no <mask>"
        indices, rows, places = zip(*batch, strict=True)
        starts = np.cumsum([0, *map(len, rows[:-1])])
        flat = torch.from_numpy(starts + np.array(places))
        with torch.inference_mode():
            packed = self._pack(list(rows))
            (final_TD,) = self.model.represent(packed, [self.model.settings.layers])
            logits = self.model.predict(final_TD[send(flat, self._device)]).float()
            table = torch.log_softmax(logits, -1).cpu().numpy()
        return list(zip(indices, table, strict=True))

    def corrected_maps(self, residues: np.ndarray) -> Iterator[torch.Tensor]:
        """Symmetric, corrected attention maps of one sequence, layer by layer, [H, L, L] fp32."""
        assert isinstance(self.model, Esm), "other families have no attention"
        with torch.inference_mode():
            maps = self.model.attention_maps(self._pack([self._alphabet.add_specials(residues)]))
            yield from corrected_maps(maps, self._alphabet.append_eos)

    def _pooled(
        self,
        sequences: Sequence[np.ndarray],
        compute: Callable[[Packed], torch.Tensor],
        pooling: Pooling,
    ) -> list[np.ndarray]:
        """Compute [T, W, D] for all windows of all sequences and pool them; order is kept."""
        windows = [
            window
            for index, residues in enumerate(sequences)
            for window in cut_windows(
                index, len(residues), self.max_residues, self._window_residues
            )
        ]
        specials = self._alphabet.num_specials
        lengths = [window.stop - window.start + specials for window in windows]

        def pool(batch: list[Window]) -> list[tuple[Window, np.ndarray]]:
            rows = [
                self._alphabet.add_specials(sequences[w.sequence][w.start : w.stop]) for w in batch
            ]
            with torch.inference_mode():
                packed = self._pack(rows)
                pieces = compute(packed).split(packed.lengths)
                return list(zip(batch, _parts(pieces, batch, sequences, pooling), strict=True))

        lanes = self.lanes.worth(max(lengths, default=0), sum(lengths))
        planned = plan_batches(lengths, self._batch_tokens(lanes), lanes)
        batches = ([windows[index] for index in indices] for indices in planned)
        results: list[Any] = [None] * len(sequences)
        for window, part in chain.from_iterable(self.lanes.map(pool, batches, lanes)):
            index = window.sequence
            whole = len(sequences[index]) if pooling == "residue" else None
            results[index] = add_part(results[index], window, part, whole)
        return results

    def _batch_tokens(self, lanes: int) -> int:
        """Of each batch at most: those side by side share what one by itself may have."""
        return min(self._max_batch_tokens, max(LEAST_SHARE, self._max_batch_tokens // lanes))

    def _pack(self, rows: list[np.ndarray]) -> Packed:
        tokens = send(torch.from_numpy(np.concatenate(rows)), self._device)
        return Packed(tokens.long(), tuple(len(row) for row in rows))


def _parts(
    pieces: Sequence[torch.Tensor],
    batch: list[Window],
    sequences: Sequence[np.ndarray],
    pooling: Pooling,
) -> list[np.ndarray]:
    """What each window's piece, [tokens, W, D], gives to its sequence's result.

    Pooled numbers leave the device in one copy a batch.
    """
    parts = []
    for window, piece in zip(batch, pieces, strict=True):
        if pooling == "bos":
            parts.append(piece[0].float() * window.share)
            continue
        inner = piece[1 : 1 + window.stop - window.start].float()
        weights = None
        if window.weights is not None:
            weights = torch.from_numpy(window.weights).to(inner.device)[:, None, None]
        parts.append(weigh(inner, weights, pooling, len(sequences[window.sequence])))
    if pooling == "residue":
        return [part.contiguous().cpu().numpy() for part in parts]
    return list(torch.stack(parts).cpu().numpy())
