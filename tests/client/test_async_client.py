"""The client for event loops: the same calls, awaited."""

import asyncio
import gc
import inspect
import time

import numpy as np
import pytest
from fake_endpoint import WIDTH, Server, left, refuse, versions

from raptide import AsyncClient, Client, ConfigError, SequenceError, ServiceError

SEQUENCES = ["M" * (1 + i % 7) for i in range(30)]


@pytest.fixture
def server():
    server = Server()
    yield server
    server.die()


def lengths(vectors):
    return [int(vector[0]) for vector in vectors]


def run(server, work, **options):
    async def main():
        async with AsyncClient(server.url, **options) as client:
            return await work(client)

    return asyncio.run(main())


def test_both_clients_have_the_same_calls_arguments_and_options():
    def public(cls):
        return {
            name: inspect.signature(getattr(cls, name))
            for name in dir(cls)
            if not name.startswith("_") and callable(getattr(cls, name))
        }

    blocking, awaited = public(Client), public(AsyncClient)
    assert blocking.keys() == awaited.keys()
    assert inspect.signature(Client.__init__) == inspect.signature(AsyncClient.__init__)
    for name in blocking.keys() - {"close", "models"}:
        assert getattr(Client, name) is getattr(AsyncClient, name), f"{name} has two bodies"


def test_a_list_is_awaited_and_generators_are_iterated(server):
    async def work(client):
        vectors = await client.embed(SEQUENCES)
        assert isinstance(vectors, np.ndarray)
        assert lengths(vectors) == [len(each) for each in SEQUENCES]
        assert [v async for v in client.embed(iter(SEQUENCES))]

        async def read():
            for each in SEQUENCES:
                await asyncio.sleep(0)
                yield each

        found = [vector async for vector in client.embed(read())]
        assert lengths(found) == [len(each) for each in SEQUENCES]
        assert (await client.models())[0]["width"] == WIDTH
        assert (await client.embed([])).shape == (0, WIDTH)

    run(server, work, chunk_sequences=4)


def test_calls_side_by_side_share_the_connections(server):
    server.delay_s = 0.02

    async def work(client):
        return await asyncio.gather(*(client.embed(SEQUENCES) for _ in range(6)))

    for vectors in run(server, work, chunk_sequences=5, parallel=3):
        assert lengths(vectors) == [len(each) for each in SEQUENCES]
    assert 1 < server.most_running <= 3


def test_other_work_goes_on_meanwhile(server):
    server.delay_s = 0.3

    async def work(client):
        waiting = asyncio.create_task(client.embed(["MKT"]))
        ticks = 0
        while not waiting.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert run(server, work) > 5


def test_trouble_passes_and_mistakes_are_the_same_errors(server):
    async def work(client):
        server.mishaps = [refuse(503), refuse(429)]
        assert lengths(await client.embed(["MKT"])) == [3]
        server.mishaps = [None, refuse(422, message="Sequence 0: long.", param="input")]
        with pytest.raises(SequenceError, match=r"^Sequence 1: long"):
            await client.embed(["MKT", "M"])
        server.mishaps = [refuse(401)]
        with pytest.raises(ConfigError, match="API key"):
            await client.embed(["MKT"])
        with pytest.raises(SequenceError, match="Sequence 0"):
            await client.embed(["M1"])
        with pytest.raises(SequenceError, match=r"use \[it\]"):
            await client.embed("M1")

    run(server, work, chunk_sequences=1, parallel=1)


def test_a_cancelled_call_is_called_off_at_the_endpoint(server):
    gone = []
    server.respond = lambda handler, body: gone.append(left(handler, 20))

    async def work(client):
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await client.embed(SEQUENCES)
        assert time.monotonic() - started < 2
        while len(gone) < 4:
            await asyncio.sleep(0.01)

    run(server, work, chunk_sequences=1, parallel=4)
    assert gone == [True] * 4


def test_requests_called_off_at_any_moment_cost_no_later_one_its_connection(server):
    """Also between getting a place in httpx's pool and connecting, where httpx loses it."""

    async def work(client):
        for moment in range(60):
            tasks = [asyncio.create_task(client.embed(SEQUENCES)) for _ in range(2)]
            for _ in range(moment):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        async with asyncio.timeout(30):
            assert lengths(await client.embed(["MKT"])) == [3]
        assert not client._transport._running

    run(server, work, chunk_sequences=1, parallel=4)


def test_an_abandoned_generator_goes_on_sending_nothing(server):
    async def work(client):
        results = client.embed(iter(["MKT"] * 1000))
        await anext(results)
        await results.aclose()
        sent = len(server.requests)
        await asyncio.sleep(0.2)
        assert len(server.requests) <= sent + 2

    run(server, work, chunk_sequences=1, parallel=2)


def test_weights_are_pinned_and_lists_started_over(server):
    server.respond = versions(lambda count: ["1"] if count < 10 else ["2"])

    async def work(client):
        answer = await client.detailed.embed(SEQUENCES)
        assert {vector[0] for vector in answer.result} == {2}
        assert (answer.weights, client.weights) == ("2", "2")
        lazy = await client.detailed.embed(iter(SEQUENCES))
        assert len([each async for each in lazy.result]) == len(SEQUENCES)
        assert lazy.residues == sum(map(len, SEQUENCES))

    run(server, work, chunk_sequences=2)


def test_nothing_is_said_of_requests_that_fail_after_their_call_is_over(server, caplog):
    """The first one fails last, when the others have."""

    def respond(handler, body):
        time.sleep(0.3 * (body["input"] == ["MK"]))
        refuse(422, message="Sequence 0: long.", param="input")(handler)

    server.respond = respond

    async def work(client):
        with pytest.raises(SequenceError, match=r"^Sequence 0"):
            await client.embed(["MK", "MKT", "MKTA"])

    run(server, work, chunk_sequences=1, parallel=4)
    gc.collect()
    assert not [each for each in caplog.records if each.name == "asyncio"]


def test_an_async_generator_is_refused_by_the_client_for_threads(server):
    async def read():
        yield "MKT"

    with Client(server.url) as client, pytest.raises(SequenceError, match="use AsyncClient"):
        client.embed(read())


def test_the_client_for_threads_works_inside_an_event_loop(server):
    """As in a notebook."""

    async def main():
        with Client(server.url) as client:
            return client.embed(SEQUENCES), list(client.embed(iter(SEQUENCES)))

    vectors, streamed = asyncio.run(main())
    assert lengths(vectors) == lengths(streamed) == [len(each) for each in SEQUENCES]


def test_a_forked_child_has_connections_of_its_own(server):
    """As data loaders make them."""
    import multiprocessing

    def work(client, results):
        results.put(lengths(client.embed(SEQUENCES)))

    context = multiprocessing.get_context("fork")
    with Client(server.url) as client:
        client.embed(SEQUENCES)
        results = context.Queue()
        child = context.Process(target=work, args=(client, results))
        child.start()
        assert results.get(timeout=20) == [len(each) for each in SEQUENCES]
        child.join(20)
        assert child.exitcode == 0
        assert lengths(client.embed(SEQUENCES)) == [len(each) for each in SEQUENCES]


def test_what_cannot_be_reached_is_one_sentence():
    async def main():
        async with AsyncClient("http://127.0.0.1:1", retry_s=0) as client:
            await client.models()

    with pytest.raises(ServiceError, match="cannot be reached"):
        asyncio.run(main())
