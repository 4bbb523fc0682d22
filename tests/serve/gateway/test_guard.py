"""The guard by itself: bodies that never end, answers that break, pages that may read refusals."""

import asyncio
import json
import time
from types import SimpleNamespace

import fake_replicas
import httpx
import large_answer
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.middleware.cors import CORSMiddleware

from serve.calls import Refused
from serve.gateway import refusals
from serve.gateway.api import build_api
from serve.gateway.guard import Guard
from serve.gateway.keys import KeyRing, make_key


class Counter:
    def __init__(self):
        self.seen = []

    def inc(self, value=1, tags=None):
        self.seen.append(tags)

    observe = inc


@pytest.fixture
def metrics():
    names = ("requests", "errors", "request", "residues")
    return SimpleNamespace(**{name: Counter() for name in names})


@pytest.fixture
def ring(tmp_path):
    key, line = make_key("a")
    (tmp_path / "keys").write_text(line)
    return KeyRing(tmp_path / "keys"), {"Authorization": f"Bearer {key}"}


@pytest.fixture
def app():
    api = FastAPI()
    refusals.register(api)

    @api.get("/healthz")
    @api.post("/healthz")
    async def health():
        return {"status": "ok"}

    @api.post("/v1/echo")
    async def echo(body: dict):
        return body

    @api.post("/v1/fails")
    async def fails():
        raise ZeroDivisionError("MKTAYI is secret")

    @api.post("/v1/breaks")
    async def breaks():
        async def parts():
            yield b"half"
            raise ZeroDivisionError("MKTAYI is secret")

        return StreamingResponse(parts())

    return api


def ask(app, path, content=b"{}", headers=None, method="POST"):
    async def call():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            kind = {"Content-Type": "application/json"}
            return await client.request(
                method, path, content=content, headers=kind | (headers or {})
            )

    return asyncio.run(call())


async def endless():
    yield b"{"
    await asyncio.sleep(60)


def test_a_body_that_never_ends_holds_nobody_for_longer_than_allowed(app, ring, metrics):
    keys, headers = ring
    guard = Guard(app, keys, 1000, 0.2, metrics)
    began = time.monotonic()
    answer = ask(guard, "/v1/echo", endless(), headers)
    assert answer.status_code == 408
    assert "within 0.2 s" in answer.json()["error"]["message"]
    assert time.monotonic() - began < 30
    assert metrics.errors.seen == [{"type": "invalid_request"}]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_health_waits_for_no_body_and_takes_no_key(app, ring, metrics, method):
    guard = Guard(app, ring[0], 1000, 50.0, metrics)
    began = time.monotonic()
    answer = ask(guard, "/healthz", endless(), method=method)
    assert answer.json() == {"status": "ok"}
    assert time.monotonic() - began < 30


def test_what_nobody_foresaw_is_our_own_500_counted_once_and_repeats_nothing(
    app, ring, metrics, caplog
):
    keys, headers = ring
    answer = ask(Guard(app, keys, 1000, 5.0, metrics), "/v1/fails", headers=headers)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "internal"
    assert metrics.errors.seen == [{"type": "internal"}]
    assert [tags["status"] for tags in metrics.requests.seen] == ["500"]
    lines = [record.getMessage() for record in caplog.records if "failed with" in record.msg]
    assert len(lines) == 1
    assert "ZeroDivisionError" in lines[0]
    assert "test_guard.py" in lines[0]
    assert "MKTAYI" not in caplog.text


def test_an_answer_that_breaks_off_does_not_look_whole(app, ring, metrics):
    keys, headers = ring

    async def call():
        sent = []

        async def send(message):
            sent.append(message)

        waiting = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            return waiting.pop() if waiting else await asyncio.sleep(60)

        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/v1/breaks", "headers": raw}
        scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http"}
        with pytest.raises(RuntimeError, match="broke off"):
            await Guard(app, keys, 1000, 5.0, metrics)(scope, receive, send)
        return sent

    sent = asyncio.run(call())
    assert sent[-1].get("more_body") is True
    assert [tags["status"] for tags in metrics.requests.seen] == ["500"], "not 200, as it began"
    assert metrics.errors.seen == [{"type": "internal"}]


def test_an_arrow_stream_whose_later_run_is_refused_counts_as_that():
    replicas = fake_replicas.FakeReplicas(failure=Refused("deadline"), fails_at=3)
    app, service = fake_replicas.make_app(replicas)
    body = {"input": ["M" * 4000] * 5, "pooling": "residue"}

    async def discard(message):
        pass

    with pytest.raises(RuntimeError, match="broke off"):
        asyncio.run(large_answer.post(app, body, large_answer.ARROW, discard))
    assert dict(service.metrics["requests"].seen) == {("m", "embeddings", "504"): 1}
    assert dict(service.metrics["errors"].seen) == {("deadline",): 1}
    assert service._ledger.held_bytes == 0


def test_who_leaves_in_the_middle_of_an_answer_is_counted_as_gone():
    replicas = fake_replicas.FakeReplicas()
    app, service = fake_replicas.make_app(replicas)
    body = {"input": ["M" * 4000] * 5, "pooling": "residue"}

    async def call():
        begun = asyncio.Event()

        async def hang(message):
            begun.set()
            if message.get("body"):
                await asyncio.sleep(60)

        task = asyncio.create_task(large_answer.post(app, body, large_answer.ARROW, hang))
        await begun.wait()
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(call())
    assert dict(service.metrics["requests"].seen) == {("m", "embeddings", "499"): 1}
    assert dict(service.metrics["errors"].seen) == {("disconnected",): 1}
    assert service._ledger.held_bytes == 0


def test_nothing_that_a_client_makes_up_becomes_a_label():
    replicas = fake_replicas.FakeReplicas()
    app, service = fake_replicas.make_app(replicas)
    for path in ("models", "models/m", f"models/{'x' * 5000}", "y" * 5000):
        ask(app, f"/v1/{path}", method="GET")
    assert dict(service.metrics["requests"].seen) == {
        ("", "models", "200"): 2,
        ("", "models", "404"): 1,
        ("", "other", "404"): 1,
    }


@pytest.mark.parametrize(
    ("path", "body", "headers", "kind"),
    [
        ("embeddings", {"input": "M1"}, {}, "invalid_request"),
        ("embeddings", {"inputs": "MK"}, {}, "invalid_request"),
        ("embeddings", {"input": ["M" * 700] * 3}, {}, "invalid_request"),  # 413, by the guard
        ("nothing", {}, {}, "invalid_request"),
        ("embeddings", {"input": "MK"}, {"Authorization": "Bearer no"}, "authentication"),
        ("embeddings", {"input": "MK"}, {}, "overloaded"),
        ("embeddings", {"input": "MK"}, {}, "internal"),
        ("embeddings", {"input": "MK"}, {"X-Raptide-Timeout-S": "0.001"}, "deadline"),
    ],
)
def test_errors_are_counted_by_the_type_that_clients_read(path, body, headers, kind, ring):
    """The documented alert asks for `internal|unavailable`."""
    failure = {"overloaded": Refused("full"), "internal": ZeroDivisionError()}.get(kind)
    replicas = fake_replicas.FakeReplicas(failure=failure)
    if kind == "deadline":
        replicas.gate.clear()
    service = fake_replicas.make_service(replicas, max_body_bytes=2000)
    app = build_api(service, ring[0])
    answer = ask(app, f"/v1/{path}", json.dumps(body).encode(), ring[1] | headers)
    assert answer.json()["error"]["type"] == kind
    assert dict(service.metrics["errors"].seen) == {(kind,): 1}


def test_a_page_that_is_let_in_may_read_refusals_and_asks_without_a_key(app, ring, metrics):
    guard = Guard(app, ring[0], 1000, 5.0, metrics)
    page = CORSMiddleware(
        guard,
        allow_origins=["https://lab.example"],
        allow_methods=["POST"],
        allow_headers=["Authorization"],
    )
    origin = {"Origin": "https://lab.example"}
    refused = ask(page, "/v1/echo", headers=origin)
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == "https://lab.example"
    asked = {**origin, "Access-Control-Request-Method": "POST"}
    asked |= {"Access-Control-Request-Headers": "authorization"}
    assert ask(page, "/v1/echo", headers=asked, method="OPTIONS").status_code == 200


def test_who_leaves_before_the_request_is_whole_is_counted_as_gone_and_by_call():
    app, service = fake_replicas.make_app(fake_replicas.FakeReplicas())
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/scores",
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
    }
    arrives = iter([{"type": "http.request", "body": b'{"seq', "more_body": True}])

    async def receive():
        return next(arrives, {"type": "http.disconnect"})

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert not sent
    assert dict(service.metrics["requests"].seen) == {("", "scores", "499"): 1}
    assert dict(service.metrics["errors"].seen) == {("disconnected",): 1}


def test_a_refused_key_is_counted_by_what_was_asked(metrics, ring, app):
    keys, _ = ring
    guard = Guard(app, keys, 1000, 1.0, metrics)
    for path in ("/v1/scores", "/v1/nothing"):
        assert ask(guard, path, method="POST").status_code == 401
    assert [tags["call"] for tags in metrics.requests.seen] == ["scores", "other"]
