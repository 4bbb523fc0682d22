"""Answers of a hundred megabytes and more: what they cost, who waits for them, who reads them."""

import asyncio
import json
import os
import pickle
import subprocess
import sys

import fake_replicas
import large_answer
import pytest

from serve.app import build
from serve.gateway.pace import AHEAD_BYTES


@pytest.mark.parametrize("encoding", ["float", "base64", "arrow"])
def test_a_large_answer_costs_little_more_than_its_bytes_and_health_does_not_wait(encoding):
    command = [sys.executable, large_answer.__file__, encoding]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found = json.loads(run.stdout)
    assert found["status"] == 200
    assert found["answer_bytes"] > 1e8
    assert found["peak_bytes"] < 1.5 * found["answer_bytes"]
    assert len(found["health_s"]) > 10
    assert max(found["health_s"]) < 0.1


class Queue:
    """As Serve's: takes whatever is sent at once; messages are pickled when the client reads."""

    def __init__(self):
        self.messages = []
        self.read = bytearray()

    async def send(self, message):
        self.messages.append(message)

    @property
    def waiting_bytes(self):
        return sum(len(message.get("body", b"")) for message in self.messages)

    def read_all(self):
        for message in pickle.loads(pickle.dumps(self.messages)):  # noqa: S301
            assert type(message) is dict
            self.read += message.get("body", b"")
        self.messages = []


@pytest.mark.parametrize("accept", ["application/json", large_answer.ARROW])
def test_no_more_is_made_ahead_of_a_slow_reader_than_a_few_megabytes(accept):
    replicas = fake_replicas.FakeReplicas(width=1280)
    app, _ = fake_replicas.make_app(replicas)
    body = {"input": ["A" * 500] * 10, "pooling": "residue", "encoding_format": "base64"}

    async def call():
        queue = Queue()
        task = asyncio.create_task(large_answer.post(app, body, accept, queue.send))
        most = before = -1
        while not task.done():
            await asyncio.sleep(0.02)
            if before == (before := queue.waiting_bytes):  # nothing more comes
                most = max(most, before)
                queue.read_all()
        await task
        queue.read_all()
        return queue, most

    queue, most = asyncio.run(call())
    assert len(queue.read) > 25e6
    assert 0 < most <= AHEAD_BYTES
    if accept == "application/json":
        assert len(json.loads(queue.read)["data"]) == 10


def test_a_reader_that_reads_nothing_is_given_up_and_its_room_with_it(monkeypatch):
    monkeypatch.setattr("serve.gateway.pace.STALLED_S", 0.2)
    replicas = fake_replicas.FakeReplicas(width=1280)
    app, service = fake_replicas.make_app(replicas)
    body = {"input": ["A" * 500] * 10, "pooling": "residue"}

    async def call():
        queue = Queue()
        with pytest.raises(RuntimeError, match="broke off"):
            await large_answer.post(app, body, large_answer.ARROW, queue.send)
        assert queue.waiting_bytes <= AHEAD_BYTES
        queue.messages.clear()

    asyncio.run(call())
    assert service._ledger.held_bytes == 0


def test_a_gateway_reserves_in_ray_what_its_answers_may_take(bundle):
    def reserved(**settings):
        application = build({"model": str(bundle), **settings})
        return application._bound_deployment.ray_actor_options["memory"]

    assert reserved(max_held_bytes=10**9) - reserved(max_held_bytes=10**6) == 999 * 10**6
    assert reserved(max_held_bytes=10**6) > 154 * 10**6, "less than one takes that holds nothing"
