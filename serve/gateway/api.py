"""The HTTP API: one route a call, each a few lines around the service."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp

import raptide
from raptide.alphabet import STANDARD
from serve.calls import Ask, Done
from serve.gateway import refusals, schemas
from serve.gateway.answers import (
    SMALL_BYTES,
    arrow_arrays,
    arrow_scores,
    in_thread,
    joined,
    json_arrays,
    lineage_headers,
    score_rows,
    usage,
    write_json,
)
from serve.gateway.guard import Guard
from serve.gateway.keys import KeyRing
from serve.gateway.refusals import absent, invalid
from serve.gateway.schemas import ErrorResponse
from serve.gateway.service import Query, Service, Whole
from serve.gateway.sizes import ARROW, Encoding
from serve.gateway.standing import READY_S
from serve.gateway.terms import OURS, AskedTerms, Terms

MODEL = {"object": "model", "created": 0, "owned_by": "raptide"}
"""As OpenAI's clients want them."""

STATUSES = (400, 401, 403, 404, 410, 413, 422, 429, 500, 503, 504)
REFUSED: dict[int | str, dict[str, Any]] = {s: {"model": ErrorResponse} for s in STATUSES}
BINARY = {"schema": {"type": "string", "format": "binary"}}
ANSWERS: dict[int | str, dict[str, Any]] = {200: {"content": {ARROW: BINARY}}, **REFUSED}


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
        body: schemas.EmbeddingsRequest, request: Request, terms: AskedTerms
    ) -> Response:
        """A vector a sequence, or one a residue (`pooling: residue`). OpenAI's client works."""
        if body.layers is not None and not body.layers:
            raise invalid("layers", "`layers` needs at least one layer; the last one is -1.")
        layers = (-1,) if body.layers is None else tuple(body.layers)
        ask = Ask("embed", pooling=body.pooling or "mean", layers=layers)
        if body.dimensions is not None:
            await service.refuse_other_width(body.model, body.dimensions)
        encoding = _encoding(request, body.encoding_format)
        query = await _accept(
            service, request, body.model, ask, body.input, "input", terms, encoding
        )
        return await _arrays(service, request, query, "embedding", encoding)

    @api.post(
        "/v1/scores",
        summary="Score sequences or variants",
        tags=["model"],
        response_model=schemas.ScoresResponse,
        responses=ANSWERS,
    )
    async def scores(body: schemas.ScoresRequest, request: Request, terms: AskedTerms) -> Response:
        """How likely the model finds each sequence, or each variant of one sequence."""
        given, ask = _what_to_score(body)
        encoding = _encoding(request, None)
        query = await _accept(
            service, request, body.model, ask, *given, terms, encoding, variants=body.variants
        )
        whole = await service.gather(query)
        return _scores(service, query, whole, ask.method, encoding == "arrow")

    @api.post(
        "/v1/scan",
        summary="Score every single substitution",
        tags=["model"],
        response_model=schemas.TablesResponse,
        responses=ANSWERS,
    )
    async def scan(body: schemas.ScanRequest, request: Request, terms: AskedTerms) -> Response:
        """A row for each residue, a column for each standard one in alphabetical order."""
        ask = Ask("scan", method=body.method or "wt-marginals")
        encoding = _encoding(request, body.encoding_format)
        query = await _accept(
            service, request, body.model, ask, body.sequence, "sequence", terms, encoding
        )
        columns = {"columns": list(STANDARD)}
        return await _arrays(service, request, query, "values", encoding, columns)

    @api.post(
        "/v1/contacts",
        summary="Predict contacts",
        tags=["model"],
        response_model=schemas.TablesResponse,
        responses=ANSWERS,
    )
    async def contacts(
        body: schemas.SequencesRequest, request: Request, terms: AskedTerms
    ) -> Response:
        """Probability that two residues touch (Cβ within 8 Å); the model needs a contact head."""
        encoding, ask = _encoding(request, body.encoding_format), Ask("contacts")
        query = await _accept(
            service, request, body.model, ask, body.sequences, "sequences", terms, encoding
        )
        return await _arrays(service, request, query, "values", encoding)

    @api.post(
        "/v1/logits",
        summary="Logits of each residue",
        tags=["model"],
        response_model=schemas.TablesResponse,
        responses=ANSWERS,
    )
    async def logits(body: schemas.LogitsRequest, request: Request, terms: AskedTerms) -> Response:
        """A row for each residue, a column for each token of the model; nothing is masked.

        With `masked_positions` a row for each of these, masked in turn: what pseudo perplexities
        and masked marginals are made of.
        """
        encoding, masked = _encoding(request, body.encoding_format), body.masked_positions
        ask = Ask("logits") if masked is None else Ask("masked", "masked-marginals")
        query = await _accept(
            *(service, request, body.model, ask, body.sequences, "sequences", terms, encoding),
            positions=masked,
        )
        return await _arrays(service, request, query, "values", encoding)


def _add_operations(api: FastAPI, service: Service) -> None:
    @api.get(
        "/v1/models",
        summary="The models and their lineage",
        tags=["model"],
        response_model=schemas.ModelsResponse,
        responses={status: REFUSED[status] for status in (401, 500, 503)},
    )
    async def models() -> Response:
        """The models, how they stand, and where their weights come from; none is started."""
        data = [{**MODEL, **each} for each in await service.standing.describe()]
        return JSONResponse({"object": "list", "data": data})

    @api.get(
        "/v1/models/{model}",
        summary="One model and its lineage",
        tags=["model"],
        response_model=schemas.Model,
        responses={status: REFUSED[status] for status in (401, 404, 422, 500, 503)},
    )
    async def model(model: str) -> Response:
        """One of the models; an idle one is started."""
        name = service.name_of(model)
        found = await service.describe(name)
        return JSONResponse({**MODEL, "id": name, "state": "ready", **found})

    @api.get(
        "/v1/status",
        summary="Replicas, queues and versions",
        tags=["operations"],
        response_model=schemas.StatusResponse,
        responses={status: REFUSED[status] for status in (401, 500, 503)},
    )
    async def status() -> Response:
        """How many replicas each model has, how busy they are and what they serve."""
        return JSONResponse({"object": "list", "data": await service.standing.status()})

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
        response_model=schemas.Readiness,
        responses={503: {"model": schemas.Unready}},
    )
    async def readyz() -> Response:
        """A replica has just computed an embedding, past its queue: which models' did. 503 where
        none of those does that always have a replica."""
        service.fair.refuse_if_stopping()
        models = await service.standing.readiness()
        if service.standing.serves(models):
            return JSONResponse({"status": "ready", "models": models})
        refusal = absent(READY_S, cold=False)
        return JSONResponse({**refusal.body(), "models": models}, 503, headers=refusal.headers())


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


async def _accept(
    service: Service,
    request: Request,
    model: str | None,
    ask: Ask,
    given: str | list[str],
    param: str,
    terms: Terms,
    encoding: Encoding,
    variants: list[str] | None = None,
    positions: list[list[int]] | None = None,
) -> Query:
    """Check a request, count it against its key, write it down, and wait for room to answer it."""
    books = request.state.books
    query = service.query(
        model,
        ask,
        given,
        param,
        timeout_s=terms.timeout_s,
        variants=variants,
        positions=positions,
        request_id=terms.request_id,
        weights=terms.weights,
    )
    books.model = query.model
    await service.weigh(query, encoding)
    service.admit(books.key, query)
    books.residues = query.residues
    books.lease = await service.hold(query, streamed=encoding == "arrow")
    return query


def _encoding(request: Request, wanted: schemas.Encoding | None) -> Encoding:
    """How the client wants numbers."""
    if ARROW in request.headers.get("Accept", ""):
        return "arrow"
    return wanted or "float"


async def _arrays(
    service: Service,
    request: Request,
    query: Query,
    field: str,
    encoding: Encoding,
    extra: dict[str, Any] | None = None,
) -> Response:
    """Arrays as the client wants them."""
    observe = service.metrics.serialised
    if encoding == "arrow":
        stream = service.stream(query)
        first = await anext(stream)
        body = arrow_arrays(query.model, len(query.sequences), first, stream, observe)
        return StreamingResponse(
            _closing(body, stream), media_type=ARROW, headers=lineage_headers(query.model, first)
        )
    whole = await service.gather(query)
    head = {"object": "list", "model": query.model}
    tail = {**(extra or {}), "usage": usage(query.residues)}
    headers = lineage_headers(query.model, whole)
    pieces = json_arrays(head, whole.arrays, field, encoding, tail)
    if sum(query.answer_bytes) > SMALL_BYTES:
        streamed = in_thread(joined(pieces), observe)
        return StreamingResponse(streamed, media_type="application/json", headers=headers)
    started = time.monotonic()
    content = b"".join(pieces)
    observe(time.monotonic() - started)
    return Response(content, media_type="application/json", headers=headers)


def _scores(service: Service, query: Query, whole: Whole, method: str, arrow: bool) -> Response:
    scores = [float(score) for array in whole.arrays for score in array.reshape(-1)]
    headers = lineage_headers(query.model, whole)
    started = time.monotonic()
    if arrow:
        content = arrow_scores(query.model, whole.weights, scores)
    else:
        of_sequences = not (query.variants or query.relative)
        tree = {
            "object": "list",
            "model": query.model,
            "method": method,
            "data": score_rows(scores, of_sequences),
            "usage": usage(query.residues),
        }
        content = write_json(tree)
    service.metrics.serialised(time.monotonic() - started)
    return Response(content, media_type=ARROW if arrow else "application/json", headers=headers)


async def _closing(body: AsyncIterator[bytes], stream: AsyncIterator[Done]) -> AsyncIterator[bytes]:
    """The body; what is still being computed is called off when the client leaves."""
    try:
        async for chunk in body:
            yield chunk
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
