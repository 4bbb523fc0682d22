"""Two drivers of one run at the same time: the later one owns it, the other one ends."""

import json
import shutil
import socket
import threading
import time

import pytest
import storages
from lone_worker import run_here
from small_runs import EVERY, as_recipe, losses, make_recipe, run_to_the_end

from raptide.attempts import Attempts
from raptide.errors import Superseded
from raptide.kept import CACHE
from raptide.training.checkpoints.checkpoint import newest_checkpoint
from raptide.training.checkpoints.owned import BEFORE, Storage, counted_names
from raptide.training.mirror import mirrored
from raptide.training.watching.audit import audited_steps

AHEAD = 20 * EVERY
"""Further than the earlier driver comes before the later one has begun."""


@pytest.fixture(params=["local", pytest.param("uri", marks=pytest.mark.thorough)])
def place(request, tmp_path, monkeypatch):
    """Where the checkpoints go, and the two folders of the run."""
    if request.param == "local":
        yield TwoFolders(tmp_path)
    else:
        with storages.bucket("drivers") as uri:
            yield TwoMachines(uri.format("runs/contested"), tmp_path, monkeypatch)


class TwoFolders:
    """As where a job is tried again while its first attempt still lives on another machine: each
    has a run folder of its own here, so that no lock tells them of each other."""

    def __init__(self, scratch):
        self.storage = (scratch / "storage").as_uri()
        self._scratch = scratch

    def earlier(self):
        return self._scratch / "earlier", None

    def later(self):
        shutil.copytree(self._scratch / "earlier", self._scratch / "later")
        return self._scratch / "later", None


class TwoMachines:
    """The run lives at a URI, and neither machine sees what is on the other."""

    storage = None

    def __init__(self, uri, scratch, monkeypatch):
        self._uri, self._scratch, self._monkeypatch = uri, scratch, monkeypatch

    def earlier(self):
        return self._mirror("one")

    def later(self):
        return self._mirror("two")

    def _mirror(self, machine):
        self._monkeypatch.setenv(CACHE, str(self._scratch / machine))
        with mirrored(self._uri) as mirror:
            return mirror.folder, mirror


def test_the_later_driver_owns_the_run_and_the_earlier_one_ends(alone, corpus, place):
    tree = make_recipe(corpus, steps=10**5)
    tree["checkpoint"] |= {"storage": place.storage, "keep": 2}
    tree["evaluation"]["every_steps"] = 10**5
    earlier, mirror = place.earlier()
    errors = []

    def run_earlier():
        try:
            run_to_the_end(as_recipe(tree, workers=1), earlier, mirror=mirror)
        except Superseded as error:
            errors.append(error)

    thread = threading.Thread(target=run_earlier)
    thread.start()
    storage = await_checkpoint(earlier)
    began = Attempts(storage).owner()
    later, mirror = place.later()
    step = newest_checkpoint(storage, only="model/").step
    tree["training"]["steps"] = step + AHEAD
    ended = run_here(as_recipe(tree, workers=1), later, resume=True, mirror=mirror)
    thread.join(timeout=120)
    assert not thread.is_alive(), "the earlier driver went on"

    owner = Attempts(storage).owner()
    assert (began.number, owner.number) == (1, 2)
    assert ended.step == step + AHEAD
    assert newest_checkpoint(storage).step == ended.step
    before = Attempts(storage).facts(owner)[BEFORE]  # the earlier one may have come further by then
    assert all(name.endswith(owner.name) or name in before for name in counted_names(storage))
    assert counted_names(storage)[-1].endswith(owner.name)
    assert max(losses(later)) == ended.step
    (error,) = errors
    assert f"({owner.name}, process " in str(error)
    assert f" on {socket.gethostname()}, since 20" in str(error)
    if mirror is not None:  # what the later one has sent is not written over
        mirror.fetch_all()
        assert [step for step, _ in audited_steps(later)] == list(range(1, ended.step + 1))
        assert sorted(losses(later)) == list(range(1, ended.step + 1))
        assert json.loads((later / "result.json").read_text())["step"] == ended.step


def await_checkpoint(run):
    """The storage of a run, once it has a checkpoint that counts."""
    until = time.monotonic() + 240
    while time.monotonic() < until:
        if (run / "run.json").exists():
            storage = Storage.of_run(run)
            if newest_checkpoint(storage, only="model/", skipped=lambda told: None) is not None:
                return storage
        time.sleep(0.2)
    raise AssertionError("no checkpoint came")
