"""SIGTERM: the board is told where there is something to save, else it ends at once."""

import os
import signal
import threading
import time

import pytest

from raptide.training.watching import leaving
from raptide.training.watching.progress import Board


class Interrupted(Exception):
    pass


@pytest.fixture
def board(monkeypatch):
    """A board in this process; SIGTERM raises `Interrupted` where nothing else handles it."""
    monkeypatch.setattr(leaving, "POLL_S", 0.01)
    monkeypatch.setattr(leaving.ray, "get", lambda call: call())

    def interrupt(number, frame):
        raise Interrupted

    before = signal.signal(signal.SIGTERM, interrupt)
    board = Board()

    class Handle:
        def __getattr__(self, name):
            method = getattr(board, name)
            return type("Remote", (), {"remote": staticmethod(lambda: method)})

    board.handle = Handle()
    yield board
    assert signal.signal(signal.SIGTERM, before) is interrupt, "it is put back"


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_run_that_trains_is_told_and_goes_on_until_it_has_left(board):
    board.post({"phase": "training on 2"})
    with leaving.saved_on_sigterm(board.handle):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: board.notices()[0])
        time.sleep(0.1)
        board.post({"phase": leaving.LEFT})
        time.sleep(0.1)
    assert any("saves first" in sentence for sentence in board.read()[1])


def told_until_it_ends(board, signals):
    with leaving.saved_on_sigterm(board.handle):
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: board.notices()[0])
        wait_until(lambda: False)


@pytest.mark.parametrize("phase", ["loading DeepSpeed", "evaluating", None])
def test_a_run_that_does_not_train_ends_at_once(board, phase):
    board.post({"phase": phase} if phase else {})
    with pytest.raises(Interrupted):
        told_until_it_ends(board, 1)


def test_a_second_signal_ends_it_at_once(board):
    board.post({"phase": "training on 2"})
    with pytest.raises(Interrupted):
        told_until_it_ends(board, 2)


def test_a_run_that_ends_by_itself_leaves_no_thread(board):
    before = threading.active_count()
    with leaving.saved_on_sigterm(board.handle):
        pass
    assert threading.active_count() == before
    assert not board.notices()[0]


def test_outside_of_the_main_thread_nothing_changes(board):
    seen = []

    def run():
        with leaving.saved_on_sigterm(board.handle):
            seen.append(signal.getsignal(signal.SIGTERM).__name__)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == ["interrupt"]
