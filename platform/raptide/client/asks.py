"""What each method asks the endpoint, and how its result is made of the answers.

An ask cuts an item into pieces, and joins what these are answered with. `limit` is the
length that the model takes whole; infinite where long sequences are to be refused.
Shape letters: L residues, D width, V tokens of the alphabet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from raptide.alphabet import STANDARD, decode_residues
from raptide.calls.scoring import (
    log_likelihood,
    log_softmax,
    score_changes,
    score_substitutions,
)
from raptide.calls.variants import Substitution
from raptide.calls.windows import add_part, weigh
from raptide.client import pieces
from raptide.client.pieces import (
    CHUNK_TOKENS,
    LOGITS,
    SPECIALS,
    Kind,
    Piece,
    cut_masked,
    cut_pieces,
    fits,
)
from raptide.methods import Pooling, ScanMethod, ScoreMethod, VariantMethod

Answered = Sequence[tuple[Piece, Any]]
"""An item's pieces, each with the array or number that it was answered with."""


class Ask(Protocol):
    """One method of the client."""

    def cut(self, item: int, residues: np.ndarray, limit: float) -> Iterator[Piece]:
        """What is asked about one item."""

    def join(self, residues: np.ndarray, answered: Answered) -> Any:
        """Its result."""


@dataclass(frozen=True)
class Embed:
    pooling: Pooling
    layers: list[int] | None

    def cut(self, item: int, residues: np.ndarray, limit: float) -> Iterator[Piece]:
        depth = len(self.layers or (-1,))
        # The mean of a long protein is one over windows with weights, so it takes their residues.
        long = len(residues) > limit and self.pooling == "mean"
        pooling = "residue" if long else self.pooling
        options: dict[str, Any] = {"pooling": pooling}
        if self.layers is not None:
            options["layers"] = self.layers
        each = pooling == "residue"
        kind = Kind(
            *("/v1/embeddings", "input", "embedding", options),
            tokens=CHUNK_TOKENS // depth if each else CHUNK_TOKENS,
            large=each or depth > 1,
        )
        shape = (*((depth,) if depth > 1 else ()), *(("L",) if each else ()), None)
        return cut_pieces(kind, item, residues, limit, shape)

    def join(self, residues: np.ndarray, answered: Answered) -> np.ndarray:
        return join_windows(residues, answered, self.pooling, len(self.layers or (-1,)) > 1)


@dataclass(frozen=True)
class Tables:
    """A table for each sequence: logits or contacts."""

    kind: Kind
    columns: str | None = None

    def cut(self, item: int, residues: np.ndarray, limit: float) -> Iterator[Piece]:
        return cut_pieces(self.kind, item, residues, limit, ("L", self.columns))

    def join(self, residues: np.ndarray, answered: Answered) -> np.ndarray:
        return join_windows(residues, answered, "residue")


@dataclass(frozen=True)
class Score:
    method: ScoreMethod

    def cut(self, item: int, residues: np.ndarray, limit: float) -> Iterator[Piece]:
        masks = self.method == "pseudo-ppl"
        if fits(len(residues), limit, masks):
            budget = pieces.MASKED.tokens if masks else CHUNK_TOKENS
            kind = Kind("/v1/scores", "sequences", "score", {"method": self.method}, budget)
            tokens = (len(residues) + SPECIALS) * (len(residues) if masks else 1)
            yield Piece(kind, item, decode_residues(residues), tokens)
        elif masks:
            yield from cut_masked(item, residues, range(len(residues)), limit)
        else:
            yield from Tables(LOGITS).cut(item, residues, limit)

    def join(self, residues: np.ndarray, answered: Answered) -> float:
        piece, value = answered[0]
        if piece.kind.counts:
            return value
        return log_likelihood(log_rows(residues, answered), residues) / len(residues)


@dataclass(frozen=True)
class Variants:
    """All variants of the only item, of log probabilities where they change it."""

    method: VariantMethod
    changes: list[list[Substitution]]

    @property
    def positions(self) -> list[int]:
        return sorted({each.position for change in self.changes for each in change})

    def cut(self, item: int, residues: np.ndarray, limit: float) -> Iterator[Piece]:
        if self.method == "masked-marginals":
            return cut_masked(item, residues, self.positions, limit)
        return Tables(LOGITS).cut(item, residues, limit)

    def join(self, residues: np.ndarray, answered: Answered) -> np.ndarray:
        rows = log_rows(residues, answered)
        if self.method == "masked-marginals":
            return score_changes(self.changes, dict(zip(self.positions, rows, strict=True)))
        return score_changes(self.changes, dict(enumerate(rows)))


@dataclass(frozen=True)
class Scan:
    method: ScanMethod

    def cut(self, item: int, residues: np.ndarray, limit: float) -> Iterator[Piece]:
        masks = self.method == "masked-marginals"
        if fits(len(residues), limit, masks):
            kind = Kind("/v1/scan", "sequence", "values", {"method": self.method})
            return cut_pieces(kind, item, residues, limit, ("L", len(STANDARD)))
        if masks:
            return cut_masked(item, residues, range(len(residues)), limit)
        return Tables(LOGITS).cut(item, residues, limit)

    def join(self, residues: np.ndarray, answered: Answered) -> np.ndarray:
        piece, value = answered[0]
        if piece.kind.path == "/v1/scan":
            return value
        return score_substitutions(log_rows(residues, answered), residues)


def log_rows(residues: np.ndarray, answered: Answered) -> np.ndarray:
    """Log probabilities, [rows, V] fp32: of masked passes, or of the logits of all residues."""
    if answered[0][0].masked:
        return np.concatenate([rows for _, rows in answered])
    return log_softmax(join_windows(residues, answered, "residue"))


def join_windows(
    residues: np.ndarray, answered: Answered, pooling: Pooling, several: bool = False
) -> np.ndarray:
    """What the engine makes of windows (calls/windows.py), of their answers.

    Args:
        several: whether arrays have an axis of layers before the others.
    """
    piece, value = answered[0]
    if len(answered) == 1:
        return value
    joined = None
    for piece, value in answered:
        window = piece.window
        assert window is not None
        layered = value if several else value[None]
        if pooling == "bos":
            part = layered * np.float32(window.share)
        else:
            assert window.weights is not None
            rows = layered.swapaxes(0, 1)  # [L, layers, D]
            part = weigh(rows, window.weights[:, None, None], pooling, len(residues))
        whole = len(residues) if pooling == "residue" else None
        joined = add_part(joined, window, part, whole)
    assert joined is not None
    return joined if several else joined[0]
