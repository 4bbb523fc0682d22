"""A rank that holds the others up is named; one that is slow for a moment is not."""

import statistics
import time

import draws
import pytest
import torch

from raptide.training.step import ForwardTime
from raptide.training.watching import ranks
from raptide.training.watching.progress import Board, describe_state
from raptide.training.watching.ranks import LOOKS, BoardWatch, RankTimes, medians_of_others


def look(times, seconds, attempt=1):
    for rank, each in enumerate(seconds):
        times.take(attempt, rank, f"node{rank // 2}", each)
    return times.slowest()


@pytest.mark.parametrize("number", [2, 3, 16])
def test_a_slow_rank_is_named_after_several_looks(number):
    rng, times = draws.generator(), RankTimes()
    slow = int(rng.integers(number))
    for nth in range(1, LOOKS + 1):
        seconds = 1e-5 * rng.uniform(0.95, 1.05, number)
        seconds[slow] = 1.6e-5
        found = look(times, seconds)
        assert (found.rank, found.where) == (slow, f"node{slow // 2}")
        assert found.ratio == pytest.approx(1.6, rel=0.1)
        assert found.stands_out == (nth == LOOKS)
    assert found.warning.startswith(f"Rank {slow} on node{slow // 2} takes 1.")


def test_the_noise_of_equal_ranks_names_nobody():
    rng, times = draws.generator(), RankTimes()
    for _ in range(30):
        assert not look(times, 1e-5 * rng.uniform(0.9, 1.1, 8)).stands_out


def test_a_moments_load_names_nobody():
    times = RankTimes()
    for nth in range(12):
        slow = 3.0 if nth % LOOKS == 0 else 1.0
        assert not look(times, [1.0, slow, 1.0]).stands_out


def test_new_workers_begin_anew():
    times = RankTimes()
    for _ in range(LOOKS):
        assert look(times, [1.0, 2.0, 1.0]) is not None
    times.take(2, 0, "node0", 1.0)
    assert times.slowest() is None, "the times of ranks that are gone do not count"
    assert not look(times, [1.0, 2.0, 1.0], attempt=2).stands_out
    assert look(times, [9.0, 1.0, 1.0], attempt=1).rank == 1, "whoever stood still is late"


class Handle:
    """A board in this process, called as an actor's handle is."""

    def __init__(self, board):
        self.board = board

    def __getattr__(self, name):
        method = getattr(self.board, name)

        class Remote:
            @staticmethod
            def remote(*given):
                return method(*given)

        return Remote


class Micro:
    def __init__(self, tokens):
        self.packed = type("Packed", (), {"tokens_T": torch.zeros(tokens)})()


class Share:
    def __init__(self, *tokens):
        self.micro = tuple(Micro(each) for each in tokens)


@pytest.fixture
def group(monkeypatch):
    """Board, two ranks' watches, and a clock that tests set."""
    clock = {"now": 0.0}
    monkeypatch.setattr(ranks.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(ranks.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setattr(ranks.ray, "get", lambda value: value)
    monkeypatch.setattr(ranks.ray, "wait", lambda calls, timeout: (calls, []))
    board = Board()
    return board, [BoardWatch(Handle(board), rank, 1) for rank in (0, 1)], clock


def train(watches, seconds, steps=5, tokens=(100, 50)):
    for _ in range(steps):
        for watch, each in zip(watches, seconds, strict=True):
            watch.took(each, Share(*tokens))
    for watch in reversed(watches):
        watch.look()
    for watch in watches:
        watch.hear()


def test_it_is_named_in_the_line_the_metrics_and_the_log_and_once(group):
    board, watches, _ = group
    for _ in range(LOOKS + 2):
        train(watches, [0.15, 0.3])
    state, warnings = board.read()
    assert watches[0].metrics == {"speed/slowest_rank": 1, "speed/slowest_rank_ratio": 2.0}
    assert watches[1].metrics == {}, "rank 0 logs for all"
    assert "(10.0.0.7) 2.0x slower" in describe_state(state, 9)[-1]
    assert len([each for each in warnings if each.startswith("Rank 1 on ")]) == 1


def test_fewer_tokens_are_less_work_and_no_better_rank(group):
    _, watches, _ = group
    for _ in range(LOOKS + 1):
        for _ in range(4):
            watches[0].took(0.3, Share(100, 200))
            watches[1].took(0.1, Share(100))
            watches[1].took(0.0, Share(0))  # surplus slots are empty
        train(watches, [], steps=0)
    assert watches[0].metrics["speed/slowest_rank_ratio"] == pytest.approx(1.0)


def test_after_five_minutes_nothing_is_sent_and_nothing_shown(group):
    board, watches, clock = group
    for _ in range(LOOKS + 1):
        train(watches, [0.15, 0.3])
    clock["now"] = ranks.WATCHED_S + 1
    train(watches, [0.15, 0.3])
    assert watches[0].metrics == {}
    assert board.read()[0]["slowest"] is None
    sent = []
    board.took = lambda *given: sent.append(given)
    train(watches, [0.15, 0.3])
    assert sent == []


def test_rank_0_hears_that_the_run_is_to_leave(group):
    board, watches, _ = group
    train(watches, [0.1, 0.1])
    assert not watches[0].leave
    board.leave()
    train(watches, [0.1, 0.1])
    assert [watch.leave for watch in watches] == [True, False]


def test_no_rank_waits_for_a_board_that_is_busy(group, monkeypatch):
    board, watches, _ = group
    board.leave()
    monkeypatch.setattr(ranks.ray, "wait", lambda calls, timeout: ([], calls))
    monkeypatch.setattr(ranks.ray, "get", lambda call: pytest.fail("rank 0 waits"))
    asked = []
    notices, board.notices = board.notices, lambda: asked.append(1) or notices()
    for _ in range(3):
        train(watches, [0.1, 0.1])
    assert not watches[0].leave
    assert len(asked) == 1, "one question is on its way"
    monkeypatch.setattr(ranks.ray, "wait", lambda calls, timeout: (calls, []))
    monkeypatch.setattr(ranks.ray, "get", lambda value: value)
    watches[0].took(0.1, Share(100))
    assert watches[0].leave


@pytest.mark.parametrize("number", [2, 3, 4, 9, 10])
def test_medians_of_others_are_those_without_each(number):
    values = draws.generator().integers(0, 6, number).astype(float)
    expected = [statistics.median([*values[:i], *values[i + 1 :]]) for i in range(number)]
    assert medians_of_others(values).tolist() == expected


def test_a_look_at_many_ranks_takes_no_time():
    times, number = RankTimes(), 8192
    for rank in range(number):
        times.take(1, rank, "node", 1.0 + rank / number)
    began = time.perf_counter()
    assert times.slowest().rank == number - 1
    assert time.perf_counter() - began < 1.0, "a sort for every rank takes many seconds"


def test_forward_time_counts_passes_alone_and_each_once():
    forward = ForwardTime(torch.device("cpu"))
    with forward.pass_through():
        total = sum(range(200_000))
    assert total
    first = forward.seconds()
    assert first > 0
    sum(range(200_000))
    assert forward.seconds() == 0.0
