"""The gateway: HTTP in front of the replicas. Validates, forwards, shapes answers and errors."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException as StarletteHTTPException

import raptide
from raptide.alphabet import encode_residues
from raptide.errors import SequenceError
from serve.schemas import (
    Embedding,
    EmbeddingsRequest,
    EmbeddingsResponse,
    ErrorDetail,
    ErrorResponse,
    Model,
    ModelsResponse,
    Score,
    ScoresRequest,
    ScoresResponse,
    Usage,
)
from serve.settings import ServeSettings

RETRY_AFTER_S = 1

api = FastAPI(
    title="Raptide",
    summary="Protein embeddings and scores from one trained checkpoint.",
    version=raptide.__version__,
    responses={422: {"model": ErrorResponse}, 429: {"model": ErrorResponse}},
)


class Gateway:
    """The HTTP face of one model."""

    def __init__(self, settings: ServeSettings, replica: DeploymentHandle) -> None:
        self._settings = settings
        self._replica = replica
        self._model: Model | None = None

    @api.post("/v1/embeddings")
    async def embeddings(self, request: EmbeddingsRequest) -> EmbeddingsResponse:
        """One vector a sequence, or one a residue with `pooling: residue`."""
        model = await self._named(request.model)
        sequences = self._check(request.input, "input", model)
        arrays = self._unless_full(await self._replica.embed.remote(sequences, request.pooling))
        data = [
            Embedding(
                index=index, embedding=_encode(array, request.encoding_format), shape=[*array.shape]
            )
            for index, array in enumerate(arrays)
        ]
        return EmbeddingsResponse(model=model.id, data=data, usage=_usage(sequences))

    @api.post("/v1/scores")
    async def scores(self, request: ScoresRequest) -> ScoresResponse:
        """How likely the model finds each sequence."""
        model = await self._named(request.model)
        sequences = self._check(request.sequences, "sequences", model)
        scores = self._unless_full(await self._replica.score.remote(sequences, request.method))
        data = [
            Score(index=index, score=score, perplexity=math.exp(-score))
            for index, score in enumerate(scores)
        ]
        return ScoresResponse(
            model=model.id, method=request.method, data=data, usage=_usage(sequences)
        )

    @api.get("/v1/models")
    async def models(self) -> ModelsResponse:
        """The model being served, and where its weights come from."""
        return ModelsResponse(data=[await self._described()])

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """The gateway is alive."""
        return {"status": "ok"}

    @api.get("/readyz", responses={503: {"model": ErrorResponse}})
    async def readyz(self) -> dict[str, str]:
        """A replica has just computed an embedding."""
        try:
            await self._replica.embed.remote(["M"], "mean")
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
            raise _refusal(
                "model", f"This endpoint serves {model.id!r}, but {name!r} was asked for.", 404
            )
        return model

    def _check(self, given: str | list[str], param: str, model: Model) -> list[str]:
        """The sequences of a request, or a refusal that names the first bad one."""
        sequences = [given] if isinstance(given, str) else given
        limits = self._settings
        if not sequences:
            raise _refusal(param, f"`{param}` needs at least one sequence, but it is empty.")
        if len(sequences) > limits.max_sequences:
            raise _refusal(
                param,
                f"`{param}` takes at most {limits.max_sequences} sequences, but "
                f"{len(sequences)} were given; send them in several requests.",
            )
        longest = min(limits.max_residues, model.max_residues)
        for index, sequence in enumerate(sequences):
            try:
                residues = len(encode_residues(sequence))
            except SequenceError as error:
                raise _refusal(param, f"Sequence {index}: {error}") from None
            if residues > longest:
                raise _refusal(
                    param,
                    f"Sequence {index}: at most {longest} residues are taken, but {residues} were "
                    "given; cut it into domains.",
                )
        return sequences

    def _unless_full(self, answers: list[Any] | None) -> list[Any]:
        if answers is None:
            raise HTTPException(
                429,
                detail={"type": "overloaded", "message": "The queue is full; try again shortly."},
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        return answers


def _refusal(param: str, message: str, status: int = 422) -> HTTPException:
    detail = {"type": "invalid_request", "message": message, "param": param}
    return HTTPException(status, detail=detail)


def _encode(array: np.ndarray, encoding_format: str) -> Any:
    if encoding_format == "base64":
        return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()
    return array.tolist()


def _usage(sequences: list[str]) -> Usage:
    residues = sum(map(len, sequences))
    return Usage(prompt_tokens=residues, total_tokens=residues)


@api.exception_handler(StarletteHTTPException)
async def _http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
    detail: Any = error.detail
    if not isinstance(detail, dict):
        detail = {"type": "error", "message": str(detail)}
    body = ErrorResponse(error=ErrorDetail(**detail))
    return JSONResponse(body.model_dump(), error.status_code, headers=error.headers)


@api.exception_handler(RequestValidationError)
async def _validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"] if part != "body") or "body"
    detail = {
        "type": "invalid_request",
        "message": f"`{field}`: {problem['msg'][:1].lower()}{problem['msg'][1:]}.",
        "param": field,
    }
    return JSONResponse(ErrorResponse(error=ErrorDetail(**detail)).model_dump(), 422)
