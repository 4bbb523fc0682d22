"""One start of a run's workers: what Ray Train runs on each, and what becomes of their errors.

Ray Train starts the workers again after any error, `cluster.max_failures` times. What may be over
by then, or cannot be told, is left to that; what no start mends is told to the driver, and whoever
starts afterwards gives up.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

from raptide.attempts import Attempt, Attempts
from raptide.errors import OutOfMemory, PassingTrouble, RaptideError, Superseded
from raptide.patience import patiently
from raptide.training.checkpoints.owned import DRIVER, Storage, begin_attempt
from raptide.training.planning.estimate import explain_memory, ran_out_of_memory
from raptide.training.process import prepare_process
from raptide.training.run import Run
from raptide.training.watching.watch import describe_hang
from raptide.training.worker import Worker

COUNTED = "attempts"
"""File of a run in which earlier versions counted the starts of its workers."""


def train_worker(config: dict[str, Any]) -> None:
    """The Ray Train loop function; `config["run"]` is a `Run`."""
    run: Run = config["run"]
    training = run.recipe.training
    prepare_process(run.device, training.precision, compiles=training.compile)
    rank = ray.train.get_context().get_world_rank()
    try:
        attempt = Attempt.of(broadcast_from_rank_zero(_begin_attempt(run) if rank == 0 else ""))
        if attempt is None:  # Ray Train starts again after any error; this one no start can mend
            return
        with ExitStack() as stack:
            Worker(run, attempt, stack).train()
        if rank == 0:  # so that the driver's last look finds all that was told
            ray.get(run.board.read.remote())
    except PassingTrouble:
        raise
    except Superseded as error:
        if not _is_ours(run):  # a worker that stood still is no reason to end its successors
            ray.get(run.board.give_up.remote(error))
        raise
    except RaptideError as error:
        ray.get(run.board.give_up.remote(error))
        raise
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        workers = ray.train.get_context().get_world_size()
        mistake = OutOfMemory(explain_memory(run.recipe, workers, rank))
        ray.get(run.board.give_up.remote(mistake))
        raise mistake from error


def _begin_attempt(run: Run) -> str:
    """Take the run over; the attempt's name, or "" if the workers should give up.

    Raises:
        Superseded: another driver has taken the run from this one.
    """
    if ray.get(run.board.mistake.remote()) is not None:
        return ""
    storage = Storage.of_ray_train()
    before = ray.get(run.board.attempts.remote())
    if before and not _is_ours(run):
        Attempts(storage).refuse_others(before[-1])
    attempt = begin_attempt(storage, above=_counted(run.folder_here), driver=run.driver)
    ray.get(run.board.began.remote(attempt.name))
    with suppress(OSError):  # what is only told
        if (hang := describe_hang(run.folder_here, attempt.number - 1)) is not None:
            run.board.warn.remote(hang)
    return attempt.name


def _counted(run: Path) -> int:
    try:
        return int(patiently((run / COUNTED).read_text))
    except (OSError, ValueError):
        return 0


def _is_ours(run: Run) -> bool:
    """Whether the run is still this driver's; one that died as it began told the board nothing."""
    attempts = Attempts(Storage.of_ray_train())
    owner = attempts.owner()
    if owner is None:
        return False
    told = ray.get(run.board.attempts.remote())
    return owner.name in told or attempts.facts(owner).get(DRIVER) == run.driver
