"""The HTTP API: one route a call, each a few lines around the service."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp

import raptide
from raptide.alphabet import STANDARD
from serve.calls import Ask, Done
from serve.gateway import refusals, schemas
from serve.gateway.answers import (
    ARROW,
    arrow_arrays,
    arrow_scores,
    lineage_headers,
    rows,
    score_rows,
    usage,
    write_json,
)
from serve.gateway.guard import Guard
from serve.gateway.keys import KeyRing
from serve.gateway.refusals import invalid
from serve.gateway.schemas import ErrorResponse
from serve.gateway.service import Query, Service, Whole

LONGEST_ID = 128
"""Characters of a request's id that are kept; a client may send any number."""

OURS = ("X-Raptide-Timeout-S", "X-Raptide-Weights")
"""Request headers of our own, which pages elsewhere may send, too."""

READY_S = 10.0
"""Seconds a replica may take to show that it is ready."""

STATUSES = (400, 401, 403, 404, 410, 413, 422, 429, 500, 503, 504)
REFUSED: dict[int | str, dict[str, Any]] = {s: {"model": ErrorResponse} for s in STATUSES}
BINARY = {"schema": {"type": "string", "format": "binary"}}
ANSWERS: dict[int | str, dict[str, Any]] = {200: {"content": {ARROW: BINARY}}, **REFUSED}

Timeout = Annotated[
    float | None,
    Header(
        alias="X-Raptide-Timeout-S",
        gt=0,
        description="Seconds after which the answer is of no use: 504 then",
    ),
]


def build_api(service: Service, keys: KeyRing) -> ASGIApp:
    """The whole HTTP application around a service."""
    api = FastAPIOffline(  # its docs need no script from elsewhere
        title="Raptide",
        summary="Protein embeddings and scores from trained checkpoints.",
        description="Send sequences as letters; the answers say which weights they come from. "
        f"`Accept: {ARROW}` streams arrays in binary, which is the way for anything large.",
        version=raptide.__version__,
    )
    refusals.register(api)
    _add_calls(api, service)
    _add_operations(api, service)
    if keys:
        _ask_for_keys(api)
    settings = service.settings
    guard = Guard(api, keys, settings.max_body_bytes, settings.max_body_s, service.metrics)
    if not settings.cors_origins:
        return guard
    return CORSMiddleware(  # around the guard: a page may read refusals, too
        guard,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "Accept", *OURS],
        expose_headers=["X-Raptide-Model", "X-Raptide-Weights", "X-Raptide-Step", "Retry-After"],
    )


def _add_calls(api: FastAPI, service: Service) -> None:
    @api.post(
        "/v1/embeddings",
        summary="Embed sequences",
        tags=["model"],
        response_model=schemas.EmbeddingsResponse,
        responses=ANSWERS,
    )
    async def embeddings(
        body: schemas.EmbeddingsRequest, request: Request, timeout_s: Timeout = None
    ) -> Response:
        """A vector a sequence, or one a residue (`pooling: residue`). OpenAI's client works."""
        if body.layers is not None and not body.layers:
            raise invalid("layers", "`layers` needs at least one layer; the last one is -1.")
        layers = (-1,) if body.layers is None else tuple(body.layers)
        ask = Ask("embed", pooling=body.pooling or "mean", layers=layers)
        if body.dimensions is not None:
            await service.refuse_other_width(body.model, body.dimensions)
        query = _accept(service, request, body.model, ask, body.input, "input", timeout_s)
        return await _arrays(service, request, query, "embedding", body.encoding_format)

    @api.post(
        "/v1/scores",
        summary="Score sequences or variants",
        tags=["model"],
        response_model=schemas.ScoresResponse,
        responses=ANSWERS,
    )
    async def scores(
        body: schemas.ScoresRequest, request: Request, timeout_s: Timeout = None
    ) -> Response:
        """How likely the model finds each sequence, or each variant of one sequence."""
        given, ask = _what_to_score(body)
        query = _accept(
            service, request, body.model, ask, *given, timeout_s, variants=body.variants
        )
        whole = await service.gather(query)
        return _scores(service, request, query, whole, ask.method)

    @api.post(
        "/v1/scan",
        summary="Score every single substitution",
        tags=["model"],
        response_model=schemas.TablesResponse,
        responses=ANSWERS,
    )
    async def scan(
        body: schemas.ScanRequest, request: Request, timeout_s: Timeout = None
    ) -> Response:
        """A row for each residue, a column for each standard one in alphabetical order."""
        ask = Ask("scan", method=body.method or "wt-marginals")
        query = _accept(service, request, body.model, ask, body.sequence, "sequence", timeout_s)
        columns = {"columns": list(STANDARD)}
        return await _arrays(service, request, query, "values", body.encoding_format, columns)

    @api.post(
        "/v1/contacts",
        summary="Predict contacts",
        tags=["model"],
        response_model=schemas.TablesResponse,
        responses=ANSWERS,
    )
    async def contacts(
        body: schemas.SequencesRequest, request: Request, timeout_s: Timeout = None
    ) -> Response:
        """Probability that two residues touch (Cβ within 8 Å); the model needs a contact head."""
        query = _accept(
            service, request, body.model, Ask("contacts"), body.sequences, "sequences", timeout_s
        )
        return await _arrays(service, request, query, "values", body.encoding_format)

    @api.post(
        "/v1/logits",
        summary="Logits of each residue",
        tags=["model"],
        response_model=schemas.TablesResponse,
        responses=ANSWERS,
    )
    async def logits(
        body: schemas.SequencesRequest, request: Request, timeout_s: Timeout = None
    ) -> Response:
        """A row for each residue, a column for each token of the model; nothing is masked."""
        query = _accept(
            service, request, body.model, Ask("logits"), body.sequences, "sequences", timeout_s
        )
        return await _arrays(service, request, query, "values", body.encoding_format)


def _add_operations(api: FastAPI, service: Service) -> None:
    @api.get(
        "/v1/models",
        summary="The models and their lineage",
        tags=["model"],
        response_model=schemas.ModelsResponse,
        responses={status: REFUSED[status] for status in (401, 500, 503)},
    )
    async def models() -> Response:
        """The models being served, and where their weights come from."""
        data = [await _describe(service, name) for name in service.names]
        return JSONResponse({"object": "list", "data": data})

    @api.get(
        "/v1/models/{model}",
        summary="One model and its lineage",
        tags=["model"],
        response_model=schemas.Model,
        responses={status: REFUSED[status] for status in (401, 404, 422, 500, 503)},
    )
    async def model(model: str) -> Response:
        """One of the models being served."""
        return JSONResponse(await _describe(service, service.name_of(model)))

    @api.get(
        "/healthz",
        summary="Liveness",
        tags=["operations"],
        response_model=schemas.Status,
        responses={503: {"model": ErrorResponse}},
    )
    async def healthz() -> dict[str, str]:
        """The gateway is alive, and takes requests."""
        service.fair.refuse_if_stopping()
        return {"status": "ok"}

    @api.get(
        "/readyz",
        summary="Readiness",
        tags=["operations"],
        response_model=schemas.Status,
        responses={503: {"model": ErrorResponse}},
    )
    async def readyz() -> dict[str, str]:
        """A replica of every model has just computed an embedding, past the queue."""
        await service.probe(READY_S)
        return {"status": "ready"}


async def _describe(service: Service, name: str) -> dict[str, Any]:
    fixed = {"id": name, "object": "model", "created": 0, "owned_by": "raptide"}
    return {**fixed, **await service.describe(name)}


def _ask_for_keys(api: FastAPI) -> None:
    """Say in the document that calls take a key; the guard checks it."""
    make: Callable[[], dict[str, Any]] = api.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["key"] = {"type": "http", "scheme": "bearer"}
        for path, operations in document["paths"].items():
            for operation in operations.values() if path.startswith("/v1/") else ():
                operation["security"] = [{"key": []}]
        return document

    api.openapi = openapi  # type: ignore[method-assign]


def _what_to_score(body: schemas.ScoresRequest) -> tuple[tuple[Any, str], Ask]:
    """The sequences with their field, and how to score them."""
    methods: tuple[str, ...]
    if body.variants is None and body.sequence is None:
        if body.sequences is None:
            raise invalid("sequences", "Give `sequences`, or `sequence` with `variants`.")
        methods = ("pseudo-ppl", "one-pass")
        given, call = (body.sequences, "sequences"), "score"
    else:
        if body.variants is None or body.sequence is None or body.sequences is not None:
            raise invalid(
                "variants", "Give `sequence` and `variants` together, and no `sequences` beside."
            )
        methods = ("wt-marginals", "masked-marginals", "pseudo-ppl")
        given, call = (body.sequence, "sequence"), "variants"
    method = body.method or methods[0]
    if method not in methods:
        raise invalid(
            "method",
            f"`method` for {given[1]} is one of {', '.join(methods)}, but {method} was given.",
        )
    return given, Ask(call, method=method)  # type: ignore[arg-type]


def _accept(
    service: Service,
    request: Request,
    model: str | None,
    ask: Ask,
    given: str | list[str],
    param: str,
    timeout_s: float | None,
    variants: list[str] | None = None,
) -> Query:
    """Check a request, count it against its key, and write it down."""
    query = service.query(
        model,
        ask,
        given,
        param,
        timeout_s=timeout_s,
        variants=variants,
        request_id=request.headers.get("X-Request-Id", "")[:LONGEST_ID],
        weights=request.headers.get("X-Raptide-Weights", ""),
    )
    service.admit(request.state.key, query)
    request.state.books.model = query.model
    request.state.books.residues = query.residues
    return query


async def _arrays(
    service: Service,
    request: Request,
    query: Query,
    field: str,
    encoding: str | None,
    extra: dict[str, Any] | None = None,
) -> Response:
    """Arrays as the client wants them."""
    if _wants_arrow(request):
        stream = service.stream(query)
        first = await anext(stream)
        body = arrow_arrays(query.model, len(query.sequences), first, stream)
        return StreamingResponse(
            _closing(body, stream), media_type=ARROW, headers=lineage_headers(query.model, first)
        )
    whole = await service.gather(query)
    tree = {
        "object": "list",
        "model": query.model,
        "data": rows(whole.arrays, field, encoding or "float"),
        **(extra or {}),
        "usage": usage(query.residues),
    }
    return _json(service, query, whole, tree)


def _scores(
    service: Service, request: Request, query: Query, whole: Whole, method: str
) -> Response:
    scores = [float(score) for array in whole.arrays for score in array.reshape(-1)]
    if _wants_arrow(request):
        content = arrow_scores(query.model, whole.weights, scores)
        return Response(content, media_type=ARROW, headers=lineage_headers(query.model, whole))
    of_sequences = not (query.variants or query.relative)
    tree = {
        "object": "list",
        "model": query.model,
        "method": method,
        "data": score_rows(scores, of_sequences),
        "usage": usage(query.residues),
    }
    return _json(service, query, whole, tree)


def _json(service: Service, query: Query, whole: Whole, tree: dict[str, Any]) -> Response:
    started = time.monotonic()
    content = write_json(tree)
    service.metrics.serialise.observe(max(time.monotonic() - started, 1e-6))
    return Response(
        content, media_type="application/json", headers=lineage_headers(query.model, whole)
    )


async def _closing(body: AsyncIterator[bytes], stream: AsyncIterator[Done]) -> AsyncIterator[bytes]:
    """The body; what is still being computed is called off when the client leaves."""
    try:
        async for chunk in body:
            yield chunk
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


def _wants_arrow(request: Request) -> bool:
    return ARROW in request.headers.get("Accept", "")
