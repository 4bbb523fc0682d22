"""What becomes of an error of a worker: another start, or the end."""

from types import SimpleNamespace

import pytest
import ray
from lone_worker import LoneWorker
from ray.train.v2._internal.execution.train_fn_utils import set_train_fn_utils

from raptide.errors import CorpusError, RaptideError, StorageStumbled, StreamStalled
from raptide.training import group
from raptide.training.planning.recipe import TrainingSettings
from raptide.training.watching.progress import BoardActor


@pytest.fixture
def start(cluster, alone, tmp_path, monkeypatch):
    """Starts one worker, whose training fails with an error."""
    recipe = SimpleNamespace(training=TrainingSettings(steps=1, micro_batch_rows=1))
    board = BoardActor.remote()
    run = SimpleNamespace(recipe=recipe, folder=str(tmp_path), device="cpu", board=board)
    storage = SimpleNamespace(name="run", storage_filesystem=None, storage_path=str(tmp_path))

    def start(error):
        def fail(*args):
            raise error

        monkeypatch.setattr(group, "Worker", fail)
        group.train_worker({"run": run})

    monkeypatch.setattr(group, "prepare_process", lambda *args, **kwargs: None)
    set_train_fn_utils(LoneWorker(storage))
    start.mistake = lambda: ray.get(board.mistake.remote())
    yield start
    set_train_fn_utils(None)


@pytest.mark.parametrize("kind", [StreamStalled, StorageStumbled, ValueError])
def test_what_may_be_over_at_the_next_start_is_left_to_it(start, kind):
    for _ in range(2):
        with pytest.raises(kind, match="not now"):
            start(kind("not now"))
    assert start.mistake() is None


@pytest.mark.parametrize("kind", [CorpusError, RaptideError])
def test_what_no_start_mends_ends_the_run_at_once(start, kind):
    with pytest.raises(kind, match="never"):
        start(kind("never"))
    assert str(start.mistake()) == "never"
    start(AssertionError("nobody starts again"))
