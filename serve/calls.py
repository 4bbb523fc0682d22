"""What the gateway asks of replicas, and what they say: small messages that Ray can ship.

Ask      what is asked of every sequence of a request
Work     some sequences of one request, on their way to a replica
Done     their answers, with the weights they come from and where the time went
Refused  why there are none
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import numpy as np

Call = Literal["embed", "logits", "masked", "contacts", "score", "variants", "scan"]

PATHS: dict[Call, str] = {
    "embed": "embeddings",
    "logits": "logits",
    "masked": "logits",
    "contacts": "contacts",
    "score": "scores",
    "variants": "scores",
    "scan": "scan",
}
"""What clients know the calls by: the paths under /v1."""

SPECIALS = 2
"""Tokens around one sequence (one fewer for ESM-1, which makes no difference to a budget)."""


@dataclass(frozen=True)
class Ask:
    """What is asked of every sequence of a request; as the engine's methods take it."""

    call: Call
    method: str = ""
    pooling: str = "mean"
    layers: tuple[int, ...] = (-1,)

    @property
    def masks(self) -> bool:
        """Whether each residue takes a pass of its own, in which it is masked."""
        return self.method in ("pseudo-ppl", "masked-marginals")

    @property
    def brief(self) -> bool:
        """Whether an answer is a vector a layer or a number a variant, however long the protein."""
        if self.call == "embed":
            return self.pooling != "residue"
        return self.call in ("score", "variants")

    def tokens(self, residues: int, positions: int | None = None) -> int:
        """Tokens to compute for one sequence.

        Args:
            positions: how many of its residues are masked in turn; None means all.
        """
        passes = (residues if positions is None else positions) if self.masks else 1
        return (residues + SPECIALS) * passes


@dataclass(frozen=True)
class Work:
    """Some sequences of one request."""

    ask: Ask
    sequences: list[str]
    """Residue letters in plain capitals, checked."""
    tokens: int
    """What they take to compute; the router balances by it."""
    timeout_s: float
    """Seconds after which nobody wants the answer, counted from its arrival."""
    request_id: str = ""
    variants: list[str] = field(default_factory=list)
    """For the call "variants", of the only sequence."""
    positions: list[list[int]] = field(default_factory=list)
    """For the call "masked", of each sequence, counted from 1."""

    def __repr__(self) -> str:
        """Nothing that is nobody's business: messages end up in logs."""
        return f"Work({self.ask.call}, {len(self.sequences)} sequences, {self.tokens} tokens)"


@dataclass(frozen=True)
class Done:
    """One array a sequence, fp32 (float64 for scores; a scalar array each for "score")."""

    arrays: Sequence[np.ndarray]
    weights: str
    """Digest of the weights that answered."""
    step: int | None
    queue_s: float
    compute_s: float

    def __repr__(self) -> str:
        return f"Done({len(self.arrays)} arrays)"


@dataclass(frozen=True)
class Refused:
    """Why a replica did not compute."""

    reason: Literal["full", "deadline", "input", "layers", "model"]
    message: str = ""
    index: int = 0
    """Which sequence of the work is at fault."""
    retry_after_s: int = 1


def cut(costs: Sequence[int], budget: int) -> Iterator[slice]:
    """Consecutive runs of about `budget` tokens; a larger item is alone in its run."""
    start, held = 0, 0
    for index, cost in enumerate(costs):
        if index > start and held + cost > budget:
            yield slice(start, index)
            start, held = index, 0
        held += cost
    if start < len(costs):
        yield slice(start, len(costs))


def positions_of(variants: Sequence[str]) -> int:
    """At most how many positions variants change together, before they are parsed."""
    return sum(variant.count(":") + 1 for variant in variants)


Description = dict[str, Any]
"""What GET /v1/models says of one model, less its name."""


class Status(TypedDict):
    """How one replica stands."""

    node: str
    weights: str
    step: int | None
    queued_tokens: int
    """That wait."""
    pending_tokens: int
    """That wait or are being computed."""
    residues_per_s: float
    """Answered, over the last half minute."""
    model: Description
