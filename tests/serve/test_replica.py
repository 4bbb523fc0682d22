"""A replica by itself, without Serve."""

import asyncio
import threading

from serve.replica import Replica
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
