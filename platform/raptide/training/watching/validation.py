"""Evaluation of checkpoints beside the training: tasks on what the cluster has free.

Ray Train could start them too (`ValidationConfig`), but it asks for the same resources from the
first to the last, which with GPUs may never come free, and a task whose process dies ends the run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray._private.state import available_resources_per_node
from ray.exceptions import GetTimeoutError, RayError

from raptide.data.streaming.stream import StreamPlan
from raptide.errors import CheckpointError, StorageStumbled, Superseded
from raptide.model.formats.detect import read_weights
from raptide.training.checkpoints.checkpoint import MODEL, open_checkpoint
from raptide.training.checkpoints.keeping import amend_manifest, awaiting_evaluation, best_effort
from raptide.training.checkpoints.owned import Storage, checkpoint_step
from raptide.training.planning.estimate import DTYPES
from raptide.training.planning.recipe import Recipe
from raptide.training.watching.heldout import (
    BenchValue,
    Evaluation,
    Evaluations,
    HeldoutEvaluator,
    heldout_rows,
)

Bench = Callable[[Path, int], dict[str, BenchValue]]
"""Called with a bundle and the CPUs that it may take; gives main metrics by name, such as
`contacts/p@l/long`. Handed in by the job, since training does not know the evaluation."""

MOST_CPUS = 16
"""Logical CPUs that an evaluation takes at most."""

POLL_S = 0.2
"""Seconds between two looks once the run has nothing else to do."""


class RunEvaluations:
    """What the evaluations of a run have come to, and those beside the training.

    Rank 0 starts these, one after the other. A task ends with the process that started it, so none
    outlives the workers: what they leave unevaluated, the next ones find by its manifests.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: StreamPlan,
        device: str,
        board: Any,
        waiting: dict[str, float],
        so_far: Evaluations,
        storage: Storage | None = None,
        bench: Bench | None = None,
        refuse_others: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            device: what the workers train on.
            board: handle of the run's board on rank 0, None on the others.
            waiting: names of checkpoints to evaluate beside the training, oldest first, and since
                when, by `time.monotonic`; each is taken out once that has ended.
            so_far: what the run goes on from.
            storage: where the checkpoints are; that of this worker's run by default.
            bench: what checkpoints are asked beside the training besides.
            refuse_others: raises Superseded if the storage is another attempt's, whose manifests
                are its own.
        """
        self._recipe, self._plan, self._device, self._board = recipe, plan, device, board
        self._bench, self._refuse_others = bench, refuse_others
        self._storage = storage or Storage.of_ray_train()
        self.waiting = waiting
        self._task: Any = None
        self._unlogged: list[dict[str, float]] = []
        self._unwritten: dict[str, dict[str, Any]] = {}
        """What manifests are still to say, by checkpoint."""
        self._bench_problems: set[str] = set()
        self.so_far = so_far

    def take(self, evaluation: Evaluation, step: int) -> None:
        """Count an evaluation of this step, or of an earlier one."""
        for sentence in self.so_far.collapses(evaluation):
            self._warn(f"Step {step}: {sentence}")
        problem = evaluation.bench_problem
        if problem and problem not in self._bench_problems:  # it is likely to come again and again
            self._bench_problems.add(problem)
            self._warn(
                f"Step {step}: the benchmark gave nothing ({problem}); the training goes on, and "
                "this is not said again."
            )
        self.so_far = self.so_far.after(evaluation.ece, step, evaluation.bench)
        facts = {"eval/step": step, "eval/failed": self.so_far.failed}
        self._unlogged.append(evaluation.metrics() | facts)
        if self._board is not None:
            self._board.post.remote({"heldout_ece": evaluation.ece.all_chosen})

    def take_up(self, last_step: int) -> None:
        """Let checkpoints up to a step wait again that earlier workers have left unevaluated."""
        if self._board is not None and self._recipe.evaluation.asynchronous:
            left = awaiting_evaluation(self._storage, last_step)
            self.waiting.update(dict.fromkeys(left, time.monotonic()))

    def look(self) -> None:
        """Count those that have ended beside the training, and start the next; returns at once.

        A checkpoint waits until its manifest says what came of it: nobody deletes it before.
        """
        self._write_what_is_left()
        while self.waiting:
            name = next(iter(self.waiting))
            outcome = self._look_at(name)
            if outcome is None:
                return
            if isinstance(outcome, Evaluation):
                self.take(outcome, checkpoint_step(name))
            else:
                self.so_far = self.so_far.after_failure()
                self._unlogged.append({"eval/failed": self.so_far.failed})
                self._warn(f"{name} was not evaluated beside the training: {outcome}.")
            self.write_down(name)
            del self.waiting[name]

    def wait(self, progress: Callable[[], None]) -> None:
        """Until those beside the training have ended, which is within `evaluation.timeout_s`.

        Args:
            progress: called again and again meanwhile.
        """
        self.look()
        while self.waiting:
            progress()
            time.sleep(POLL_S)
            self.look()

    def write_down(self, name: str) -> None:
        """Let a checkpoint's manifest say that it was evaluated, and what it has come to."""
        self._unwritten[name] = {**self.so_far.to_manifest(), "awaits_evaluation": False}
        self._write_what_is_left()

    def _write_what_is_left(self) -> None:
        for name, changes in list(self._unwritten.items()):
            sentence = f"What {name} has come to was not written down, and will be tried again"
            with best_effort(self._warn, sentence), suppress(Superseded):
                self._refuse_others()
                amend_manifest(self._storage, name, changes)
                del self._unwritten[name]

    def refuse_unwritten(self) -> None:
        """
        Raises:
            StorageStumbled: what a checkpoint has come to could not be written down.
        """
        if self._unwritten:
            names = ", ".join(self._unwritten)
            raise StorageStumbled(
                f"What {names} has come to could not be written down; the workers start again, "
                "evaluate it once more and try again."
            )

    def unlogged(self) -> list[dict[str, float]]:
        """Metrics of what has come since the last call."""
        taken, self._unlogged = self._unlogged, []
        return taken

    def _warn(self, sentence: str) -> None:
        self._board.warn.remote(sentence)

    def _look_at(self, name: str) -> Evaluation | str | None:
        """What has come of the oldest that waits, None while something may."""
        timeout_s = self._recipe.evaluation.timeout_s
        late = time.monotonic() - self.waiting[name] > timeout_s
        outcome: Evaluation | str | None = None
        if late:
            outcome = f"it did not end within {timeout_s:g} s on what the cluster had free"
        if self._task is None:
            self._task = None if late else self._start(name)
            return outcome
        try:
            outcome = ray.get(self._task, timeout=0)
        except GetTimeoutError:
            if not late:
                return None
            ray.cancel(self._task, force=True)
        except RayError as error:
            outcome = _first_line(error)
        self._task = None
        return outcome

    def _start(self, name: str) -> Any:
        """The task that evaluates a checkpoint, None as long as nothing is free for it."""
        options = free_resources(self._device, available_resources_per_node().values())
        if options is None:
            return None
        device = "cuda" if "num_gpus" in options else "cpu"
        return evaluate_checkpoint.options(**options).remote(
            *(self._recipe, self._plan, self._storage, name, device, options["num_cpus"]),
            self._bench,
        )


def free_resources(device: str, nodes: Iterable[Mapping[str, float]]) -> dict[str, int] | None:
    """Options for a task that would start now, None if nothing is free.

    A GPU where the run trains on GPUs and one is free, else CPUs of one node: at most half of all
    that are free, since the data tasks need some.

    Args:
        nodes: what each node has free.
    """
    nodes = list(nodes)
    if device == "cuda" and any(node.get("GPU", 0) >= 1 for node in nodes):
        return {"num_cpus": 0, "num_gpus": 1}
    free = [int(node.get("CPU", 0)) for node in nodes]
    cpus = min(max(free, default=0), sum(free) // 2, MOST_CPUS)
    return {"num_cpus": cpus} if cpus else None


@ray.remote(max_retries=1)
def evaluate_checkpoint(
    recipe: Recipe,
    plan: StreamPlan,
    storage: Storage,
    name: str,
    device: str,
    cpus: int,
    bench: Bench | None = None,
) -> Evaluation:
    """Held-out ECE of a checkpoint's bundle, in the precision that it is trained in.

    One whose process dies is started once more: where the whole run dies, its evaluation may die
    before rank 0 does, which would count that as the checkpoint's fault.

    Args:
        bench: what the bundle is asked besides; where that fails, the ECE is found all the same.

    Raises:
        CheckpointError: the checkpoint is gone or damaged.
    """
    if device == "cpu":
        torch.set_num_threads(cpus)
    saved = open_checkpoint(storage, name, only=f"{MODEL}/")
    if saved is None:
        raise CheckpointError("it is gone or damaged")
    with tempfile.TemporaryDirectory() as scratch:
        saved.copy_to(Path(scratch), only=f"{MODEL}/")
        found, problem = ask_benchmark(bench, Path(scratch) / MODEL, cpus)
        model = read_weights(Path(scratch) / MODEL).build()
    dtype = DTYPES[recipe.training.precision]
    if device == "cpu" and dtype == torch.float16:  # slow there, where there is it at all
        dtype = torch.float32
    model.to(torch.device(device), dtype)
    rows = heldout_rows(plan, recipe.evaluation)
    micro_rows, blind = recipe.training.micro_batch_rows, recipe.model.blind
    evaluator = HeldoutEvaluator(rows, plan, micro_rows, blind=blind)
    measured = evaluator.measure(model, torch.device(device))
    return replace(measured, bench=found, bench_problem=problem)


def ask_benchmark(
    bench: Bench | None, bundle: Path, cpus: int
) -> tuple[dict[str, BenchValue], str]:
    """What a benchmark gives, and why that is nothing, or ""."""
    try:
        return (bench(bundle, max(cpus, 1)) if bench is not None else {}), ""
    except Exception as error:  # data may be gone, and tasks have errors of their own
        return {}, _first_line(error)


def _first_line(error: Exception) -> str:
    lines = str(getattr(error, "cause", None) or error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
