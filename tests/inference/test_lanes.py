"""Batches side by side: the same numbers in the same order, and no thread too many."""

import os
import signal
import threading
import time
from itertools import chain

import numpy as np
import pytest
import torch
from budgets import examples
from draws import random_sequence, random_weights
from hypothesis import given
from hypothesis import strategies as st

from raptide.inference import lanes as lanes_module
from raptide.inference.batching import even_tokens, plan_batches
from raptide.inference.engine import Engine
from raptide.inference.lanes import AHEAD, LEAST_TOKENS, Lanes
from raptide.model.device import threads_for
from raptide.model.families import make_model
from raptide.model.formats.detect import write_weights
from raptide.model.formats.weights import Weights
from raptide.model.lstm.config import LstmSettings

LENGTHS = (400, 3, 150, 222, 700, 31, 90, 310, 64, 5, 512, 120)


@pytest.fixture
def threads():
    """Sets how many threads the calling one has, and puts them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["esm2", "lstm"])
def engine(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("bundle")
    if request.param == "lstm":
        weights = Weights.of(make_model(LstmSettings(layers=1, width=32)).initialise(3))
    else:
        weights = random_weights(layers=2, width=32, heads=2)
    write_weights(folder, weights)
    return Engine.load(folder, device="cpu", dtype="fp32", max_batch_tokens=1024)


def all_answers(engine, sequences):
    """What each method gives for the same proteins, in one list of arrays."""
    answers = [engine.embed(sequences), *engine.embed(sequences, (0, -1), "residue")]
    answers += [*engine.logits(sequences), engine.score_sequences(sequences, "one-pass")]
    answers += list(engine.embed(iter(sequences), pooling="bos"))
    if not engine.model.settings.blind:
        answers.append(engine.scan(sequences[3], "masked-marginals"))
        pieces = [(sequence, range(0, len(sequence), 29)) for sequence in sequences]
        answers += engine.masked_log_p(pieces)
    return answers


def test_lanes_give_the_numbers_of_one_thread_in_order(engine, threads):
    threads(1)
    sequences = [random_sequence(length) for length in LENGTHS]
    alone = all_answers(engine, sequences)
    for count in (2, 3):
        threads(count)
        assert engine._forward.lanes.count == count
        side_by_side = all_answers(engine, sequences)
        for mine, expected in zip(side_by_side, alone, strict=True):
            np.testing.assert_allclose(mine, expected, atol=2e-6)
        assert torch.get_num_threads() == count
        found = []
        new = threading.Thread(target=lambda to=found: to.append(torch.get_num_threads()))
        new.start()
        new.join()
        assert found == [count], "a thread that comes later has no more than a lane's"


def test_batches_meet_in_lanes(threads):
    """Two at a time, each on a thread that computes alone; few are drawn ahead."""
    threads(2)
    drawn, threads_seen, meeting = [], set(), threading.Barrier(2, timeout=20)

    def batches():
        for number in range(6):
            drawn.append(number)
            yield number

    def compute(number):
        meeting.wait()
        threads_seen.add((threading.current_thread().name, torch.get_num_threads()))
        return number

    found = Lanes(1).map(compute, batches(), lanes=2)
    assert next(found) == 0
    assert len(drawn) <= 2 * AHEAD + 1
    assert list(found) == [1, 2, 3, 4, 5]
    assert len(threads_seen) == 2
    assert {count for _, count in threads_seen} == {1}


def test_the_first_error_is_raised_and_nothing_runs_on(threads):
    threads(2)
    running, ended = threading.Event(), []

    def compute(number):
        if number == 1:
            running.wait(20)
            raise ValueError("no such batch")
        if number == 2:
            running.set()
            time.sleep(0.3)
        ended.append(number)
        return number

    with pytest.raises(ValueError, match="no such batch"):
        list(Lanes(1).map(compute, range(100), lanes=2))
    before = list(ended)
    time.sleep(0.5)
    assert ended == before
    assert max(ended) < 10
    found = Lanes(1).map(lambda number: number, range(100), lanes=2)
    assert next(found) == 0
    found.close()  # whoever wants no more may go


@pytest.mark.parametrize(
    ("cores", "parameters", "lanes"),
    [
        (2, 35e6, 2),
        (2, 650e6, 1),
        (8, 8e6, 8),
        (8, 150e6, 4),
        (8, 650e6, 1),
        (32, 35e6, 32),
        (32, 650e6, 4),
        (32, 3e9, 2),
        (1, 35e6, 1),
    ],
)
def test_lanes_are_as_many_as_cores_or_groups_of_them(monkeypatch, cores, parameters, lanes):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert Lanes(threads_for(int(parameters))).count == lanes
    assert Lanes(None).count == 1
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    assert Lanes(1).count == 1, "all lanes would be bound to the core of who started them"


def test_what_cannot_be_shared_out_gets_all_threads(monkeypatch):
    for cores in (2, 8, 32):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        lanes = Lanes(1)
        assert lanes.worth(1022, 1022) == 1, "one sequence"
        assert lanes.worth(3, 2 * LEAST_TOKENS - 1) == 1, "one piece"
        assert lanes.worth(4000, 4100) == 1, "one that lasts longer than all others"
        assert lanes.worth(300, 4096) == min(cores, 8)
        assert lanes.worth(300, 400_000) == cores
        few = lanes.worth(100, 2 * LEAST_TOKENS)
        assert few == (2 if cores == 2 else 1), "two lanes of eight cores"


def test_threads_that_begin_meanwhile_have_all_threads(threads, monkeypatch):
    """Each asks for its number while lanes, new ones each time, are started."""
    threads(2)
    found = []

    def ask():
        found.append(Lanes(1).count)
        found.append(torch.get_num_threads())

    for _ in range(20):
        monkeypatch.setattr(lanes_module, "_pools", {})
        new = [threading.Thread(target=ask) for _ in range(4)]
        for thread in new[:2]:
            thread.start()
        assert list(Lanes(1).map(abs, range(4), lanes=2)) == [0, 1, 2, 3]
        for thread in new[2:]:
            thread.start()
        for thread in new:
            thread.join()
        for pool in lanes_module._pools.values():
            pool.shutdown()
    assert set(found) == {2}


def test_lanes_that_cannot_start_leave_nothing(threads, monkeypatch):
    threads(3)
    monkeypatch.setattr(lanes_module, "_pools", {})
    start, started = threading.Thread.start, []

    def refuse_the_third(thread):
        started.append(thread)
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_third)
    with pytest.raises(RuntimeError, match="can't start"):
        next(Lanes(1).map(abs, range(9), lanes=3))
    monkeypatch.undo()
    for thread in started[:2]:
        thread.join(20)
        assert not thread.is_alive()
    assert torch.get_num_threads() == 3


def test_batches_are_planned_in_no_time_however_lengths_divide():
    for length in (2100, 902, 5000):
        began = time.process_time()
        batches = list(plan_batches([length] * 4000, 4096, 2))
        assert time.process_time() - began < 5  # seconds; a minute where each try adds two
        assert max(len(batch) for batch in batches) == max(1, 4096 // length)


@given(
    lengths=st.lists(st.integers(3, 1500), min_size=1, max_size=90),
    lanes=st.sampled_from([2, 3, 8, 32]),
)
@examples(60)
def test_even_batches_hold_all_and_as_much_as_each_other(lengths, lanes):
    batches = list(plan_batches(lengths, 1024, lanes))
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in batch) for batch in batches]
    assert all(load <= 1024 or len(batch) == 1 for load, batch in zip(loads, batches, strict=True))
    shortest = [min(lengths[index] for index in batch) for batch in batches]
    assert all(
        load - last <= min(loads) or len(batch) == 1
        for load, last, batch in zip(loads, shortest, batches, strict=True)
    ), "the last to be added went to the batch that had least"
    total = sum(lengths)
    rounds = total / (lanes * even_tokens(total, 1024, lanes))
    assert rounds <= -(-total // (lanes * 1024))
    assert even_tokens(total, 1024, lanes) <= 1024


def test_a_forked_child_makes_lanes_of_its_own(threads):
    threads(2)
    assert list(Lanes(1).map(abs, [-1, -2], lanes=2)) == [1, 2]
    child = os.fork()
    if child == 0:
        good = list(Lanes(1).map(abs, [-3, -4], lanes=2)) == [3, 4]
        os._exit(0 if good else 1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    assert ended[1] == 0
