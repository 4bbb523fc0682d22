"""The gRPC methods: each a few lines around the service, like the HTTP routes of api.py."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, NoReturn, get_args

import grpc
import numpy as np
from ray.serve.grpc_util import RayServegRPCContext

from raptide.methods import Pooling, ScanMethod, ScoreMethod, VariantMethod
from serve.calls import Ask, Done
from serve.gateway.keys import KeyRing
from serve.gateway.refusals import Refusal, internal, invalid
from serve.gateway.service import Query, Service, Whole
from serve.rpc import raptide_pb2 as pb

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    410: grpc.StatusCode.FAILED_PRECONDITION,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class RpcError(RuntimeError):
    """What Serve's proxy turns into a status; its text is the client's."""


class RpcMethods:
    """Methods of the gateway, named as in raptide.proto."""

    _service: Service
    _keys: KeyRing

    async def Embed(self, request: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
        layers = tuple(request.layers) or (-1,)
        pooling = request.pooling or "mean"
        async for part in self._arrays(
            grpc_context,
            request.model,
            lambda: Ask("embed", pooling=_one_of(pooling, Pooling, "pooling"), layers=layers),
            list(request.sequences),
            "sequences",
        ):
            yield part

    async def Logits(self, request: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
        given = list(request.sequences)
        async for part in self._arrays(
            grpc_context, request.model, lambda: Ask("logits"), given, "sequences"
        ):
            yield part

    async def Contacts(self, request: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
        given = list(request.sequences)
        async for part in self._arrays(
            grpc_context, request.model, lambda: Ask("contacts"), given, "sequences"
        ):
            yield part

    async def Scan(self, request: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
        method = request.method or "wt-marginals"
        async for part in self._arrays(
            grpc_context,
            request.model,
            lambda: Ask("scan", method=_one_of(method, ScanMethod, "method")),
            request.sequence,
            "sequence",
        ):
            yield part

    async def Score(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        try:
            ask, given, param = _what_to_score(request)
            variants = list(request.variants) or None
            query = self._accept(grpc_context, request.model, ask, given, param, variants)
            whole = await self._service.gather(query)
        except Exception as error:
            _refuse(grpc_context, error)
        scores = [float(score) for array in whole.arrays for score in array.reshape(-1)]
        return pb.Scores(source=_source(query, whole), scores=scores)

    async def ListModels(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        try:
            self._authorise(grpc_context)
            names = self._service.names
            found = [{"id": name, **await self._service.describe(name)} for name in names]
        except Exception as error:
            _refuse(grpc_context, error)
        return pb.Models(json=[json.dumps(each) for each in found])

    async def _arrays(
        self,
        context: RayServegRPCContext,
        model: str,
        ask: Any,
        given: str | list[str],
        param: str,
    ) -> AsyncIterator[Any]:
        """Answers run by run, all from one version of the model."""
        index = 0
        try:
            query = self._accept(context, model, ask(), given, param)
            async for done in self._service.stream(query):
                arrays = [_array(index + i, array) for i, array in enumerate(done.arrays)]
                index += len(arrays)
                yield pb.Arrays(source=_source(query, done), arrays=arrays)
        except Exception as error:
            _refuse(context, error)

    def _accept(
        self,
        context: RayServegRPCContext,
        model: str,
        ask: Ask,
        given: str | list[str],
        param: str,
        variants: list[str] | None = None,
    ) -> Query:
        metadata = _metadata(context)
        key = self._authorise(context)
        try:
            timeout_s = float(metadata.get("x-raptide-timeout-s", "inf"))
        except ValueError:
            raise invalid("x-raptide-timeout-s", "A timeout is a number of seconds.") from None
        weights = metadata.get("x-raptide-weights", "")
        query = self._service.query(
            model or None,
            ask,
            given,
            param,
            timeout_s=timeout_s,
            variants=variants,
            weights=weights,
        )
        self._service.admit(key, query)
        return query

    def _authorise(self, context: RayServegRPCContext) -> Any:
        return self._keys.check(_metadata(context).get("authorization", ""))


def _what_to_score(request: Any) -> tuple[Ask, str | list[str], str]:
    if not request.variants:
        method = _one_of(request.method or "pseudo-ppl", ScoreMethod, "method")
        return Ask("score", method=method), list(request.sequences), "sequences"
    if len(request.sequences) != 1:
        raise invalid("sequences", "Variants are those of exactly one sequence.")
    method = _one_of(request.method or "wt-marginals", VariantMethod, "method")
    return Ask("variants", method=method), request.sequences[0], "sequence"


def _one_of(value: str, choices: Any, param: str) -> str:
    if value not in get_args(choices):
        raise invalid(param, f"`{param}` is one of {', '.join(get_args(choices))}.")
    return value


def _metadata(context: RayServegRPCContext) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in context.invocation_metadata()}


def _array(index: int, array: np.ndarray) -> Any:
    return pb.Array(
        index=index, shape=array.shape, values=np.ascontiguousarray(array, "<f4").tobytes()
    )


def _source(query: Query, source: Done | Whole) -> Any:
    step = -1 if source.step is None else source.step
    return pb.Source(model=query.model, weights=source.weights, step=step)


def _refuse(context: RayServegRPCContext, error: Exception) -> NoReturn:
    """Raise what Serve's proxy answers with the right status."""
    refusal = error if isinstance(error, Refusal) else internal()
    context.set_code(CODES.get(refusal.status, grpc.StatusCode.INTERNAL))
    context.set_details(refusal.message)
    raise RpcError(refusal.message) from None
