"""Of several attempts at one thing the last one owns it."""

import re
import socket
import time

import pytest
import storages
from stumbles import fill

from raptide.attempts import KEPT, Attempt, Attempts
from raptide.errors import Superseded
from raptide.storage import Storage


@pytest.fixture(params=["local", "bucket"])
def attempts(request, tmp_path):
    if request.param == "local":
        yield Attempts(Storage.of(tmp_path))
    else:
        with storages.bucket("attempts") as uri:
            yield Attempts(Storage.at(uri.format(tmp_path.name)))


def test_the_last_that_began_owns_the_storage_and_the_loser_names_it(attempts, monkeypatch):
    assert attempts.owner() is None
    first = attempts.begin(above=4)
    attempts.refuse_others(first.name)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # clocks are not compared
    second = attempts.begin(what="ever")
    assert (first.number, second.number, attempts.owner()) == (5, 6, second)
    assert attempts.facts(second)["what"] == "ever"
    attempts.refuse_others(second.name)
    with pytest.raises(Superseded) as caught:
        attempts.refuse_others(first.name)
    sentence = str(caught.value)
    where, host = attempts.storage.path, socket.gethostname()
    assert sentence.startswith(f"Another attempt has taken over {where} ({second.name}, process ")
    assert re.search(rf" on {host}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC\); ", sentence)
    assert f"this one, {first.name}, ends" in sentence


def test_of_two_that_begin_at_once_the_higher_token_wins(attempts, monkeypatch):
    """Both have seen the same listing, and neither the other's file."""
    monkeypatch.setattr(Attempts, "refuse_others", lambda self, mine: None)
    made = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(Attempts, "all", lambda self: [])
            made.append(attempts.begin())
    monkeypatch.undo()
    assert [each.number for each in made] == [1, 1]
    loser, winner = sorted(made)
    attempts.refuse_others(winner.name)
    with pytest.raises(Superseded, match=winner.name):
        attempts.refuse_others(loser.name)


def test_files_are_bounded_and_whoever_was_deleted_with_all_else_ends(tmp_path):
    attempts = Attempts(Storage.of(tmp_path))
    made = [attempts.begin() for _ in range(KEPT + 5)]
    assert attempts.all() == made[-KEPT - 1 :]
    attempts.storage.delete("attempts")
    with pytest.raises(Superseded, match="finished or begun anew since"):
        attempts.refuse_others(made[-1].name)


def test_what_is_no_attempts_file_and_what_is_torn_is_no_harm(tmp_path):
    (tmp_path / "attempts").mkdir()
    for name in ("000009-xyz", "000009-ab.12345678.partial", "notes"):
        (tmp_path / "attempts" / name).touch()
    (tmp_path / "attempts/000003-ab").write_text('{"before": ["st')
    attempts = Attempts(Storage.of(tmp_path))
    assert attempts.owner() == Attempt(3, "ab")
    assert attempts.facts(Attempt(3, "ab")) == {}
    with pytest.raises(Superseded, match="000003-ab, on an unknown host, since"):
        attempts.refuse_others("000002-ab")
    assert attempts.begin().number == 4


def test_a_full_disk_keeps_nobody_from_beginning(tmp_path):
    with storages.small_disk(tmp_path / "disk", 1) as disk:
        (disk / "attempts").mkdir()
        (disk / "partial").mkdir()
        fill(disk)
        attempts = Attempts(Storage.of(disk))
        mine = attempts.begin(before=["x" * 100] * 100)
        attempts.refuse_others(mine.name)
        assert attempts.facts(mine) == {}
