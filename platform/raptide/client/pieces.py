"""What requests are made of: pieces of sequences, cut so that none asks for too much.

An *item* is what one result is computed from, mostly a sequence. It is asked for in one piece or in
several (windows of a long one, some positions of many); pieces of one kind share a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from raptide.alphabet import decode_residues
from raptide.calls.windows import WINDOW_RESIDUES, Window, cut_windows, window_around

CHUNK_TOKENS = 4_096
"""Tokens to compute in one request. Small enough that what is in flight is answered in time by an
endpoint on CPUs; per-residue answers are then at most 21 MB at 1,280 values a residue. Of several
layers each is a share of it, so that an answer is no larger."""

SPECIALS = 2
"""Tokens around a sequence."""


@dataclass(frozen=True)
class Kind:
    """What the pieces of one request have in common."""

    path: str
    given: str
    """The request's field with their letters."""
    found: str
    """The answer's field with their numbers."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The request's other fields."""
    tokens: int = CHUNK_TOKENS
    """In one request."""
    large: bool = False
    """Whether an answer's arrays come as an Arrow stream."""

    @property
    def counts(self) -> bool:
        """Whether the answer is a number for each piece, and no array."""
        return self.found == "score"


@dataclass(frozen=True)
class Piece:
    """What one array, or number, of an answer is computed from."""

    kind: Kind
    item: int
    """Index of its item in the call."""
    letters: str
    tokens: int
    """What it takes to compute."""
    shape: tuple[int | None, ...] = ()
    """Of the answer; None is any number."""
    window: Window | None = None
    masked: tuple[int, ...] = ()
    """Positions to mask in turn, counted from 1."""


LOGITS = Kind("/v1/logits", "sequences", "values", large=True)
MASKED = Kind("/v1/logits", "sequences", "values", tokens=32_768, large=True)
"""Passes in which a residue is masked: answers are small, and the sequence is sent for many."""


def fits(length: int, limit: float, masks: bool) -> bool:
    """Whether one request may ask for all of a sequence, every residue masked in turn or none."""
    return length <= limit and (not masks or length * (length + SPECIALS) <= MASKED.tokens)


def cut_pieces(
    kind: Kind, item: int, residues: np.ndarray, limit: float, shape: tuple[int | str | None, ...]
) -> Iterator[Piece]:
    """A sequence in one piece, or in windows where it is longer than `limit`.

    Args:
        shape: of one answer, with "L" for its residues.
    """
    size = int(min(limit, WINDOW_RESIDUES))
    for window in cut_windows(item, len(residues), limit, size):
        length = window.stop - window.start
        letters = decode_residues(residues[window.start : window.stop])
        filled = tuple(length if each == "L" else each for each in shape)
        yield Piece(kind, item, letters, length + SPECIALS, filled, window)  # type: ignore[arg-type]


def cut_masked(
    item: int, residues: np.ndarray, positions: Iterable[int], limit: float
) -> Iterator[Piece]:
    """Passes in which one of `positions` (from 0, ascending) is masked, as many as fit a request.

    A position of a sequence longer than `limit` is seen in the middle of a window of its own.
    """
    length = len(residues)
    size = length if length <= limit else int(min(limit, WINDOW_RESIDUES))
    at_once = max(1, MASKED.tokens // (size + SPECIALS))
    for start, some in groupby(positions, lambda each: window_around(each, length, size)):
        places = [int(each) - start + 1 for each in some]
        letters = decode_residues(residues[start : start + size])
        for first in range(0, len(places), at_once):
            masked = tuple(places[first : first + at_once])
            tokens = len(masked) * (size + SPECIALS)
            yield Piece(MASKED, item, letters, tokens, (len(masked), None), None, masked)


class Chunker:
    """Neighbours of one kind in one request: at most `most`, and no more tokens than their kind's.

    A piece of more tokens goes alone.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._chunk: list[Piece] = []
        self._room = 0

    def add(self, piece: Piece) -> list[Piece] | None:
        """Take one more piece; returns the chunk before it if it is full now."""
        full = None
        chunk = self._chunk
        if chunk and (
            piece.kind != chunk[0].kind or piece.tokens > self._room or len(chunk) >= self._most
        ):
            full = self.rest()
        self._room = (self._room if self._chunk else piece.kind.tokens) - piece.tokens
        self._chunk.append(piece)
        return full

    def rest(self) -> list[Piece]:
        """What has been taken since the last full chunk."""
        chunk, self._chunk = self._chunk, []
        return chunk


def write_body(chunk: list[Piece], model: str | None) -> dict[str, Any]:
    """The request that asks for a chunk."""
    kind = chunk[0].kind
    letters = [piece.letters for piece in chunk]
    alone = kind.given == "sequence"
    body = {kind.given: letters[0] if alone else letters, **kind.options}
    if not kind.counts:
        body["encoding_format"] = "base64"
    if chunk[0].masked:
        body["masked_positions"] = [piece.masked for piece in chunk]
    if model is not None:
        body["model"] = model
    return body
