"""The runs of a study, several at once, each by the ordinary trainer and resumed by its folder."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from raptide.errors import RaptideError, plain_errors
from raptide.evaluation.beside import RunBenchmark
from raptide.scaling.study import PlannedRun
from raptide.training.planning.recipe import Recipe
from raptide.training.planning.resuming import with_absolute_paths
from raptide.training.planning.room import Room, worker_needs
from raptide.training.run_folder import standing_of_run
from raptide.training.trainer import prepare_run, pretrain

Say = Callable[[str], None]

GONE_S = 30.0
"""Seconds that runs which are ended get to be gone."""


@dataclass(frozen=True)
class Ending:
    """How a run of a study has ended."""

    run: PlannedRun
    folder: Path
    problem: str = ""
    """Why it did not come to its end, or ""."""


def slots(runs: Sequence[PlannedRun], device: str, room: Room) -> int:
    """Runs that have room side by side on the nodes that are there, at least one."""
    fits = [
        room.fits_now(worker_needs(run.recipe, device)) // run.recipe.cluster.max_workers
        for run in runs
    ]
    return max(1, min(fits))


def unfinished(runs: Sequence[PlannedRun], folder: Path) -> list[PlannedRun]:
    """The runs that are to be trained, or to their end.

    Args:
        folder: of the runs' folders.

    Raises:
        InputError: a run's folder holds another run, or something else.
    """
    return [r for r in runs if standing_of_run(folder / r.name, r.recipe) != "finished"]


def train_all(
    runs: Sequence[PlannedRun], folder: Path, at_once: int, say: Say
) -> Generator[Ending, None, None]:
    """Train what is not finished yet; an ending a run, as they end. Ray must be running.

    Closed early, it ends the runs that are under way, which go on from their checkpoints next time.

    Args:
        folder: of the runs' folders.
        at_once: runs that train side by side.

    Raises:
        InputError: a run's folder holds another run, or something else; nothing has started then.
    """
    waiting = unfinished(runs, folder)
    yield from [Ending(run, folder / run.name) for run in runs if run not in waiting]
    going: dict[Any, PlannedRun] = {}
    try:
        while waiting or going:
            while waiting and len(going) < at_once:
                run = waiting.pop(0)
                say(f"{run.name}: started")
                recipe = with_absolute_paths(run.recipe)
                going[train_one.remote(recipe, str(folder / run.name))] = run
            (ended, *_), _ = ray.wait(list(going))
            run = going.pop(ended)
            yield Ending(run, folder / run.name, _problem(ended))
    finally:  # whoever stops early leaves no run behind; its checkpoints stay
        for task in going:
            ray.cancel(task, force=True)
        if going:  # their folders are free once they are gone
            ray.wait(list(going), num_returns=len(going), timeout=GONE_S)


def _problem(task: Any) -> str:
    """Why a run's task came to nothing, or ""."""
    try:
        with plain_errors():
            ray.get(task)
    except RaptideError as error:
        return str(error)
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[-1]
    return ""


@ray.remote(num_cpus=0, max_retries=0)
def train_one(recipe: Recipe, folder: str) -> None:
    """One run from wherever it stands to its end, in a process of its own.

    The task takes no CPU: it only waits for the run's workers, which take theirs.
    """
    path = Path(folder)
    standing = standing_of_run(path, recipe)
    bench = None
    if recipe.evaluation.benchmark is not None:
        bench = RunBenchmark(recipe.evaluation.benchmark, folder)
        bench.check()
    plan = prepare_run(recipe, path, resume=standing == "saved", begun=standing == "begun")
    pretrain(recipe, plan, path, bench=bench)
