"""What may be asked for, by the bytes of its answer: limits, layers, and room in memory."""

import asyncio
import base64
import json
import time

import fake_replicas
import numpy as np
import pytest

from serve.calls import Ask
from serve.gateway.answers import json_arrays
from serve.gateway.ledger import Ledger
from serve.gateway.refusals import Refusal
from serve.gateway.sizes import RUN_BYTES, STREAM_BYTES, Shape, count_numbers, cut_runs

SHAPE = Shape("w1", width=1280, layers=33, tokens=33)


def post(app, path, body, headers=None):
    async def call():
        async with fake_replicas.http_client(app) as client:
            return await client.post(f"/v1/{path}", json=body, headers=headers)

    return asyncio.run(call())


@pytest.mark.parametrize(
    ("ask", "variants", "numbers"),
    [
        (Ask("embed"), 0, [1280, 1280]),
        (Ask("embed", layers=(0, -1)), 0, [2560, 2560]),
        (Ask("embed", pooling="residue", layers=(0, -1)), 0, [7680, 2560]),
        (Ask("logits"), 0, [99, 33]),
        (Ask("contacts"), 0, [9, 1]),
        (Ask("scan", "wt-marginals"), 0, [60, 20]),
        (Ask("score", "one-pass"), 0, [1, 1]),
    ],
)
def test_an_answers_numbers_are_known_beforehand(ask, variants, numbers):
    assert count_numbers(ask, [3, 1], variants, SHAPE) == numbers
    assert count_numbers(Ask("variants", "wt-marginals"), [3], 7, SHAPE) == [7]


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_what_is_estimated_is_what_is_sent(encoding, scale):
    arrays = [np.random.default_rng(1).standard_normal((90, 1280), np.float32) * scale] * 3
    size = 12 if encoding == "float" else 16 / 3
    expected = size * sum(array.size for array in arrays)
    written = sum(map(len, json_arrays({}, list(arrays), "values", encoding, {})))
    assert 0.8 * expected <= written <= 1.15 * expected


@pytest.mark.parametrize(
    ("encoding", "headers", "status"),
    [
        ("float", None, 422),
        ("base64", None, 200),
        ("float", {"Accept": "application/vnd.apache.arrow.stream"}, 200),
    ],
)
def test_json_that_would_be_too_large_is_refused_before_it_is_computed_and_arrow_is_not(
    encoding, headers, status
):
    replicas = fake_replicas.FakeReplicas(width=1280)
    app, _ = fake_replicas.make_app(replicas, max_json_bytes=1_000_000, max_answer_bytes=2**21)
    body = {"input": "A" * 100, "pooling": "residue", "encoding_format": encoding}
    answer = post(app, "embeddings", body, headers)
    assert answer.status_code == status
    if status == 422:
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request", "input")
        assert "1,536,100 bytes of JSON, more than the 1,000,000" in error["message"]
        assert "use Arrow (`Accept: application/vnd.apache.arrow.stream`)" in error["message"]
        assert replicas.works == []


def test_what_is_too_large_in_any_form_is_not_sent_to_arrow():
    replicas = fake_replicas.FakeReplicas(width=1280)
    app, _ = fake_replicas.make_app(replicas, max_json_bytes=2**16, max_answer_bytes=2**17)
    for headers in (None, {"Accept": "application/vnd.apache.arrow.stream"}):
        answer = post(app, "embeddings", {"input": "A" * 100, "pooling": "residue"}, headers)
        assert answer.status_code == 422
        message = answer.json()["error"]["message"]
        assert "Arrow" not in message
        assert "fewer or shorter sequences, or ask for fewer layers" in message


def test_layers_are_named_once_after_negative_ones_are_resolved():
    replicas = fake_replicas.FakeReplicas(layers=4)
    app, _ = fake_replicas.make_app(replicas)
    for layers, status in (([0, -5], 422), ([4, -1], 422), ([3, -1], 200), ([0, 1, -1], 200)):
        answer = post(app, "embeddings", {"input": "MK", "layers": layers})
        assert answer.status_code == status, layers
        if status == 422:
            error = answer.json()["error"]
            assert error["param"] == "layers"
            assert f"{layers[0]} and {layers[1]} are the same one" in error["message"]


def test_a_model_says_once_what_it_is_and_again_for_other_weights(monkeypatch):
    monkeypatch.setattr("serve.gateway.sizes.ASK_AGAIN_S", -1.0)
    replicas = fake_replicas.FakeReplicas(width=32)
    app, _ = fake_replicas.make_app(replicas, max_json_bytes=50_000)
    body = {"input": "A" * 50, "pooling": "residue"}

    async def call():
        async with fake_replicas.http_client(app) as client:
            for _ in range(3):
                assert (await client.post("/v1/embeddings", json=body)).status_code == 200
            sized = {"input": "M", "dimensions": 32}
            assert (await client.post("/v1/embeddings", json=sized)).status_code == 200
            assert replicas.described == 1
            replicas.shape = Shape("w2", 320, 4, 33)
            assert (await client.post("/v1/embeddings", json=body)).status_code == 200
            while replicas.described < 2:
                await asyncio.sleep(0.01)
            assert (await client.post("/v1/embeddings", json=body)).status_code == 422

    asyncio.run(call())


def test_a_model_that_does_not_say_what_it_is_is_waited_for_until_the_deadline():
    replicas = fake_replicas.FakeReplicas()

    async def loading():
        await asyncio.sleep(60)

    replicas.describe.remote = loading
    app, _ = fake_replicas.make_app(replicas)
    answer = post(app, "embeddings", {"input": "MK"}, {"X-Raptide-Timeout-S": "0.1"})
    assert answer.status_code == 503


def test_runs_are_cut_by_what_they_answer_too():
    size = RUN_BYTES // 4
    runs, at_once = cut_runs([100] * 12, [size] * 12, 4096)
    assert [run.stop - run.start for run in runs] == [4, 4, 4]
    assert at_once == STREAM_BYTES // RUN_BYTES
    runs, at_once = cut_runs([100] * 3, [3 * STREAM_BYTES] * 3, 4096)
    assert ([run.stop - run.start for run in runs], at_once) == ([1, 1, 1], 1)
    runs, at_once = cut_runs([100] * 80, [], 4096)
    assert ([run.stop - run.start for run in runs], at_once) == ([40, 40], 8)


def test_bytes_in_flight_are_bounded_and_come_back():
    """Twenty answers of 400 kB, and room for two: no more are ever computed at once."""
    replicas = fake_replicas.FakeReplicas(width=1000)
    app, service = fake_replicas.make_app(replicas, max_held_bytes=800_000)
    body = {"input": "A" * 100, "pooling": "residue", "encoding_format": "base64"}
    most = []

    async def call():
        replicas.gate.clear()
        async with fake_replicas.http_client(app) as client:
            asked = [
                asyncio.create_task(client.post("/v1/embeddings", json=body)) for _ in range(20)
            ]
            while len(replicas.works) < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            most.append(len(replicas.works))
            replicas.gate.set()
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert asyncio.run(call()) == [200] * 20
    assert most == [2]
    assert service._ledger.held_bytes == 0


def test_who_finds_no_room_by_the_deadline_is_told_when_to_come_back():
    replicas = fake_replicas.FakeReplicas(width=1000)
    app, service = fake_replicas.make_app(replicas, max_held_bytes=500_000)
    body = {"input": "A" * 100, "pooling": "residue", "encoding_format": "base64"}

    async def call():
        replicas.gate.clear()
        async with fake_replicas.http_client(app) as client:
            first = asyncio.create_task(client.post("/v1/embeddings", json=body))
            while not replicas.works:
                await asyncio.sleep(0.01)
            late = await client.post(
                "/v1/embeddings", json=body, headers={"X-Raptide-Timeout-S": "0.1"}
            )
            replicas.gate.set()
            return late, await first

    late, first = asyncio.run(call())
    assert (late.status_code, first.status_code) == (429, 200)
    assert int(late.headers["Retry-After"]) >= 1
    assert late.json()["error"]["type"] == "overloaded"
    assert service._ledger.held_bytes == 0


def test_room_is_given_first_come_first_served_and_lost_by_nobody():
    async def call():
        ledger = Ledger(100)
        order = []

        async def take(name, size, until):
            lease = await ledger.hold(size, until)
            order.append(name)
            await asyncio.sleep(0.01)
            lease.end()
            lease.end()

        far = time.monotonic() + 60
        first = await ledger.hold(60, far)
        large = asyncio.create_task(take("large", 1000, far))
        await asyncio.sleep(0)
        small = asyncio.create_task(take("small", 10, far))  # would fit, but came later
        gone = asyncio.create_task(take("gone", 10, far))
        await asyncio.sleep(0)
        with pytest.raises(Refusal):
            await ledger.hold(10, time.monotonic() + 0.01)
        gone.cancel()
        assert order == []
        first.end()
        await asyncio.gather(large, small)
        assert order == ["large", "small"]
        assert ledger.held_bytes == 0

    asyncio.run(call())


def test_large_json_reads_as_the_same_numbers():
    """Cut at every kind of border: rows, layers, long vectors, and what is small."""
    rng = np.random.default_rng(3)
    shapes = [(3, 700, 64), (60_000,), (5, 30_000), (7,), (1, 1), (2, 3, 4)]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    tail = {"usage": {"total_tokens": 3}}
    for encoding in ("float", "base64"):
        pieces = list(json_arrays({"object": "list"}, list(arrays), "values", encoding, tail))
        tree = json.loads(b"".join(pieces))
        assert (tree["object"], tree["usage"]) == ("list", {"total_tokens": 3})
        for index, (row, array) in enumerate(zip(tree["data"], arrays, strict=True)):
            assert (row["index"], row["shape"]) == (index, list(array.shape))
            if encoding == "float":
                np.testing.assert_array_equal(np.array(row["values"], np.float32), array)
            else:
                raw = base64.b64decode(row["values"])
                np.testing.assert_array_equal(np.frombuffer(raw, "<f4"), array.reshape(-1))
