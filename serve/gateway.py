"""The gateway: HTTP in front of the replicas. Validates, forwards, shapes answers and errors.

`serve.ingress` copies `api` and the class while this module is still being read. So the class comes
last, after all it uses, and annotations are evaluated at once (no `from __future__`).
"""

import asyncio
from typing import Any

from fastapi import HTTPException
from fastapi_offline import FastAPIOffline
from ray import serve
from ray.serve.handle import DeploymentHandle

import raptide
from raptide.alphabet import decode_residues, encode_residues
from raptide.errors import SequenceError
from serve.batcher import tokens_to_compute
from serve.refusals import overloaded, refusal, register
from serve.schemas import (
    Embedding,
    EmbeddingsRequest,
    EmbeddingsResponse,
    ErrorResponse,
    Model,
    ModelsResponse,
    Score,
    ScoresRequest,
    ScoresResponse,
    Usage,
)
from serve.settings import ServeSettings

READY_S = 10.0
"""Seconds a replica may take to show that it is ready."""

api = FastAPIOffline(  # its docs need no script from elsewhere
    title="Raptide",
    summary="Protein embeddings and scores from one trained checkpoint.",
    version=raptide.__version__,
    responses={status: {"model": ErrorResponse} for status in (404, 422, 429, 500)},
)
register(api)


@serve.ingress(api)
class Gateway:
    """The HTTP face of one model."""

    def __init__(self, settings: ServeSettings, replica: DeploymentHandle) -> None:
        self._settings = settings
        self._replica = replica
        self._model: Model | None = None

    @api.post("/v1/embeddings", summary="Embed sequences", tags=["model"])
    async def embeddings(self, request: EmbeddingsRequest) -> EmbeddingsResponse:
        """One vector a sequence, or one a residue with `pooling: residue`."""
        model = await self._named(request.model)
        sequences = self._check(request.input, "input", request.pooling, model)
        arrays = self._unless_full(await self._replica.embed.remote(sequences, request.pooling))
        data = [Embedding.of(i, a, request.encoding_format) for i, a in enumerate(arrays)]
        return EmbeddingsResponse(model=model.id, data=data, usage=Usage.of(sequences))

    @api.post("/v1/scores", summary="Score sequences", tags=["model"])
    async def scores(self, request: ScoresRequest) -> ScoresResponse:
        """How likely the model finds each sequence."""
        model = await self._named(request.model)
        sequences = self._check(request.sequences, "sequences", request.method, model)
        scores = self._unless_full(await self._replica.score.remote(sequences, request.method))
        data = [Score.of(index, score) for index, score in enumerate(scores)]
        return ScoresResponse(
            model=model.id, method=request.method, data=data, usage=Usage.of(sequences)
        )

    @api.get("/v1/models", summary="The model and its lineage", tags=["model"])
    async def models(self) -> ModelsResponse:
        """The model being served, and where its weights come from."""
        return ModelsResponse(data=[await self._described()])

    @api.get("/healthz", summary="Liveness", tags=["operations"])
    async def healthz(self) -> dict[str, str]:
        """The gateway is alive."""
        return {"status": "ok"}

    @api.get(
        "/readyz",
        summary="Readiness",
        tags=["operations"],
        responses={503: {"model": ErrorResponse}},
    )
    async def readyz(self) -> dict[str, str]:
        """A replica has just computed an embedding, past the queue."""
        try:
            await asyncio.wait_for(self._replica.probe.remote(), READY_S)
        except Exception:
            raise HTTPException(503, "No replica answers; try again shortly.") from None
        return {"status": "ready"}

    async def _described(self) -> Model:
        if self._model is None:
            described = await self._replica.describe.remote()
            self._model = Model(id=self._settings.name, **described)
        return self._model

    async def _named(self, name: str | None) -> Model:
        model = await self._described()
        if name not in (None, model.id):
            raise refusal(
                "model", f"This endpoint serves {model.id!r}, but {name!r} was asked for.", 404
            )
        return model

    def _check(self, given: str | list[str], param: str, option: str, model: Model) -> list[str]:
        """A request's sequences in plain capitals, or a refusal that names the first bad one."""
        sequences = [given] if isinstance(given, str) else given
        limits = self._settings
        if not sequences:
            raise refusal(param, f"`{param}` needs at least one sequence, but it is empty.")
        if len(sequences) > limits.max_sequences:
            raise refusal(
                param,
                f"`{param}` takes at most {limits.max_sequences} sequences, but "
                f"{len(sequences)} were given; send them in several requests.",
            )
        longest = min(limits.max_residues, model.max_residues)
        plain = []
        for index, sequence in enumerate(sequences):
            try:
                plain.append(decode_residues(encode_residues(sequence)))
            except SequenceError as error:
                raise refusal(param, f"Sequence {index}: {error}") from None
            if (residues := len(plain[-1])) > longest:
                raise refusal(
                    param,
                    f"Sequence {index}: at most {longest} residues are taken, but {residues} were "
                    "given; cut it into domains.",
                )
        cost = sum(tokens_to_compute(option, len(sequence)) for sequence in plain)
        if cost > limits.max_queued_tokens:
            raise refusal(
                param,
                f"`{param}` would take {cost:,} tokens to compute, more than the "
                f"{limits.max_queued_tokens:,} that may wait; send fewer or shorter sequences.",
            )
        return plain

    def _unless_full(self, answers: list[Any] | None) -> list[Any]:
        if answers is None:
            raise overloaded()
        return answers
