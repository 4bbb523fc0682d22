"""What is let in: fair to size, as a whole, for what it costs."""

import asyncio
import threading
import time

import numpy as np
import pytest
from in_one_process import Endpoint, Handle, Scripted, in_turn

from serve.calls import Ask, Done, Load, Refused, Work, positions_of
from serve.gateway import dispatch
from serve.gateway.dispatch import Dispatcher
from serve.replica.deployment import Replica
from serve.settings import ModelSettings

RUN = 32
SEQUENCES = ["MKTAYIAKQRLAGVSERTIDLLLLL"] * 64
"""A run each."""


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(dispatch, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(dispatch, "LONGEST_PAUSE_S", 0.01)


class Gated(Replica):
    """Computes while its gate is open; counts what it computed."""

    def __init__(self, settings, name):
        super().__init__(settings)
        self._name = name
        self.gate = threading.Event()
        self.gate.set()
        self.computed = 0

    def _compute(self, kind, payloads):
        self.gate.wait(30)
        self.computed += len(payloads)
        return super()._compute(kind, payloads)


def served(bundle, queued, replicas=1):
    """An endpoint with the settings of one whose queues hold so many tokens."""
    settings = ModelSettings(
        name="raptide", path=str(bundle), max_batch_tokens=RUN, max_queued_tokens=queued
    )
    handle = Handle([Gated(settings, str(n)) for n in range(replicas)], in_turn())
    return Endpoint(handle, settings), handle


async def fill(endpoint, replica, count):
    """So many requests of one run at a replica that computes nothing yet."""
    replica.gate.clear()
    some = [
        asyncio.create_task(endpoint.http("/v1/embeddings", {"input": SEQUENCES[0]}))
        for _ in range(count)
    ]
    while replica._batcher.pending_tokens < 27 * count:
        await asyncio.sleep(0.001)
    return some


def test_a_large_request_beside_small_ones_is_never_refused(bundle):
    async def main():
        endpoint, handle = served(bundle, queued=2700)
        body = {"sequences": "MKTAY" * 10}  # 2,600 tokens in one run
        (replica,) = handle.replicas
        statuses = []
        for _ in range(40):
            small = await fill(endpoint, replica, 9)
            assert 0 < replica._batcher.queued_tokens <= 0.08 * 2700 + 27
            large = asyncio.create_task(endpoint.http("/v1/scores", body))
            await asyncio.sleep(0.005)
            replica.gate.set()
            answers = await asyncio.gather(large, *small)
            statuses += [answer.status_code for answer in answers]
        return statuses

    assert asyncio.run(main()) == [200] * 400


def test_later_runs_of_what_is_let_in_go_before_newcomers(bundle):
    """There is room for the first of eight runs, and none for others."""

    async def main():
        endpoint, handle = served(bundle, queued=1728)
        small = await fill(endpoint, handle.replicas[0], 64)
        large = asyncio.create_task(endpoint.embed("json", SEQUENCES[:8]))
        while len(handle.works) < 64 + 8:
            await asyncio.sleep(0.001)
        refused = await endpoint.http("/v1/embeddings", {"input": SEQUENCES[0]})
        handle.replicas[0].gate.set()
        answers = await asyncio.gather(*small)
        return refused.status_code, {answer.status_code for answer in answers}, await large

    refused, answered, (_, vectors) = asyncio.run(main())
    assert (refused, answered) == (429, {200})
    assert len(vectors) == 8
    assert np.ptp(vectors, axis=0).max() < 1e-5


def test_later_runs_wait_where_there_is_no_room_even_so():
    full = Refused("full", load=Load("a", 1))
    work = Work(Ask("embed"), ["MK"], 4, timeout_s=5.0, admitted=True)
    done = Done([], "a" * 16, None, 0.0, 0.0)
    dispatcher = Dispatcher(Scripted(*[[full]] * 9, [done]), lambda reason: None)
    assert asyncio.run(dispatcher.run(work, time.monotonic() + 5.0, "input")) is done


def test_a_request_that_finds_no_room_wastes_nothing(bundle):
    async def main():
        endpoint, handle = served(bundle, queued=216, replicas=2)
        busy = []
        for replica in handle.replicas:
            replica.gate.clear()
        while not all(r._batcher.queued_tokens >= 216 for r in handle.replicas):
            body = {"input": SEQUENCES[0]}
            busy.append(asyncio.create_task(endpoint.http("/v1/embeddings", body)))
            await asyncio.sleep(0.01)
        sent = len(handle.works)
        refused = await endpoint.http("/v1/embeddings", {"input": SEQUENCES[:8]})
        asked = [work.sequences for work in handle.works[sent:]]
        for replica in handle.replicas:
            replica.gate.set()
        answers = await asyncio.gather(*busy)
        return refused, asked, answers, sum(replica.computed for replica in handle.replicas)

    refused, asked, answers, computed = asyncio.run(main())
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert len(asked) == 3, "its first run alone, at both replicas, and at the first one again"
    answered = [answer for answer in answers if answer.status_code == 200]
    assert computed == len(answered)


def test_positions_are_counted_once():
    changes = [":".join(f"A{p}G" for p in range(start, start + 10)) for start in range(1, 61)]
    assert positions_of(changes) == 69
    assert positions_of(["A1G", "A1C", "A1G:C2D", " K3A : A1G"]) == 3
    assert positions_of(["A1G", "nonsense", "nonsense"]) == 2


def test_masked_marginals_cost_what_they_compute(bundle):
    """60 variants of ten changes each, at ten positions in all."""
    sequence = "MKTAYIAKQR" * 10
    variants = [
        ":".join(f"{sequence[p]}{p + 1}{new}" for p in range(10)) for new in "ACDEFGHIKL" * 6
    ]
    cost = Ask("variants", "masked-marginals").tokens(100, 10)

    async def main():
        endpoint, handle = served(bundle, queued=2 * cost)
        body = {"sequence": sequence, "variants": variants, "method": "masked-marginals"}
        answer = await endpoint.http("/v1/scores", body)
        return answer, handle.works

    answer, (work,) = asyncio.run(main())
    assert answer.status_code == 200, answer.text
    assert work.tokens == cost == 1020
