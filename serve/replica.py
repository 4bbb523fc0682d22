"""A replica: one engine and its batcher. Speaks Python, not HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from raptide.inference.engine import Engine
from serve.batcher import Kind, QueueFull, TokenBatcher
from serve.settings import ServeSettings


class Replica:
    """Embeds and scores; requests share batches."""

    def __init__(self, settings: ServeSettings) -> None:
        self._engine = Engine.load(
            settings.model, dtype=settings.dtype, max_batch_tokens=settings.max_batch_tokens
        )
        self._batcher = TokenBatcher(
            self._compute, settings.max_batch_tokens, settings.max_queued_tokens
        )
        self.check_health()

    def check_health(self) -> None:
        """Serve's probe: the model must answer with numbers."""
        assert np.isfinite(self._engine.embed(["M"])).all(), "the model answers with NaN"

    async def probe(self) -> None:
        """Returns once the model has answered, beside whatever is being computed."""
        await asyncio.to_thread(self.check_health)

    def describe(self) -> dict[str, Any]:
        """What /v1/models says."""
        model = self._engine.model
        return {
            "width": self._engine.width,
            "layers": model.settings.layers,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": self._engine.dtype,
            "max_residues": self._engine.max_residues,
            "lineage": self._engine.lineage,
        }

    async def embed(self, sequences: list[str], pooling: str) -> list[np.ndarray] | None:
        """One fp32 array a sequence; None if the queue is full."""
        return await self._submit(("embed", pooling), sequences)

    async def score(self, sequences: list[str], method: str) -> list[float] | None:
        """One mean log likelihood a sequence; None if the queue is full."""
        scores = await self._submit(("score", method), sequences)
        return scores and [float(score) for score in scores]

    async def _submit(self, kind: Kind, sequences: list[str]) -> list[Any] | None:
        try:
            return await self._batcher.submit(kind, sequences)
        except QueueFull:
            return None

    async def _compute(self, kind: Kind, sequences: list[str]) -> list[Any]:
        calls: dict[str, Callable[..., Any]] = {
            "embed": partial(self._engine.embed, sequences, (-1,)),
            "score": partial(self._engine.score_sequences, sequences),
        }
        call, option = kind
        return list(await asyncio.to_thread(calls[call], option))
