"""One start of the workers: whose the run is, and what becomes of an error."""

import uuid
from types import SimpleNamespace

import pytest
import ray
from lone_worker import LoneWorker
from pyarrow.fs import LocalFileSystem
from ray.train.v2._internal.execution.train_fn_utils import set_train_fn_utils

from raptide.attempts import Attempts
from raptide.errors import CorpusError, RaptideError, StorageStumbled, StreamStalled, Superseded
from raptide.training import group
from raptide.training.checkpoints.owned import Storage, begin_attempt
from raptide.training.planning.recipe import TrainingSettings
from raptide.training.watching.progress import BoardActor


class Does:
    """A worker that does nothing but this."""

    def __init__(self, does, attempt):
        self.train = lambda: does(attempt)


def raises(error):
    def train(attempt):
        raise error

    return train


@pytest.fixture
def driver(cluster, alone, tmp_path, monkeypatch):
    """Drivers of one run, each with a board of its own and a `start` of its only worker."""
    recipe = SimpleNamespace(training=TrainingSettings(steps=1, micro_batch_rows=1))
    filesystem = LocalFileSystem()
    config = SimpleNamespace(name="run", storage_filesystem=filesystem, storage_path=str(tmp_path))
    monkeypatch.setattr(group, "prepare_process", lambda *args, **kwargs: None)
    set_train_fn_utils(LoneWorker(config))

    def make():
        board = BoardActor.remote()
        run = SimpleNamespace(
            recipe=recipe, folder_here=tmp_path, device="cpu", board=board, driver=uuid.uuid4().hex
        )

        def start(train):
            """`train` is called with the attempt."""
            monkeypatch.setattr(group, "Worker", lambda run, attempt, stack: Does(train, attempt))
            group.train_worker({"run": run})

        return SimpleNamespace(
            start=start, run=run, mistake=lambda: ray.get(board.mistake.remote())
        )

    make.storage = Storage(filesystem, f"{tmp_path}/run")
    make.folder = tmp_path
    yield make
    set_train_fn_utils(None)


@pytest.mark.parametrize("kind", [StreamStalled, StorageStumbled, ValueError])
def test_what_may_be_over_at_the_next_start_is_left_to_it(driver, kind):
    one = driver()
    for _ in range(2):
        with pytest.raises(kind, match="not now"):
            one.start(raises(kind("not now")))
    assert one.mistake() is None


@pytest.mark.parametrize("kind", [CorpusError, RaptideError])
def test_what_no_start_mends_ends_the_run_at_once(driver, kind):
    one = driver()
    with pytest.raises(kind, match="never"):
        one.start(raises(kind("never")))
    assert str(one.mistake()) == "never"
    one.start(raises(AssertionError("nobody starts again")))


@pytest.mark.parametrize("counted", ["41\n", "", "4\0", None])
def test_starts_are_counted_on_whatever_an_earlier_version_has_left(driver, counted):
    if counted is not None:
        (driver.folder / "attempts").write_text(counted)
    numbers = []
    one = driver()
    for _ in range(2):
        one.start(lambda attempt: numbers.append(attempt.number))
    assert numbers == ([42, 43] if counted == "41\n" else [1, 2])


@pytest.mark.parametrize("at_once", [True, False])
def test_a_driver_that_was_taken_over_from_ends_and_names_the_other(driver, at_once):
    """When it looks, or when its workers start again; it does not take over again."""
    one, other, taken = driver(), driver(), []

    def lose(attempt):
        other.start(taken.append)
        if at_once:
            Attempts(driver.storage).refuse_others(attempt.name)
        raise StreamStalled("not now")

    with pytest.raises(Superseded if at_once else StreamStalled):
        one.start(lose)
    if not at_once:
        with pytest.raises(Superseded):
            one.start(raises(AssertionError("it took over again")))
    assert isinstance(one.mistake(), Superseded)
    assert f"({taken[0].name}, process" in str(one.mistake())
    assert Attempts(driver.storage).owner() == taken[0]
    assert other.mistake() is None


def test_a_worker_that_wakes_after_its_successors_have_begun_ends_alone(driver):
    """A rank that stood still is no reason to end those who go on in its place."""
    one = driver()

    def sleep_too_long(attempt):
        one.start(lambda successor: None)
        Attempts(driver.storage).refuse_others(attempt.name)

    with pytest.raises(Superseded):
        one.start(sleep_too_long)
    assert one.mistake() is None


def test_a_driver_that_finds_a_run_takes_it_over(driver):
    driver().start(lambda attempt: None)
    begin_attempt(driver.storage)
    numbers = []
    driver().start(lambda attempt: numbers.append(attempt.number))
    assert numbers == [3]


def test_a_start_that_died_as_it_began_is_the_drivers_own(driver):
    """It had taken the run over, and told nobody."""
    one, numbers = driver(), []
    one.start(lambda attempt: None)
    begin_attempt(driver.storage, driver=one.run.driver)
    one.start(lambda attempt: numbers.append(attempt.number))
    assert numbers == [3]
    assert one.mistake() is None
