"""Replicas that die: whom it is counted against, and who is asked again."""

import asyncio
import sys
import threading
import time

import pytest
from in_one_process import Endpoint, Handle, Scripted, in_turn
from ray.exceptions import RayActorError

from serve.calls import Ask, Begun, Done, Refused, Work
from serve.gateway import dispatch, standing
from serve.gateway.dispatch import Dispatcher
from serve.gateway.refusals import Refusal
from serve.replica.deployment import Replica
from serve.settings import ModelSettings

ends_threads = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

POISON = "W" * 20
ANSWER = Done([], "a" * 16, None, 0.0, 0.0)


async def stays(node):
    return False


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(dispatch, "is_leaving", stays)
    monkeypatch.setattr(dispatch, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(dispatch, "LONGEST_PAUSE_S", 0.01)


def send(handle):
    work = Work(Ask("embed"), ["MK"], 4, timeout_s=5.0)
    dispatcher = Dispatcher(handle, lambda reason: None)
    return asyncio.run(dispatcher.run(work, time.monotonic() + 5.0, "input"))


DIES = RayActorError()


def test_two_deaths_while_it_is_computed_are_the_end_of_it():
    handle = Scripted([Begun("n"), DIES], [Begun("n"), DIES], [ANSWER])
    with pytest.raises(Refusal) as caught:
        send(handle)
    assert caught.value.status == 500
    assert "Two replicas died" in caught.value.message
    assert [work.alone for work in handle.works] == [False, True]


def test_deaths_while_it_waits_count_against_nobody():
    handle = Scripted(*[[DIES]] * 9, [Begun("n"), ANSWER])
    assert send(handle) is ANSWER
    assert handle.works[-1].alone, "it might have been faster than the word that it had begun"


def test_deaths_on_a_node_that_leaves_count_against_nobody(monkeypatch):
    async def leaves(node):
        return node == "leaving"

    monkeypatch.setattr(dispatch, "is_leaving", leaves)
    handle = Scripted(*[[Begun("leaving"), DIES]] * 4, [Begun("other"), ANSWER])
    assert send(handle) is ANSWER
    assert not handle.works[-1].alone


def test_a_replica_whose_thread_has_ended_is_left_for_another():
    assert send(Scripted([Refused("stopped")], [ANSWER])) is ANSWER


class Mortal(Replica):
    """Dies, as a process does, when it computes the poison."""

    def __init__(self, settings, takes_s):
        super().__init__(settings)
        self.takes_s = takes_s
        self.died = asyncio.Event()
        self.gate = threading.Event()
        self._loop = asyncio.get_running_loop()

    def _compute(self, kind, payloads):
        self.gate.wait(30)
        if POISON in payloads:
            time.sleep(self.takes_s)
            self._loop.call_soon_threadsafe(self.died.set)
            time.sleep(0.05)  # nobody hears what it computes from now on
        return super()._compute(kind, payloads)

    async def run(self, work):
        steps = super().run(work)
        dead = asyncio.ensure_future(self.died.wait())
        while True:
            step = asyncio.ensure_future(anext(steps, None))
            await asyncio.wait((step, dead), return_when=asyncio.FIRST_COMPLETED)
            if dead.done():
                step.cancel()
                raise RayActorError
            if step.result() is None:
                return
            yield step.result()


@pytest.mark.parametrize(("takes_s", "deaths"), [(0.3, 2), (0.0, 5)])
def test_a_poisonous_sequence_ends_alone(bundle, takes_s, deaths):
    """It shares its batch with some, others wait behind it; replicas die, two where it takes a
    moment to kill, and all but it are answered."""
    settings = ModelSettings(name="raptide", path=str(bundle), max_batch_tokens=220)
    before, behind = "MKTAYIAKQR" * 2, "LAGVSERTID" * 2
    sequences = [before] * 10 + [POISON] + [behind] * 9  # the first one is a batch of its own

    async def main():
        started = [Mortal(settings, takes_s)]

        def choose(replicas):
            if replicas[0].died.is_set():
                started.append(Mortal(settings, takes_s))
                started[-1].gate.set()
                handle.replicas[:] = started[-1:]
            return handle.replicas[0]

        handle = Handle(started[:], choose)
        endpoint = Endpoint(handle, settings)
        asking = []
        for sequence in sequences:
            ask = endpoint.http("/v1/embeddings", {"input": sequence})
            asking.append(asyncio.create_task(ask))
            while handle.replicas[0]._batcher.pending_tokens < 22 * len(asking):
                await asyncio.sleep(0.001)
        handle.replicas[0].gate.set()
        answers = await asyncio.gather(*asking)
        dead = sum(replica.died.is_set() for replica in started)
        return [answer.status_code for answer in answers], handle.works, dead

    statuses, works, dead = asyncio.run(main())
    assert statuses == [500 if sequence == POISON else 200 for sequence in sequences]
    assert 2 <= dead <= deaths
    if takes_s:
        assert {work.sequences[0] for work in works if work.alone} == {before, POISON}, (
            "what waited behind the batch is under no suspicion"
        )


@ends_threads
def test_a_replica_that_computes_no_more_does_not_look_idle(bundle, monkeypatch):
    async def main():
        replica = Replica(ModelSettings(name="raptide", path=str(bundle)))
        monkeypatch.setattr(replica._batcher, "_next_batch", sys.exit)
        work = Work(Ask("embed"), ["MK"], 4, timeout_s=5.0)
        told = [[each async for each in replica.run(work)][-1] for _ in range(2)]
        replica._batcher._thread.join(10)  # what it ends with is pytest's to see in this test
        return told

    for refused in asyncio.run(main()):
        assert refused.reason == "stopped"
        assert refused.load.tokens > 10**15


def test_a_bad_sequence_fails_alone(bundle):
    settings = ModelSettings(name="raptide", path=str(bundle))
    sequences = ["MKTAYIAKQR", POISON, "LAGVSERTID"]

    class Choosy(Replica):
        def _compute(self, kind, payloads):
            if POISON in payloads:
                raise RuntimeError(f"{POISON} is too much")
            return super()._compute(kind, payloads)

    async def main():
        endpoint = Endpoint(Handle([Choosy(settings)], in_turn()), settings)
        asking = [endpoint.http("/v1/embeddings", {"input": sequence}) for sequence in sequences]
        return await asyncio.gather(*asking)

    answers = asyncio.run(main())
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert POISON not in answers[1].text


@ends_threads
def test_health_and_readiness_fail_with_the_batchers_thread(bundle, monkeypatch):
    monkeypatch.setattr(standing, "READY_S", 0.2)
    monkeypatch.setattr(standing, "HOLDS_S", 0.0)
    settings = ModelSettings(name="raptide", path=str(bundle))

    async def main():
        replica, other = Replica(settings), Replica(settings)
        handle = Handle([replica], in_turn())
        endpoint = Endpoint(handle, settings)
        await replica.check_health()
        before = await endpoint.http("/readyz", None)
        monkeypatch.setattr(replica._batcher, "_next_batch", sys.exit)
        ask = endpoint.http("/v1/embeddings", {"input": "MK"}, X_Raptide_Timeout_S="0.2")
        lost = await ask
        with pytest.raises(Exception, match="thread has ended"):
            await replica.check_health()
        after = await endpoint.http("/readyz", None)
        handle.replicas.append(other)
        again = await endpoint.http("/v1/embeddings", {"input": "MK"})
        replica._batcher._thread.join(10)
        return before.status_code, lost.status_code, after.status_code, again.status_code

    before, lost, after, again = asyncio.run(main())
    assert (before, after, again) == (200, 503, 200)
    assert lost in (503, 504)
