"""A run on one worker inside this process: the same loop without Ray Train's processes around it.

Ray Train starts six of them for a run, each of which imports for seconds. A test that is about what
the worker does, and not about how it is started or restarted, needs none. Nor does it need Ray
Data, of which tests/data/streaming hold that it gives out these rows in this order.
"""

import contextlib
import itertools
import os
import shutil
import threading
from types import SimpleNamespace
from unittest import mock

import ray
import torch._dynamo  # noqa: F401  before a worker switches it off for all that import it later
import torch.distributed as dist
from ray.train.v2._internal.execution.context import set_train_context
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2._internal.execution.train_fn_utils import LocalTrainFnUtils, set_train_fn_utils
from small_runs import run_to_the_end

from raptide.data.streaming import stream
from raptide.data.streaming.feeder import Feeder
from raptide.training import trainer, worker
from raptide.training.lean import Lean
from raptide.training.meeting import RoomForAll


class LoneWorker(LocalTrainFnUtils):
    """What Ray Train's functions do here: its local mode, with a storage and with saves to it."""

    def __init__(self, run_config):
        super().__init__(run_config.name)
        self._uploads = []
        storage = SimpleNamespace(
            storage_filesystem=run_config.storage_filesystem,
            experiment_fs_path=f"{run_config.storage_path}/{run_config.name}",
        )
        self.get_context().get_storage = lambda: storage

    def report(self, metrics, checkpoint, checkpoint_dir_name, *, checkpoint_upload_fn, **_):
        def upload():
            checkpoint_upload_fn(checkpoint, checkpoint_dir_name)
            shutil.rmtree(checkpoint.path)

        self._uploads.append(threading.Thread(target=upload))
        self._uploads[-1].start()

    def join(self):
        for upload in self._uploads:
            upload.join()


class LoneTrainer:
    """In the place of TorchTrainer."""

    def __init__(self, loop, *, train_loop_config, run_config, scaling_config, **_):
        assert scaling_config.num_workers == 1
        assert [type(each) for each in run_config.callbacks] == [RoomForAll, Lean]
        sent = ray.cloudpickle.dumps((loop, train_loop_config))  # as it would reach a worker
        self._loop, self._config = ray.cloudpickle.loads(sent)
        self._worker = LoneWorker(run_config)

    def fit(self):
        set_train_fn_utils(self._worker)
        set_train_context(SimpleNamespace(preemption_context=PreemptionContext()))
        try:
            with mock.patch.dict(os.environ, {"LOCAL_RANK": "0"}):
                self._loop(self._config)
        finally:
            self._worker.join()
            set_train_fn_utils(None)
            set_train_context(None)


@contextlib.contextmanager
def group_of_one(folder):
    """A process group of one; no second one in a process, since DeepSpeed keeps the first."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class FeederHere:
    """In the place of the feeder's actor: a `Feeder` of this process."""

    def options(self, **_):
        return self

    def remote(self, *arguments, run, **how):
        feeder = Feeder(*arguments, **how)
        return SimpleNamespace(
            fetch=SimpleNamespace(remote=lambda *asked: ray.put(feeder.fetch(*asked)))
        )


def tables_here(plan, cursor, tokens):
    """In the place of Ray Data: each block's packed rows, when they are asked for."""
    places = stream.open_plan(plan).mixture.epoch_places
    for place in itertools.count(cursor.epoch * places + cursor.block):
        yield stream._prepare_table(plan, place, places)


def run_here(recipe, folder, *, resume=False, ray_data=False, **more):
    """`run_to_the_end` of a run on one worker; within `group_of_one`, as in the fixture `alone`.

    Args:
        ray_data: let Ray Data prepare the rows, in a feeder of its own process.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(trainer, "TorchTrainer", LoneTrainer))
        if not ray_data:
            stack.enter_context(mock.patch.object(worker, "FeederActor", FeederHere()))
            stack.enter_context(mock.patch.object(stream, "_packed_tables", tables_here))
        return run_to_the_end(recipe, folder, resume=resume, **more)
