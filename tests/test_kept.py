"""Folders by digest: whole, safe with several processes, bounded."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from raptide.errors import RaptideError
from raptide.kept import Shelf, digest_of
from raptide.training.checkpoints.checkpoint import local_checkpoint


def fill_with(**files):
    def fill(folder):
        for name, content in files.items():
            (folder / name).write_text(content)

    return fill


def refuse(folder):
    raise AssertionError("it was there already")


def names(folder):
    return sorted(each.name for each in folder.iterdir() if each.is_dir())


def aged(folder, seconds):
    os.utime(folder, (seconds, seconds))


def test_what_was_put_is_opened_by_its_digest(tmp_path):
    shelf = Shelf(tmp_path / "shelf")
    digest = shelf.put(fill_with(a="1", b="2"))
    assert shelf.put(fill_with(b="2", a="1")) == digest
    assert shelf.put(fill_with(a="2", b="1")) != digest
    found = shelf.open(digest, refuse)
    assert {each.name: each.read_text() for each in found.iterdir()} == {"a": "1", "b": "2"}


def test_what_is_missing_or_damaged_is_made_anew_and_something_else_is_refused(tmp_path):
    shelf = Shelf(tmp_path)
    digest = shelf.put(fill_with(a="1"))
    for damage in (lambda: (tmp_path / digest / "a").write_text("x"), lambda: None):
        damage()
        assert (shelf.open(digest, fill_with(a="1")) / "a").read_text() == "1"
        assert digest_of(tmp_path / digest) == digest
    (tmp_path / digest / "a").unlink()
    with pytest.raises(RaptideError, match=rf"{digest[:16]} was wanted, but"):
        shelf.open(digest, fill_with(a="2"))


def test_a_fill_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "a").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Shelf(tmp_path).put(fail)
    assert not names(tmp_path)


OPENER = """
import sys, time
from pathlib import Path
from raptide.kept import Shelf
def fill(folder):
    with open(sys.argv[3], "a") as log:
        log.write("made\\n")
    for part in range(50):
        with open(folder / "weights", "ab") as file:
            file.write(bytes([part]) * 10_000)
        time.sleep(0.002)
found = Shelf(Path(sys.argv[1])).open(sys.argv[2], fill)
print((found / "weights").stat().st_size, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start():
    """Start a process that opens a folder, says its size, and stays while its input is open."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    started = []

    def run(*arguments):
        command = [sys.executable, "-c", OPENER, *map(str, arguments)]
        process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.communicate()


def test_of_several_processes_one_makes_it_and_none_is_disturbed(tmp_path, start):
    content = b"".join(bytes([part]) * 10_000 for part in range(50))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(content)
    digest = digest_of(tmp_path / "model")
    openers = [start(tmp_path / "shelf", digest, tmp_path / "log") for _ in range(4)]
    assert [opener.stdout.readline().strip() for opener in openers] == ["500000"] * 4
    assert (tmp_path / "log").read_text() == "made\n"
    shelf = Shelf(tmp_path / "shelf")
    other = shelf.put(fill_with(a="1"))
    aged(shelf.folder / other, 1)
    shelf.trim(0)
    assert names(shelf.folder) == [digest], "what a process has open is never removed"
    for opener in openers:
        opener.communicate()
    shelf.trim(0)
    assert names(shelf.folder) == []


def test_what_was_opened_longest_ago_goes_first(tmp_path):
    shelf = Shelf(tmp_path)
    digests = [shelf.put(fill_with(a=letter * 1000)) for letter in "abcd"]
    for when, digest in enumerate(digests, 1):
        aged(tmp_path / digest, when)
    shelf.put(fill_with(a="a" * 1000))
    shelf.trim(2_500)
    assert names(tmp_path) == sorted([digests[0], digests[3]])
    aged(tmp_path / digests[0], 1)
    partial = tmp_path / "partial-of-a-killed-process"
    partial.mkdir()
    shelf.trim(2_500)
    assert partial.exists(), "its maker may be at work"
    aged(partial, 1)
    shelf.trim(2_500)
    assert not partial.exists()


def test_four_that_fetch_one_checkpoint_do_not_break_each_other(tmp_path):
    together = threading.Barrier(4)

    def copy_to(folder, only):
        (folder / "model").mkdir(parents=True)
        together.wait(30)
        (folder / "model/config.json").write_text("{}")
        together.wait(30)

    saved = SimpleNamespace(storage=SimpleNamespace(is_local=False), key="k", copy_to=copy_to)
    found, failed = [], []

    def fetch():
        try:
            found.append(local_checkpoint(tmp_path, saved))
        except Exception as error:
            failed.append(error)
            together.abort()

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert {Path(each) for each in found} == {tmp_path / "fetched/k"}
    assert names(tmp_path / "fetched") == ["k"]
