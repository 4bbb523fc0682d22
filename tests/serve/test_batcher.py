import asyncio

import pytest

from serve.batcher import QueueFull, TokenBatcher

EMBED = ("embed", "mean")


class Recorder:
    """Answers with lengths and keeps each batch it was given."""

    def __init__(self):
        self.batches = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, kind, sequences):
        self.batches.append([len(sequence) for sequence in sequences])
        await self.gate.wait()
        if "bad" in sequences:
            raise ValueError("bad")
        return [len(sequence) for sequence in sequences]


def run(scenario, max_batch_tokens=100, max_queued_tokens=1000):
    async def main():
        recorder = Recorder()
        batcher = TokenBatcher(recorder, max_batch_tokens, max_queued_tokens)
        await scenario(batcher, recorder)
        return recorder.batches

    return asyncio.run(main())


async def fill_while_busy(batcher, recorder, requests):
    """Submit while a first batch is being computed; returns the waiting tasks."""
    recorder.gate.clear()
    first = asyncio.create_task(batcher.submit(EMBED, ["A"]))
    await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    tasks = [asyncio.create_task(batcher.submit(kind, seqs)) for kind, seqs in requests]
    await asyncio.sleep(0.01)
    return first, tasks


def test_requests_share_batches_within_the_budget_and_keep_their_order():
    async def scenario(batcher, recorder):
        requests = [(EMBED, ["A" * 40, "A" * 30]), (EMBED, ["A" * 20]), (EMBED, ["A" * 50])]
        first, tasks = await fill_while_busy(batcher, recorder, requests)
        recorder.gate.set()
        assert await first == [1]
        assert [await task for task in tasks] == [[40, 30], [20], [50]]

    batches = run(scenario)
    assert batches == [[1], [40, 30, 20], [50]]


def test_the_oldest_goes_first_and_a_long_one_is_not_starved():
    async def scenario(batcher, recorder):
        requests = [(EMBED, ["A" * 60]), (EMBED, ["A" * 98])] + [(EMBED, ["A" * 30])] * 6
        first, tasks = await fill_while_busy(batcher, recorder, requests)
        recorder.gate.set()
        await asyncio.gather(first, *tasks)

    batches = run(scenario)
    assert batches[1][0] == 60
    assert batches[2] == [98], "the long one is next, however many short ones wait"


def test_a_longer_one_than_the_budget_goes_alone():
    async def scenario(batcher, recorder):
        assert await batcher.submit(EMBED, ["A" * 500]) == [500]

    assert run(scenario) == [[500]]


def test_kinds_do_not_mix():
    async def scenario(batcher, recorder):
        requests = [(EMBED, ["A" * 10]), (("score", "one-pass"), ["A" * 11]), (EMBED, ["A" * 12])]
        first, tasks = await fill_while_busy(batcher, recorder, requests)
        recorder.gate.set()
        await asyncio.gather(first, *tasks)

    assert run(scenario)[1:] == [[10, 12], [11]]


def test_a_full_queue_refuses_and_recovers():
    async def scenario(batcher, recorder):
        first, tasks = await fill_while_busy(batcher, recorder, [(EMBED, ["A" * 90] * 10)])
        with pytest.raises(QueueFull):
            await batcher.submit(EMBED, ["A" * 90])
        recorder.gate.set()
        await asyncio.gather(first, *tasks)
        assert batcher.queued_tokens == 0
        assert await batcher.submit(EMBED, ["A" * 90]) == [90]

    run(scenario)


def test_masking_each_residue_counts_as_that_many_passes():
    async def scenario(batcher, recorder):
        request = (("score", "pseudo-ppl"), ["A" * 20])
        first, tasks = await fill_while_busy(batcher, recorder, [request])
        assert batcher.queued_tokens == 20 * 22
        recorder.gate.set()
        await asyncio.gather(first, *tasks)

    run(scenario)


def test_a_caller_that_leaves_frees_its_place():
    async def scenario(batcher, recorder):
        first, tasks = await fill_while_busy(batcher, recorder, [(EMBED, ["A" * 90] * 10)])
        tasks[0].cancel()
        await asyncio.sleep(0.01)
        assert batcher.queued_tokens == 0
        recorder.gate.set()
        assert await first == [1]

    assert run(scenario) == [[1]]


def test_a_failing_batch_fails_its_callers_only():
    async def scenario(batcher, recorder):
        with pytest.raises(ValueError, match="bad"):
            await batcher.submit(EMBED, ["bad"])
        assert await batcher.submit(EMBED, ["MK"]) == [2]

    run(scenario)
