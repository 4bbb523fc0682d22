"""The gRPC methods: each a few lines around the service, like the HTTP routes of api.py.

Requests may come as bytes (serve/rpc/service.py), which are parsed once their key has been checked.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, get_args

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from ray.serve.grpc_util import RayServegRPCContext

from raptide.methods import Pooling, ScanMethod, ScoreMethod, VariantMethod
from serve.calls import PATHS, Ask, Call, Done
from serve.gateway.books import Books
from serve.gateway.keys import KeyRing
from serve.gateway.refusals import Refusal, internal, invalid
from serve.gateway.service import Query, Service, Whole
from serve.rpc import raptide_pb2 as pb

CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    410: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Of other statuses, which say what is wrong with the request: INVALID_ARGUMENT."""

MESSAGE_BYTES = 2_900_000
"""Values in one message; with what is around them it stays below 3 MB, and gRPC takes 4."""

ARRAY_BYTES = 100
"""What is around the values of one array."""

Asked = tuple[Ask, str | list[str], str]
"""What is asked, of which sequences, in which field."""


class RpcMethods:
    """Methods of the gateway, named as in raptide.proto.

    A refusal is no exception: Serve would write its text, which may repeat what was sent, into
    several logs. Its status stands in the context, which Serve passes on with a message.
    """

    _service: Service
    _keys: KeyRing

    async def Embed(self, request: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
        def asked(message: Any) -> Asked:
            pooling = _one_of(message.pooling or "mean", Pooling, "pooling")
            layers = tuple(message.layers) or (-1,)
            ask = Ask("embed", pooling=pooling, layers=layers)
            return ask, list(message.sequences), "sequences"

        async for part in self._arrays(grpc_context, "embed", request, pb.EmbedRequest, asked):
            yield part

    async def Logits(self, request: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
        def asked(message: Any) -> Asked:
            masked = message.masked_positions
            ask = Ask("masked", "masked-marginals") if masked else Ask("logits")
            return ask, list(message.sequences), "sequences"

        async for part in self._arrays(grpc_context, "logits", request, pb.LogitsRequest, asked):
            yield part

    async def Contacts(self, request: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
        def asked(message: Any) -> Asked:
            return Ask("contacts"), list(message.sequences), "sequences"

        kind = pb.SequencesRequest
        async for part in self._arrays(grpc_context, "contacts", request, kind, asked):
            yield part

    async def Scan(self, request: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
        def asked(message: Any) -> Asked:
            method = _one_of(message.method or "wt-marginals", ScanMethod, "method")
            return Ask("scan", method=method), message.sequence, "sequence"

        async for part in self._arrays(grpc_context, "scan", request, pb.ScanRequest, asked):
            yield part

    async def Score(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        with self._booked(grpc_context, PATHS["score"]) as books:
            message = self._open(request, pb.ScoreRequest, grpc_context, books)
            asked = _what_to_score(message)
            query = await self._accept(grpc_context, books, message, asked, streamed=False)
            whole = await self._service.gather(query)
            scores = [float(score) for array in whole.arrays for score in array.reshape(-1)]
            answer = pb.Scores(source=_source(query, whole), scores=scores)
            books.complete, books.status = True, 200
            return answer
        return pb.Scores()

    async def ListModels(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        with self._booked(grpc_context, "models") as books:
            self._open(request, pb.ListModelsRequest, grpc_context, books)
            found = await self._service.standing.describe()
            answer = pb.Models(json=[json.dumps(each) for each in found])
            books.complete, books.status = True, 200
            return answer
        return pb.Models()

    async def _arrays(
        self,
        context: RayServegRPCContext,
        call: Call,
        request: Any,
        kind: Any,
        asked: Callable[[Any], Asked],
    ) -> AsyncIterator[Any]:
        """Answers run by run, all from one version of the model."""
        with self._booked(context, PATHS[call]) as books:
            message = self._open(request, kind, context, books)
            query = await self._accept(context, books, message, asked(message), streamed=True)
            index = 0
            stream = self._service.stream(query)
            async with contextlib.aclosing(stream):  # type: ignore[type-var]
                async for done in stream:
                    for arrays in _messages(index, list(done.arrays)):
                        yield pb.Arrays(source=_source(query, done), arrays=arrays)
                    index += len(done.arrays)
            books.complete, books.status = True, 200
        if not books.complete:
            yield pb.Arrays()

    @contextlib.contextmanager
    def _booked(self, context: RayServegRPCContext, path: str) -> Iterator[Books]:
        """One request in the books; what is raised within becomes its status."""
        books = Books(self._service.metrics, "grpc")
        books.call = path
        try:
            yield books
        except Refusal as refusal:
            _refuse(context, books, refusal)
        except Exception as error:
            books.report(error)
            _refuse(context, books, internal())
        finally:
            books.close()

    def _open(self, request: Any, kind: Any, context: RayServegRPCContext, books: Books) -> Any:
        """The message, once its key has been found valid."""
        books.key = self._keys.check(_metadata(context).get("authorization", ""))
        size = len(request) if isinstance(request, bytes) else request.ByteSize()
        if size > (most := self._service.settings.max_body_bytes):
            raise invalid(
                None,
                f"A request holds at most {most:,} bytes, but this one has {size:,}; send fewer "
                "sequences at once.",
                413,
            )
        if not isinstance(request, bytes):
            return request
        try:
            return kind.FromString(request)
        except DecodeError:
            name = kind.DESCRIPTOR.name
            raise invalid(
                None, f"The message is no {name}; make clients from this raptide.proto.", 400
            ) from None

    async def _accept(
        self,
        context: RayServegRPCContext,
        books: Books,
        message: Any,
        asked: Asked,
        *,
        streamed: bool,
    ) -> Query:
        """Check a request, count it against its key, write it down, and wait for room for it."""
        metadata = _metadata(context)
        query = self._service.query(
            message.model or None,
            *asked,
            timeout_s=_timeout(metadata),
            variants=list(getattr(message, "variants", ())) or None,
            positions=_positions(message),
            request_id=metadata.get("request_id", ""),
            weights=metadata.get("x-raptide-weights", ""),
        )
        books.model = query.model
        await self._service.weigh(query, "arrow")
        if not streamed and 2 * sum(query.answer_bytes) > MESSAGE_BYTES:  # as float64
            raise invalid(query.param, "One message cannot hold so many scores; ask for fewer.")
        self._service.admit(books.key, query)
        books.residues = query.residues
        books.lease = await self._service.hold(query, streamed=streamed)
        return query


def _what_to_score(message: Any) -> Asked:
    if not message.variants:
        method = _one_of(message.method or "pseudo-ppl", ScoreMethod, "method")
        return Ask("score", method=method), list(message.sequences), "sequences"
    if len(message.sequences) != 1:
        raise invalid("sequences", "Variants are those of exactly one sequence.")
    method = _one_of(message.method or "wt-marginals", VariantMethod, "method")
    return Ask("variants", method=method), message.sequences[0], "sequence"


def _positions(message: Any) -> list[list[int]] | None:
    given = getattr(message, "masked_positions", ())
    return [list(each.positions) for each in given] or None


def _one_of(value: str, choices: Any, param: str) -> Any:
    if value not in get_args(choices):
        raise invalid(param, f"`{param}` is one of {', '.join(get_args(choices))}.")
    return value


def _metadata(context: RayServegRPCContext) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in context.invocation_metadata()}


def _timeout(metadata: dict[str, str]) -> float | None:
    given = metadata.get("x-raptide-timeout-s")
    if given is None:
        return None
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not timeout_s > 0:
        raise invalid(
            "x-raptide-timeout-s",
            f"`x-raptide-timeout-s` is a number of seconds above 0, but {given[:20]!r} was given.",
        )
    return timeout_s


def _messages(first: int, arrays: list[np.ndarray]) -> Iterator[list[Any]]:
    """The arrays as lists of parts, none of them above MESSAGE_BYTES.

    Args:
        first: the index of the first one.
    """
    held: list[Any] = []
    size = 0
    for index, array in enumerate(arrays, first):
        flat = np.ascontiguousarray(array, "<f4").reshape(-1)
        step = (MESSAGE_BYTES - ARRAY_BYTES) // flat.itemsize
        for start in range(0, len(flat), step):
            values = flat[start : start + step].tobytes()
            if size + len(values) + ARRAY_BYTES > MESSAGE_BYTES:
                yield held
                held, size = [], 0
            held.append(pb.Array(index=index, shape=array.shape, values=values, offset=start))
            size += len(values) + ARRAY_BYTES
    yield held


def _source(query: Query, source: Done | Whole) -> Any:
    step = -1 if source.step is None else source.step
    return pb.Source(model=query.model, weights=source.weights, step=step)


def _refuse(context: RayServegRPCContext, books: Books, refusal: Refusal) -> None:
    """What the client is told, and what is written down."""
    books.refuse(refusal)
    context.set_code(CODES.get(refusal.status, grpc.StatusCode.INVALID_ARGUMENT))
    context.set_details(refusal.message)
    if wait := refusal.headers().get("Retry-After"):
        context.set_trailing_metadata([("retry-after", wait)])
