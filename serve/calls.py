"""What the gateway asks of replicas, and what they say: small messages that Ray can ship.

Ask      what is asked of every sequence of a request
Work     some sequences of one request, on their way to a replica
Taken    a replica has them in its queue
Begun    it is computing the first of them
Done     their answers, with the weights they come from and where the time went
Refused  why there are none
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import numpy as np

Call = Literal["embed", "logits", "masked", "contacts", "score", "variants", "scan"]

Reason = Literal[
    "busier", "deadline", "failed", "full", "input", "layers", "model", "stopped", "version"
]

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

CHANGE = re.compile(r"^[A-Za-z]([0-9]+)[A-Za-z]$")

SPECIALS = 2
"""Tokens around one sequence (one fewer for ESM-1, which makes no difference to a budget)."""


LINEAR_RESIDUES = 2048
LINEAR_CONTACTS = 256
"""Residues up to which a protein costs its length."""


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
        """What one sequence costs: tokens to compute, as those of a short protein count.

        Beyond LINEAR_RESIDUES a protein takes its length squared, by attention; its contacts, which
        are read from all attention maps, do so from LINEAR_CONTACTS on.

        Args:
            positions: how many of its residues are masked in turn; None means all.
        """
        passes = (residues if positions is None else positions) if self.masks else 1
        linear = LINEAR_CONTACTS if self.call == "contacts" else LINEAR_RESIDUES
        return (residues + SPECIALS) * passes * max(linear, residues) // linear


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
    weights: str = ""
    """The digest of the only weights that may answer; empty where any may."""
    leads: bool = False
    """Whether others of its request wait until it is taken: `Taken` is said then."""
    admitted: bool = False
    """Whether its request has been let in: it waits for room, before newcomers, and is not refused
    for want of it."""
    alone: bool = False
    """Whether a replica died over it: it shares no batch with anybody then."""
    movable: bool = False
    """Whether a replica may send it back because another has less to do."""
    instead: int | None = None
    """Tokens that the next best replica is believed to have; None where there is none."""

    def __repr__(self) -> str:
        """Nothing that is nobody's business: messages end up in logs."""
        return f"Work({self.ask.call}, {len(self.sequences)} sequences, {self.tokens} tokens)"


@dataclass(frozen=True)
class Load:
    """What a replica has to do."""

    replica: str
    """As routers know it."""
    tokens: int
    """That wait or are being computed, of all gateways."""


@dataclass(frozen=True)
class Taken:
    """Said before the answer: the work has its place in a replica's queue."""

    weights: str
    """Digest of the weights that will answer."""


@dataclass(frozen=True)
class Begun:
    """Said before the answer: the work is in the batch that is computed next. Should the replica
    die now, the work may be why."""

    node: str
    """Where the replica is."""


@dataclass(frozen=True)
class Done:
    """One array a sequence, fp32 (float64 for scores; a scalar array each for "score")."""

    arrays: Sequence[np.ndarray]
    weights: str
    """Digest of the weights that answered."""
    step: int | None
    queue_s: float
    compute_s: float
    load: Load | None = None

    def __repr__(self) -> str:
        return f"Done({len(self.arrays)} arrays)"


@dataclass(frozen=True)
class Refused:
    """Why a replica did not compute."""

    reason: Reason
    message: str = ""
    """For "version", the digest of the weights that there are."""
    index: int = 0
    """Which sequence of the work is at fault."""
    retry_after_s: int = 1
    load: Load | None = None


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
    """How many different positions variants change together.

    What is no substitution counts as one of its own: the replica says what is wrong with it.
    """
    changes = {change.strip() for variant in variants for change in variant.split(":")}
    return len({CHANGE.sub(r"\1", change) for change in changes})


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
