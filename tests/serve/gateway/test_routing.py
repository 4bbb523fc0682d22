import asyncio
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.request_router import PendingRequest

from serve.calls import Ask, Work
from serve.gateway.routing import TokenRouter

REPLICAS = [SimpleNamespace(replica_id=name) for name in "abc"]


def pending(number, tokens):
    metadata = SimpleNamespace(internal_request_id=number)
    work = Work(Ask("embed"), ["M"], tokens, timeout_s=1.0)
    return PendingRequest(args=[work], kwargs={}, metadata=metadata)


@pytest.fixture
def route(cluster):
    """Send work of so many tokens; returns the replica it goes to."""
    numbers = iter(range(10_000))

    async def make():
        router = TokenRouter(DeploymentID("replica"), DeploymentHandleSource.REPLICA)

        async def send(tokens):
            request = pending(next(numbers), tokens)
            ranks = await router.choose_replicas(REPLICAS, request)
            assert sorted(replica.replica_id for (replica,) in ranks) == ["a", "b", "c"]
            chosen = ranks[0][0].replica_id
            router.on_request_routed(request, chosen, None)
            return chosen, request.metadata.internal_request_id

        return router, send

    return make


def test_work_goes_where_the_fewest_tokens_are_on_their_way(route):
    async def main():
        _, send = await route()
        giant, _ = await send(10_000)
        smalls = [(await send(10))[0] for _ in range(100)]
        assert giant not in smalls, "a hundred small ones are less than one giant"
        assert {smalls.count(name) for name in set("abc") - {giant}} == {50}

    asyncio.run(main())


def test_what_is_answered_counts_no_more(route):
    async def main():
        router, send = await route()
        giant, number = await send(10_000)
        for _ in range(2):
            await send(100)
        router.on_request_completed(giant, number)
        assert (await send(10))[0] == giant
        router.on_request_completed("never heard of", 12345)

    asyncio.run(main())


def test_in_the_long_run_each_replica_computes_its_share(route):
    async def main():
        _, send = await route()
        loads = dict.fromkeys("abc", 0)
        for index in range(300):
            tokens = (50, 5000, 300)[index % 3]
            loads[(await send(tokens))[0]] += tokens
        assert max(loads.values()) - min(loads.values()) <= 5000

    asyncio.run(main())
