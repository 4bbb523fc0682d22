"""Batches that are on their way while a step is computed."""

import gc
import threading
import time

import psutil
import pytest
import torch

from raptide.heap import TRIM_EVERY
from raptide.training.ahead import SharesAhead
from raptide.training.process import GARBAGE_STEPS, collect_garbage, garbage_by_hand

CPU = torch.device("cpu")


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


@pytest.fixture
def ends():
    """No thread is left behind."""
    yield
    until = time.monotonic() + 30
    while threads() and time.monotonic() < until:
        time.sleep(0.05)
    assert not threads()


def test_shares_come_in_order_and_the_next_is_cut_meanwhile(ends):
    cut = []

    def note(batch):
        cut.append(batch)
        return f"share {batch}"

    shares = iter(SharesAhead(iter(range(4)), note, CPU))
    assert next(shares) == "share 0"
    until = time.monotonic() + 30
    while len(cut) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert cut == [0, 1, 2], "one waits, one is in the thread's hands"
    assert list(shares) == ["share 1", "share 2", "share 3"]


def test_what_goes_wrong_is_raised_in_its_place(ends):
    def batches():
        yield "good"
        raise ValueError("no more")

    shares = iter(SharesAhead(batches(), str, CPU))
    assert next(shares) == "good"
    with pytest.raises(ValueError, match="no more"):
        next(shares)


def test_the_wait_is_what_the_step_waits_and_not_the_thread(ends):
    def batches():
        yield 1
        time.sleep(0.4)
        yield 2

    shares = SharesAhead(batches(), str, CPU)
    taken = iter(shares)
    next(taken)
    next(taken)
    assert shares.last_wait_s > 0.2
    assert list(taken) == []


def test_a_thread_that_nobody_waits_for_ends(ends):
    shares = SharesAhead(iter(range(100)), str, CPU)
    assert next(iter(shares)) == "0"
    shares.close()


def test_garbage_waits_for_its_step():
    class Ring:
        def __init__(self):
            self.own = self

    def count():
        return sum(isinstance(each, Ring) for each in gc.get_objects())

    with garbage_by_hand():
        assert not gc.isenabled()
        for _ in range(5):
            Ring()
        collect_garbage(GARBAGE_STEPS - 1)
        assert count() == 5
        collect_garbage(GARBAGE_STEPS)
        assert count() == 0
        held = [Ring() for _ in range(5)]
        collect_garbage(2 * GARBAGE_STEPS)
        assert count() == 5
        held.clear()
        collect_garbage(3 * GARBAGE_STEPS)
        assert count() == 0, "what has lived through a collection is garbage too, once it is"
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_memory_in_holes_goes_back_to_the_system_in_its_step():
    def held_mb():
        return psutil.Process().memory_full_info().uss / 1e6

    blocks = [torch.ones(15_000) for _ in range(3000)]  # 60 kB each, from the heap
    pillars = blocks[::10]  # what lives on between them
    full = held_mb()
    del blocks
    collect_garbage(TRIM_EVERY - 1)
    assert held_mb() > full - 30, "pillars hold no holes: this tests nothing"
    collect_garbage(TRIM_EVERY)
    assert held_mb() < full - 130
    assert all(bool((pillar == 1).all()) for pillar in pillars)
