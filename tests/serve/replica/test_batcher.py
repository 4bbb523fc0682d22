import asyncio
import random
import sys
import threading
import time
from contextlib import suppress

import pytest

from serve.replica.batcher import DeadlinePassed, QueueFull, Stopped, TokenBatcher

EMBED = ("embed", "mean")


class Recorder:
    """Answers with its payloads' lengths and keeps each batch it was given."""

    def __init__(self):
        self.batches = []
        self.open = threading.Event()
        self.open.set()
        self.batch_s = 0.0

    def __call__(self, kind, payloads):
        self.batches.append([len(payload) for payload in payloads])
        self.open.wait()
        time.sleep(self.batch_s)
        if "bad" in payloads:
            raise ValueError("bad")
        return [len(payload) for payload in payloads]


def pieces(*lengths):
    return [("A" * length, length) for length in lengths]


def run(scenario, max_batch_tokens=100, max_queued_tokens=1000):
    async def main():
        recorder = Recorder()
        batcher = TokenBatcher(recorder, max_batch_tokens, max_queued_tokens)
        try:
            await asyncio.wait_for(scenario(batcher, recorder), 30)
        finally:
            recorder.open.set()
            batcher.close()
        return recorder.batches

    return asyncio.run(main())


async def submit_while_busy(batcher, recorder, requests):
    """Submit in this order while a first batch is being computed; returns the waiting tasks."""
    recorder.open.clear()
    first = asyncio.create_task(batcher.submit(EMBED, pieces(1)))
    while not recorder.batches:
        await asyncio.sleep(0.001)
    tasks = [asyncio.create_task(batcher.submit(kind, some)) for kind, some in requests]
    await asyncio.sleep(0)
    return first, tasks


def test_requests_share_batches_within_the_budget_and_keep_their_order():
    async def scenario(batcher, recorder):
        requests = [(EMBED, pieces(40, 30)), (EMBED, pieces(20)), (EMBED, pieces(50))]
        first, tasks = await submit_while_busy(batcher, recorder, requests)
        recorder.open.set()
        assert (await first).values == [1]
        assert [(await task).values for task in tasks] == [[40, 30], [20], [50]]

    assert run(scenario) == [[1], [40, 30, 20], [50]]


def test_the_oldest_goes_first_and_a_long_one_is_not_pushed_back():
    async def scenario(batcher, recorder):
        requests = [(EMBED, pieces(60)), (EMBED, pieces(98))] + [(EMBED, pieces(30))] * 6
        first, tasks = await submit_while_busy(batcher, recorder, requests)
        recorder.open.set()
        await asyncio.gather(first, *tasks)

    batches = run(scenario)
    assert batches[1] == [60, 30], "what fits behind it fills up the batch of the oldest"
    assert batches[2] == [98], "the long one is next, however many short ones wait"


def test_in_a_flood_of_short_ones_a_long_one_waits_for_what_was_there_and_one_batch_more():
    """The fair share is what was queued when it came; twice that is the promise, this is less."""
    budget = 4096

    async def scenario(batcher, recorder):
        rng = random.Random(3)
        recorder.batch_s = 0.02
        stop = False

        async def flood():
            while not stop:
                await batcher.submit(EMBED, pieces(rng.randint(20, 120)))

        clients = [asyncio.create_task(flood()) for _ in range(400)]
        await asyncio.sleep(0.2)
        for _ in range(5):
            ahead = batcher.pending_tokens
            before = len(recorder.batches)
            await batcher.submit(EMBED, pieces(1022))
            mine = next(i for i, b in enumerate(recorder.batches[before:]) if 1022 in b) + before
            waited = sum(map(sum, recorder.batches[before:mine]))
            assert ahead > 0
            assert waited <= ahead + budget
        stop = True
        await asyncio.gather(*clients)

    run(scenario, max_batch_tokens=budget, max_queued_tokens=10**6)


def test_a_larger_piece_than_the_budget_goes_alone():
    async def scenario(batcher, recorder):
        assert (await batcher.submit(EMBED, pieces(500))).values == [500]

    assert run(scenario) == [[500]]


def test_kinds_do_not_mix():
    async def scenario(batcher, recorder):
        score = ("score", "one-pass")
        requests = [(EMBED, pieces(10)), (score, pieces(11)), (EMBED, pieces(12))]
        first, tasks = await submit_while_busy(batcher, recorder, requests)
        recorder.open.set()
        await asyncio.gather(first, *tasks)

    assert run(scenario)[1:] == [[10, 12], [11]]


def test_one_request_spreads_over_batches_that_others_share():
    async def scenario(batcher, recorder):
        requests = [(EMBED, pieces(*[30] * 10)), (EMBED, pieces(10))]
        first, (many, one) = await submit_while_busy(batcher, recorder, requests)
        recorder.open.set()
        await asyncio.gather(first, one)
        assert (await many).values == [30] * 10

    assert run(scenario) == [[1], [30, 30, 30, 10], [30, 30, 30], [30, 30, 30], [30]]


def test_a_full_queue_refuses_and_recovers():
    async def scenario(batcher, recorder):
        first, tasks = await submit_while_busy(batcher, recorder, [(EMBED, pieces(*[90] * 12))])
        for size in (190, 1):
            with pytest.raises(QueueFull):
                await batcher.submit(EMBED, pieces(size))
        recorder.open.set()
        await asyncio.gather(first, *tasks)
        assert batcher.queued_tokens == 0
        assert (await batcher.submit(EMBED, pieces(90))).values == [90]
        assert batcher.drain_s == 0, "nothing waits"
        recorder.open.clear()
        waiting = asyncio.ensure_future(batcher.submit(EMBED, pieces(90, 90)))
        await asyncio.sleep(0.05)
        assert batcher.drain_s > 0
        recorder.open.set()
        await waiting

    run(scenario)


def test_a_large_request_gets_in_wherever_a_small_one_would():
    """Forty times, beside small ones that never let the queue run empty."""

    async def scenario(batcher, recorder):
        stop = False

        async def trickle():
            while not stop:
                with suppress(QueueFull):  # while the large one has just come
                    await batcher.submit(EMBED, pieces(20))
                await asyncio.sleep(0)

        small = [asyncio.create_task(trickle()) for _ in range(8)]
        await asyncio.sleep(0)
        for _ in range(40):
            while not 0 < batcher.queued_tokens <= 160:
                await asyncio.sleep(0)
            assert (await batcher.submit(EMBED, pieces(*[95] * 10))).values == [95] * 10
        stop = True
        await asyncio.gather(*small)

    run(scenario)


def test_what_is_admitted_goes_before_newcomers():
    async def scenario(batcher, recorder):
        first, tasks = await submit_while_busy(batcher, recorder, [(EMBED, pieces(*[100] * 10))])
        with pytest.raises(QueueFull):
            await batcher.submit(EMBED, pieces(1))
        with batcher.enter(EMBED, pieces(*[100] * 10), admitted=True) as place:
            with pytest.raises(QueueFull), batcher.enter(EMBED, pieces(1), admitted=True):
                pass
            recorder.open.set()
            assert (await place.answers()).values == [100] * 10
        await asyncio.gather(first, *tasks)

    run(scenario)


def test_a_caller_that_leaves_frees_its_place_at_once():
    async def scenario(batcher, recorder):
        requests = [(EMBED, pieces(*[90] * 10)), (EMBED, pieces(20))]
        first, (leaving, staying) = await submit_while_busy(batcher, recorder, requests)
        leaving.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert batcher.queued_tokens == 20
        recorder.open.set()
        await asyncio.gather(first, staying)

    assert run(scenario) == [[1], [20]]


def test_what_is_late_leaves_the_queue_and_is_not_computed():
    async def scenario(batcher, recorder):
        first, (staying,) = await submit_while_busy(batcher, recorder, [(EMBED, pieces(20))])
        with pytest.raises(DeadlinePassed):
            await batcher.submit(EMBED, pieces(40), deadline=time.monotonic() + 0.05)
        assert batcher.queued_tokens == 20
        recorder.open.set()
        await asyncio.gather(first, staying)

    assert run(scenario) == [[1], [20]]


def test_a_failing_batch_fails_its_callers_only():
    async def scenario(batcher, recorder):
        with pytest.raises(ValueError, match="bad"):
            await batcher.submit(EMBED, [("bad", 3)])
        assert (await batcher.submit(EMBED, pieces(2))).values == [2]

    run(scenario)


def test_a_bad_piece_fails_alone_in_its_batch():
    async def scenario(batcher, recorder):
        requests = [(EMBED, pieces(4)), (EMBED, [("bad", 3)]), (EMBED, pieces(5, 6, 7))]
        first, (before, bad, after) = await submit_while_busy(batcher, recorder, requests)
        recorder.open.set()
        await first
        with pytest.raises(ValueError, match="bad"):
            await bad
        assert (await before).values == [4]
        assert (await after).values == [5, 6, 7]

    batches = run(scenario)
    assert batches[1] == [4, 3, 5, 6, 7], "they were to share a batch"


def test_a_piece_that_goes_alone_shares_no_batch():
    async def scenario(batcher, recorder):
        first, (before,) = await submit_while_busy(batcher, recorder, [(EMBED, pieces(10))])
        with batcher.enter(EMBED, pieces(11, 12), alone=True) as place:
            after = asyncio.create_task(batcher.submit(EMBED, pieces(13)))
            await asyncio.sleep(0)
            recorder.open.set()
            await place.begun()
            assert [11] not in recorder.batches, "it is said before it is computed"
            assert (await place.answers()).values == [11, 12]
        await asyncio.gather(first, before, after)

    assert run(scenario) == [[1], [10, 13], [11], [12]]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_ended(monkeypatch):
    async def scenario(batcher, recorder):
        batcher.check()
        first, tasks = await submit_while_busy(batcher, recorder, [(EMBED, pieces(5))])
        monkeypatch.setattr(batcher, "_next_batch", sys.exit)
        recorder.open.set()
        assert (await first).values == [1]
        with pytest.raises(Stopped):
            await tasks[0]
        with pytest.raises(Stopped):
            await batcher.submit(EMBED, pieces(5))
        with pytest.raises(Stopped):
            batcher.check()
        batcher._thread.join(20)  # what it ended with is this test's to overlook

    run(scenario)


def test_the_time_in_the_queue_is_told_from_the_time_of_computing():
    async def scenario(batcher, recorder):
        first, (task,) = await submit_while_busy(batcher, recorder, [(EMBED, pieces(100))])
        await asyncio.sleep(0.2)
        recorder.open.set()
        await first
        answers = await task
        assert answers.queue_s > 0.15
        assert 0 <= answers.compute_s < answers.queue_s

    run(scenario)


def test_a_waiting_piece_costs_the_same_however_many_wait():
    """A queue that is gone through for every batch would cost each ten times as much."""

    def cost(waiting):
        async def scenario(batcher, recorder):
            requests = [(EMBED, pieces(*[50] * waiting))]
            _, (task,) = await submit_while_busy(batcher, recorder, requests)
            recorder.open.set()
            assert len((await task).values) == waiting

        began = time.process_time()
        run(scenario, max_queued_tokens=10**7)
        return (time.process_time() - began) / waiting

    few = min(cost(2_000) for _ in range(3))
    assert min(cost(20_000) for _ in range(2)) < 4 * few
