"""One request's work, cut into the batcher's pieces and put together again from their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from raptide.calls.scoring import (
    log_likelihood,
    log_softmax,
    score_changes,
    score_substitutions,
)
from raptide.calls.variants import Substitution, parse_variant
from raptide.errors import SequenceError
from serve.calls import SPECIALS, Work

Pieces = list[tuple[Any, int]]
"""What the batcher takes: a payload for the engine, and the tokens it costs."""


class Unfit(Exception):
    """The work does not fit the model; shown to the client."""

    def __init__(
        self, message: str, index: int = 0, reason: Literal["input", "layers", "model"] = "input"
    ) -> None:
        super().__init__(message)
        self.index, self.reason = index, reason


class Plan:
    """Cuts work into the batcher's pieces, and makes answers of their results.

    Everything comes down to four kinds: embeddings, logits, contacts, and masked passes, which are
    cut so that a piece never exceeds a batch: a long protein's pseudo-ppl takes turns with others.
    """

    def __init__(self, work: Work, residues: list[np.ndarray], budget: int) -> None:
        self._ask = ask = work.ask
        self._asked = work.positions
        self._residues = residues
        self._changes: list[list[Substitution]] = []
        if ask.call == "variants":
            self._changes = [_parse(index, v, residues[0]) for index, v in enumerate(work.variants)]
        self.kind: tuple[Any, ...]
        if ask.call == "embed":
            self.kind = ("embed", ask.pooling, ask.layers)
        elif ask.call == "contacts":
            self.kind = ("contacts",)
        else:
            self.kind = ("masked",) if ask.masks else ("logits",)
        self._positions = [self._wanted(index, each) for index, each in enumerate(residues)]
        self.pieces: Pieces = []
        for sequence, positions in zip(work.sequences, self._positions, strict=True):
            tokens = len(sequence) + SPECIALS
            if not ask.masks:
                self.pieces.append((sequence, tokens))
                continue
            size = max(1, budget // tokens)
            for start in range(0, len(positions), size):
                some = positions[start : start + size]
                self.pieces.append(((sequence, some), tokens * len(some)))

    def _wanted(self, index: int, residues: np.ndarray) -> np.ndarray:
        """Positions whose log probabilities matter."""
        if self._ask.call == "masked":
            return np.array(self._asked[index], int) - 1
        if self._ask.call != "variants":
            return np.arange(len(residues))
        return np.unique([each.position for change in self._changes for each in change]).astype(int)

    def finish(self, values: list[Any]) -> Sequence[np.ndarray]:
        """One array a sequence."""
        if self._ask.call in ("embed", "contacts", "logits"):
            return values
        tables = self._masked(values) if self._ask.masks else self._unmasked(values)
        if self._ask.call == "masked":
            return tables
        pairs = zip(tables, self._residues, strict=True)
        if self._ask.call == "scan":
            return [score_substitutions(table, residues) for table, residues in pairs]
        if self._ask.call == "score":
            return [np.array(log_likelihood(t, residues) / len(residues)) for t, residues in pairs]
        rows = dict(zip(self._positions[0].tolist(), tables[0], strict=True))
        return [score_changes(self._changes, rows)]

    def _unmasked(self, values: list[np.ndarray]) -> list[np.ndarray]:
        wanted = zip(values, self._positions, strict=True)
        return [log_softmax(logits[positions]) for logits, positions in wanted]

    def _masked(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """The rows of each sequence, out of its pieces."""
        rows = np.concatenate(values)
        ends = np.cumsum([len(positions) for positions in self._positions])
        return np.split(rows, ends[:-1])


def _parse(index: int, variant: str, residues: np.ndarray) -> list[Substitution]:
    try:
        return parse_variant(variant, residues)
    except SequenceError as error:
        raise Unfit(str(error), index) from None
