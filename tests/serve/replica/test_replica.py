"""A replica by itself, without Serve."""

import asyncio
import threading

from serve.replica.deployment import Replica
from serve.settings import ModelSettings


def test_of_threads_that_computed_only_the_batchers_stays(bundle):
    before = set(threading.enumerate())

    async def names_after_a_probe():
        replica = Replica(ModelSettings(name="alone", path=str(bundle)))
        await replica.check_health()
        for _ in range(500):
            names = [each.name for each in set(threading.enumerate()) - before]
            if len(names) == 1:
                break
            await asyncio.sleep(0.01)
        return names

    assert asyncio.run(names_after_a_probe()) == ["batcher"]


def test_who_asks_during_a_probe_waits_for_its_answer(bundle):
    before = set(threading.enumerate())

    async def threads_of_many_probes():
        replica = Replica(ModelSettings(name="alone", path=str(bundle)))
        probes = [asyncio.ensure_future(replica.probe()) for _ in range(50)]
        await asyncio.sleep(0)
        started = len(set(threading.enumerate()) - before)
        probes[0].cancel()
        assert await asyncio.gather(*probes[1:]) == [None] * 49
        return started

    assert asyncio.run(threads_of_many_probes()) <= 3  # the batcher's, the probe's, one that ends
