"""An engine in a process that dies, hangs, eats memory, or cannot be opened."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
from bulk_works import MEMORY, RAISE, SEGV, SLEEP, CountedWork, DeadlyWork, check_sum

from raptide.bulk import child
from raptide.bulk.process import STARTS, Death, EngineProcess, Limits
from raptide.errors import ConfigError, RaptideError

LIMITS = Limits(threads=1, memory_bytes=600_000_000, timeout_s=60.0)


@pytest.fixture
def started():
    """Engines of a test, ended with it."""
    made = []

    def start(work, limits=LIMITS):
        made.append(EngineProcess(work, limits))
        return made[-1]

    yield start
    for engine in made:
        engine.close()


def test_each_way_to_die_has_its_reason_and_the_next_items_are_computed(started, tmp_path):
    work = CountedWork(str(tmp_path / "log"))
    patient, hasty = started(work), started(work, replace(LIMITS, timeout_s=2.0))
    for engine, item, reason in [
        (patient, SEGV, "killed its process: SIGSEGV"),
        (patient, MEMORY, "out of memory: needed more than 0.6 GB"),
        (patient, RAISE, r"failed: ValueError at bulk_works.py:\d+"),
        (hasty, SLEEP, "timed out: took longer than 2 s"),
    ]:
        with pytest.raises(Death, match=f"^{reason}$"):
            engine.compute(["MKLV", item])
        assert engine.compute(["MKLV", "A"]) == [check_sum("MKLV"), check_sum("A")]
    assert patient.opening_s > 0


def children_of(work):
    with open(work.log) as log:
        return [int(line.split()[0]) for line in log]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("refuse", ConfigError, "^This engine opens for nobody.$"),
        ("die", RaptideError, r"dies while it opens the model \(killed its process: SIGKILL\)"),
        ("raise", RaptideError, r"dies while it opens the model \(killed its process: exit code 1"),
    ],
)
def test_an_engine_that_cannot_open_ends_in_one_sentence(started, tmp_path, how, error, message):
    engine = started(CountedWork(str(tmp_path / "log"), at_opening=how))
    began = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        engine.compute(["MKLV"])
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 20 * STARTS
    ours = [each.pid for each in psutil.Process().children()]
    commands = [
        each.info["cmdline"] or [] for each in psutil.process_iter(["cmdline"]) if each.pid in ours
    ]  # of zombies, which others have left, it is None
    assert not [command for command in commands if child.__name__ in command]


def test_memory_and_time_are_for_a_slice_and_not_for_a_unit(started, tmp_path, monkeypatch):
    work = CountedWork(str(tmp_path / "log"), seconds=0.3)
    items = ["A" * 40_000] * 8  # a slice each, as no two fit into one
    engine = started(work, replace(LIMITS, timeout_s=2.0))
    assert engine.compute(items) == [check_sum(item) for item in items]


def test_slices_hold_each_item_once_longest_first_and_fit(tmp_path):
    items = ["A" * (n * 7919 % 30_000) for n in range(1, 60)] + ["A" * 100_000]
    found = list(child.slices(CountedWork(""), items))
    assert sorted(index for some in found for index in some) == list(range(len(items)))
    lengths = [len(items[index]) for some in found for index in some]
    assert lengths == sorted(lengths, reverse=True)
    tokens = [sum(len(items[index]) + 2 for index in some) for some in found]
    assert all(t <= child.SLICE_TOKENS or len(s) == 1 for t, s in zip(tokens, found, strict=True))


def test_an_engine_killed_from_without_is_a_death_and_starts_anew(started, tmp_path):
    work = CountedWork(str(tmp_path / "log"), seconds=1.0)
    engine = started(work)
    engine.compute(["A"])
    victim = children_of(work)[-1]
    threading.Timer(0.3, os.kill, [victim, signal.SIGKILL]).start()
    with pytest.raises(Death, match="killed its process: SIGKILL"):
        engine.compute(["MKLV"])
    assert engine.compute(["A"]) == [check_sum("A")]
    assert children_of(work)[-1] != victim


def test_an_engine_dies_with_whoever_waits_for_it(tmp_path):
    """Also of kill -9, and while it computes."""
    work = CountedWork(str(tmp_path / "log"))
    ready, pid = os.pipe(), os.fork()
    if pid == 0:
        os.close(ready[0])
        threading.Timer(2.0, os.close, [ready[1]]).start()
        EngineProcess(work, Limits(1, 10**9, 100.0)).compute([SLEEP])
        os._exit(1)
    os.close(ready[1])
    while not work.computed():
        time.sleep(0.05)
    (engine,) = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ready[0])
    engine.wait(10)


def test_an_engine_that_dies_of_all_dies_of_the_canary_too(started, tmp_path):
    with pytest.raises(Death, match="SIGKILL"):
        started(DeadlyWork(str(tmp_path / "log"))).compute([DeadlyWork.canary])


def test_engines_start_without_ray():
    code = "import sys, raptide.bulk.child as c; print(sorted({'ray', 'torch'} & set(sys.modules)))"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path)
    assert done.stdout.strip() == "[]", done.stderr
