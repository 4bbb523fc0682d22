"""One start of a run's workers: what Ray Train runs on each, and what becomes of their errors.

Ray Train starts the workers again after any error, `cluster.max_failures` times. What may be over
by then, or cannot be told, is left to that; what no start mends is told to the driver, and whoever
starts afterwards gives up.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

from raptide.errors import OutOfMemory, PassingTrouble, RaptideError
from raptide.training.planning.estimate import explain_memory, ran_out_of_memory
from raptide.training.process import prepare_process
from raptide.training.watching.watch import describe_hang
from raptide.training.worker import Run, Worker

ATTEMPTS = "attempts"
"""File of a run that says how often its workers were started."""


def train_worker(config: dict[str, Any]) -> None:
    """The Ray Train loop function; `config["run"]` is a `Run`."""
    run: Run = config["run"]
    training = run.recipe.training
    prepare_process(run.device, training.precision, compiles=training.compile)
    rank = ray.train.get_context().get_world_rank()
    attempt = broadcast_from_rank_zero(_begin_attempt(run) if rank == 0 else None)
    if attempt is None:  # Ray Train restarts after any error; this one no restart can mend
        return
    try:
        with ExitStack() as stack:
            Worker(run, attempt, stack).train()
    except PassingTrouble:
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


def _begin_attempt(run: Run) -> int | None:
    """How often the workers of this run have started, or None if they should give up."""
    if ray.get(run.board.mistake.remote()) is not None:
        return None
    file = Path(run.folder) / ATTEMPTS
    attempt = int(file.read_text()) + 1 if file.exists() else 1
    file.write_text(f"{attempt}\n")
    if (hang := describe_hang(Path(run.folder), attempt - 1)) is not None:
        run.board.warn.remote(hang)
    return attempt
