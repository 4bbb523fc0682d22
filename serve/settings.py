"""What the application is deployed with: `serve run serve.app:build model=FOLDER ...`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raptide.config import Settings


class ServeSettings(Settings):
    """Arguments of `serve.app:build`."""

    model: str
    """A bundle, a checkpoint, or a run folder (its newest checkpoint is taken)."""

    name: str = "raptide"
    """What clients call the model."""

    replicas: int = Field(1, ge=1)

    dtype: Literal["auto", "fp32", "bf16"] = "auto"

    gpus_per_replica: float = Field(0.0, ge=0.0)

    max_batch_tokens: int = Field(4096, ge=1)
    """Tokens in one forward pass."""

    max_queued_tokens: int = Field(262_144, ge=1)
    """Tokens that may wait at a replica. A request that finds no room is refused with 429, one that
    alone takes more with 422; masking each residue in turn takes a pass per residue."""

    max_sequences: int = Field(256, ge=1)
    """Sequences in one request."""

    max_residues: int = Field(4096, ge=1)
    """Residues in one sequence; the model's own limit counts too."""
