"""What clients are told while an endpoint starts, stops or has no replicas."""

import asyncio
import threading
from types import SimpleNamespace

import httpx
import pytest
from in_one_process import Context, Endpoint, Handle, Response, in_turn
from ray.serve.exceptions import BackPressureError
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from serve.gateway import dispatch
from serve.proxy import middlewares
from serve.replica.deployment import Replica
from serve.rpc import raptide_pb2 as pb
from serve.settings import ModelSettings

SEQUENCES = ["MKTAYIAKQRLAGVSERTID"] * 64


class Slow(Replica):
    """Computes one batch at a time, when it is let."""

    def __init__(self, settings):
        super().__init__(settings)
        self.gate = threading.Event()

    def _compute(self, kind, payloads):
        self.gate.wait(30)
        return super()._compute(kind, payloads)


@pytest.mark.parametrize("how", ["json", "arrow", "grpc"])
def test_a_gateway_that_stops_finishes_what_it_took_and_takes_nothing_new(bundle, how):
    """A request of 64 runs is on its way, eight of them sent."""
    settings = ModelSettings(name="raptide", path=str(bundle), max_batch_tokens=22)

    async def main():
        replica = Slow(settings)
        handle = Handle([replica], in_turn())
        endpoint = Endpoint(handle, settings)
        taken = asyncio.create_task(endpoint.embed(how, SEQUENCES))
        while len(handle.works) < 8:
            await asyncio.sleep(0.001)
        drained = asyncio.create_task(endpoint.service.fair.drain())
        await asyncio.sleep(0)
        body = {"input": "MK"}
        refused = [
            await endpoint.http(path, given)
            for path, given in (("/v1/embeddings", body), ("/healthz", None), ("/readyz", None))
        ]
        context = Context({})
        request = pb.EmbedRequest(sequences=["MK"])
        assert [part.arrays async for part in endpoint.rpc.Embed(request, context)] == [[]]
        await asyncio.sleep(0.3)
        assert not drained.done()
        replica.gate.set()
        _, vectors = await taken
        await asyncio.wait_for(drained, 5)
        return refused, context, len(vectors), len(handle.works)

    refused, context, vectors, works = asyncio.run(main())
    assert (vectors, works) == (64, 64)
    for answer in refused:
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "1"
        assert "being stopped" in answer.json()["error"]["message"]
    assert context.code.name == "UNAVAILABLE"


def absent(raised=None):
    """A handle of a deployment that has no replica."""

    async def never():
        await asyncio.sleep(60)
        yield

    def run(work):
        if raised is not None:
            raise raised
        return Response(never(), routed=False)

    handle = Handle([], in_turn())
    handle.run = SimpleNamespace(remote=run)
    handle.describe = SimpleNamespace(remote=lambda: asyncio.sleep(60))
    return handle


def ask(handle, timeout_s="0.1", **options):
    settings = ModelSettings(name="raptide", path="", **options)

    async def main():
        endpoint = Endpoint(handle, settings)
        body = {"input": "MK"}
        return await endpoint.http("/v1/embeddings", body, X_Raptide_Timeout_S=timeout_s)

    return asyncio.run(main())


def test_without_a_replica_it_is_503_and_nobody_is_told_to_send_less():
    answer = ask(absent())
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"
    assert answer.json()["error"] == {
        "type": "unavailable",
        "message": "No replica took it within 0.1 s; try again shortly.",
        "param": None,
    }


def test_what_lasts_too_short_for_any_replica_is_late():
    assert ask(absent(), timeout_s="5e-324").status_code == 504


def test_a_cold_model_that_loads_longer_than_a_request_lasts_says_so():
    answer = ask(absent(), min_replicas=0, max_replicas=1)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "10"
    assert "loading one takes longer than the 0.1 s" in answer.json()["error"]["message"]


def test_a_crowd_before_no_replica_is_no_full_queue():
    crowded = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    assert ask(absent(crowded)).status_code == 503


def test_what_a_replica_has_and_does_not_finish_is_late(bundle, monkeypatch):
    monkeypatch.setattr(dispatch, "FIRST_PAUSE_S", 0.001)
    settings = ModelSettings(name="raptide", path=str(bundle))

    async def main():
        replica = Slow(settings)
        endpoint = Endpoint(Handle([replica], in_turn()), settings)
        answer = await endpoint.http("/v1/embeddings", {"input": "MK"}, X_Raptide_Timeout_S="0.1")
        replica.gate.set()
        return answer

    answer = asyncio.run(main())
    assert answer.status_code == 504
    assert "allow more, or send less" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/nothing", 503, "unavailable"),
        ("/no-gateway", 503, "unavailable"),
        ("/died", 500, "internal"),
        ("/ours", 404, "invalid_request"),
    ],
)
def test_what_serves_proxy_says_is_said_in_our_words(path, status, kind):
    def plain(text, code):
        return lambda request: PlainTextResponse(text, code)

    def ours(request):
        return JSONResponse({"error": {"type": "invalid_request"}}, 404)

    proxy = Starlette(
        routes=[
            Route("/nothing", plain("Path '/nothing' not found. Ping ...", 404)),
            Route("/no-gateway", plain("unavailable", 503)),
            Route("/died", plain("Internal Server Error", 500)),
            Route("/ours", ours),
            Route("/-/routes", plain("404", 404)),
        ],
        middleware=middlewares(),
    )

    async def main():
        transport = httpx.ASGITransport(proxy)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get(path), await client.get("/-/routes")

    answer, own = asyncio.run(main())
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert (own.status_code, own.text) == (404, "404")


def test_no_more_of_a_requests_id_reaches_serve_than_is_kept():
    """Serve's proxy logs it and sends it back."""

    def echo(request):
        return PlainTextResponse(request.headers["X-Request-Id"])

    proxy = Starlette(routes=[Route("/", echo)], middleware=middlewares())

    async def main():
        transport = httpx.ASGITransport(proxy)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            ids = ("abc", "x" * 60_000)
            return [(await client.get("/", headers={"X-Request-Id": each})).text for each in ids]

    assert asyncio.run(main()) == ["abc", "x" * 128]
