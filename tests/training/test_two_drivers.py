"""Two drivers of one run at the same time: the later one owns it, the other one ends."""

import shutil
import socket
import threading
import time

import pytest
import storages
from lone_worker import run_here
from small_runs import EVERY, as_recipe, make_recipe, run_to_the_end

from raptide.attempts import Attempts
from raptide.errors import Superseded
from raptide.training.checkpoints.checkpoint import newest_checkpoint
from raptide.training.checkpoints.owned import BEFORE, Storage, counted_names

AHEAD = 20 * EVERY
"""Further than the earlier driver comes before the later one has begun."""


@pytest.fixture(params=["local", pytest.param("bucket", marks=pytest.mark.thorough)])
def uri(request, tmp_path):
    """Where the checkpoints go."""
    if request.param == "local":
        yield (tmp_path / "storage").as_uri()
    else:
        with storages.bucket("drivers") as uri:
            yield uri.format("raptide")


def test_the_later_driver_owns_the_run_and_the_earlier_one_ends(alone, corpus, tmp_path, uri):
    """As where a job is tried again while its first attempt still lives on another machine: each
    has a run folder of its own here, so that no lock tells them of each other."""
    tree = make_recipe(corpus, steps=10**5)
    tree["checkpoint"] |= {"storage": uri, "keep": 2}
    tree["evaluation"]["every_steps"] = 10**5
    earlier, later = tmp_path / "earlier", tmp_path / "later"
    errors = []

    def run_earlier():
        try:
            run_to_the_end(as_recipe(tree, workers=1), earlier)
        except Superseded as error:
            errors.append(error)

    thread = threading.Thread(target=run_earlier)
    thread.start()
    storage = await_checkpoint(earlier)
    began = Attempts(storage).owner()
    shutil.copytree(earlier, later)
    step = newest_checkpoint(storage, only="model/").step
    tree["training"]["steps"] = step + AHEAD
    ended = run_here(as_recipe(tree, workers=1), later, resume=True)
    thread.join(timeout=120)
    assert not thread.is_alive(), "the earlier driver went on"

    owner = Attempts(storage).owner()
    assert (began.number, owner.number) == (1, 2)
    assert ended.step == step + AHEAD
    assert newest_checkpoint(storage).step == ended.step
    before = Attempts(storage).facts(owner)[BEFORE]  # the earlier one may have come further by then
    assert all(name.endswith(owner.name) or name in before for name in counted_names(storage))
    assert counted_names(storage)[-1].endswith(owner.name)
    (error,) = errors
    assert f"({owner.name}, process " in str(error)
    assert f" on {socket.gethostname()}, since 20" in str(error)


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
