"""Records that kill their engine: found by halving, noted on disk, and nobody else to blame."""

import pytest
from budgets import examples
from hypothesis import given
from hypothesis import strategies as st

from raptide.bulk.process import Death
from raptide.bulk.search import DEADLY, Notes, compute_surely
from raptide.bulk.work import Rejected
from raptide.errors import RaptideError
from raptide.storage import Storage

CANARY = "canary"


class Killed(BaseException):
    """The job itself ends, as by kill -9."""


class Engine:
    """Dies of what `deadly` says; ends the job at the `kill_at`-th call."""

    def __init__(self, deadly, kill_at=None):
        self.deadly, self.kill_at, self.calls = deadly, kill_at, []

    def __call__(self, items):
        self.calls.append(list(items))
        if len(self.calls) == self.kill_at:
            raise Killed
        if self.deadly(items):
            raise Death(f"killed: by {len(items)}")
        return [f"value of {item}" for item in items]


def search(folder, items, engine):
    return compute_surely(items, engine, Notes(Storage.of(folder), "u"), CANARY)


def noted(folder):
    return len(list(folder.glob("deaths/u/*")))


@examples(60)
@given(
    st.lists(st.integers(0, 30).map(str), min_size=1, max_size=24),
    st.sets(st.integers(0, 30).map(str), max_size=3),
    st.lists(st.integers(1, 12), max_size=4),
)
def test_the_deadly_are_rejected_and_no_death_is_repeated_after_a_kill(
    tmp_path_factory, items, deadly, kills
):
    folder = tmp_path_factory.mktemp("search")
    expected = [Rejected("killed: by 1") if i in deadly else f"value of {i}" for i in items]
    deaths = {}
    for kill_at in [*kills, None]:
        engine = Engine(lambda some: bool(deadly & set(some)), kill_at)
        try:
            assert search(folder, items, engine) == expected
        except Killed:
            engine.calls.pop()
        for call in map(tuple, engine.calls):
            if deadly & set(call):
                deaths[call] = deaths.get(call, 0) + 1
    different = list(dict.fromkeys(items))
    for call, times in deaths.items():
        most = DEADLY if len(call) in (1, len(different)) else 1
        assert times <= most, f"{len(call)} records died {times} times"
    notes = Notes(Storage.of(folder), "u")
    notes.forget()
    assert not (folder / "deaths/u").exists()


@pytest.mark.parametrize("items", [["a"], ["a", "b", "c"]])
def test_an_engine_that_dies_of_everything_ends_the_job_and_blames_nobody(tmp_path, items):
    with pytest.raises(RaptideError, match=r"dies of a plain protein too \(killed: by 1\)"):
        search(tmp_path, items, Engine(lambda some: True))
    assert not noted(tmp_path), "with more memory they might all be computed"
    assert search(tmp_path, items, Engine(lambda some: False)) == [f"value of {i}" for i in items]


def test_records_that_die_only_together_end_the_job_and_may_be_tried_again(tmp_path):
    items = list("abcdefgh")
    engine = Engine(lambda some: len(some) > 5)
    with pytest.raises(RaptideError, match=r"dies of 8 records together \(killed: by 8\)"):
        search(tmp_path, items, engine)
    assert search(tmp_path, items, Engine(lambda some: False)) == [f"value of {i}" for i in items]


def test_a_death_by_chance_rejects_nobody_and_equal_records_are_computed_once(tmp_path):
    left = [1]
    engine = Engine(lambda some: bool(left and left.pop()))
    assert search(tmp_path, list("abab"), engine) == [f"value of {i}" for i in "abab"]
    assert engine.calls == [["a", "b"], ["a", "b"]]
    left = [1, 1]  # twice, so that it is searched for, and in the search no more
    assert search(tmp_path / "2", list("abab"), Engine(lambda some: bool(left and left.pop()))) == [
        f"value of {i}" for i in "abab"
    ]
    left = [1]
    assert search(tmp_path / "3", ["a"], Engine(lambda some: bool(left and left.pop()))) == [
        "value of a"
    ]
