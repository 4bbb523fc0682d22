"""One rank of a run: build the engine, go on from the checkpoint, train, save."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

from raptide.attempts import Attempt
from raptide.cluster import on_this_node
from raptide.data.streaming.batch import Cursor
from raptide.data.streaming.feeder import BatchReader, FeederActor
from raptide.data.streaming.shares import BatchShare
from raptide.errors import CheckpointError, CheckpointUnsaved, StorageStumbled
from raptide.training.ahead import SharesAhead
from raptide.training.batches import Share, share_cutter
from raptide.training.checkpoints.checkpoint import MODEL, SavedCheckpoint, newest_checkpoint
from raptide.training.checkpoints.keeping import best_effort
from raptide.training.checkpoints.owned import Storage
from raptide.training.checkpoints.running_mean import RunningMean
from raptide.training.checkpoints.saving import CheckpointWriter
from raptide.training.checkpoints.scratch import scratch_folder
from raptide.training.checkpoints.step_bundle import StepBundle
from raptide.training.engine import build_engine, load_state
from raptide.training.planning.estimate import moving_s, saved_bytes
from raptide.training.planning.optimizer import learning_rate
from raptide.training.process import collect_garbage, garbage_by_hand
from raptide.training.run import Run
from raptide.training.sender import Sender, sender_of_rank
from raptide.training.step import Stepper, StepResult
from raptide.training.watching.audit import AuditWriter
from raptide.training.watching.heldout import Evaluations, HeldoutEvaluator, heldout_rows
from raptide.training.watching.leaving import LEFT, TRAINING, nodes_to_go
from raptide.training.watching.metrics import StepMetrics
from raptide.training.watching.ranks import BoardWatch
from raptide.training.watching.tracking import Tracker, start_tracking
from raptide.training.watching.validation import RunEvaluations
from raptide.training.watching.watch import HangWatch, LossWatch

LOOK_EVERY_S = 5.0
"""Seconds between two looks at what goes on beside the steps: preemption notices, evaluations."""


class Worker:
    """One rank of a run."""

    def __init__(self, run: Run, attempt: Attempt, stack: ExitStack) -> None:
        context = ray.train.get_context()
        self._run = run
        self._recipe = run.recipe
        self._rank, self._workers = context.get_world_rank(), context.get_world_size()
        self._attempt = attempt
        folder = run.folder_here
        sender = None
        if (mirror := run.mirror) is not None:
            ranks = self._rank, context.get_local_rank()
            sender = sender_of_rank(mirror, attempt.name, *ranks, run.board.warn.remote)
            stack.enter_context(closing(sender))
        timeout_s = self._recipe.cluster.hang_timeout_s
        watch = HangWatch(folder, self._rank, attempt.number, timeout_s)
        self._hang_watch = stack.enter_context(closing(watch))
        self._loss_watch = LossWatch(
            self._recipe.training.max_nonfinite_steps,
            scales_loss=self._recipe.training.precision == "fp16",
        )
        self._post(phase="loading DeepSpeed")
        self._moving_s = moving_s(self._recipe)
        self._hang_watch.progress(self._moving_s)
        cursor, so_far = self._load()
        self._hang_watch.progress(self._moving_s)
        self._writer = self._prepare_saving(context.get_local_world_size(), sender)
        self._evaluations = self._prepare_evaluations(so_far)
        reader = self._start_stream(cursor)
        rows = heldout_rows(run.plan, self._recipe.evaluation)
        self._evaluator = HeldoutEvaluator(
            *(rows, run.plan, self._recipe.training.micro_batch_rows, self._rank, self._workers),
            blind=self._recipe.model.blind,
        )
        self._measures = StepMetrics(self._recipe, run.device, self._workers)
        self._looked = time.monotonic()
        self._leaving: set[str] = set()
        self._save_at_once = self._left = False
        self._tracker = self._start_tracking(stack)
        self._stepper = Stepper(self._engine, self._workers)
        self._board_watch = BoardWatch(run.board, self._rank, attempt.number)
        cut = share_cutter(self._recipe, self._workers, self._engine.device)
        self._shares = SharesAhead(reader.shares(self._steps_left), cut, self._engine.device)
        stack.callback(self._shares.close)
        self._audit = None
        if self._recipe.tracking.audit:
            writer = AuditWriter(folder, self._rank, attempt.number, run.board.warn.remote)
            self._audit = stack.enter_context(closing(writer))

    def train(self) -> None:
        """All steps that are left, which may be none, and what a run ends with."""
        self._post(phase=f"{TRAINING} on {self._workers}", step=self._step)
        last_too = self._steps_left or self._run.bench is not None
        self._evaluations.take_up(self._step if last_too else self._step - 1)
        if self._steps_left:
            with garbage_by_hand():
                self._train_steps()
        if self._left:
            self._refuse_trouble(leaving=True)
            self._post(phase=LEFT, step=self._step)
        else:
            self._finish()

    @property
    def _steps_left(self) -> int:
        if self._improves_no_more:
            return 0
        return max(0, self._recipe.training.steps - self._step)

    def _train_steps(self) -> None:
        recipe = self._recipe
        self._hang_watch.progress()
        self._step_began = time.perf_counter()
        for share in self._shares:
            result = self._update(share)
            step_s = time.perf_counter() - self._step_began
            speed = share.batch.num_tokens / step_s
            self._post(step=self._step, loss=result.loss, step_s=step_s, tokens_per_s=speed)
            last = result.stop or self._step == recipe.training.steps
            evaluate = last or self._step % recipe.evaluation.every_steps == 0
            # A step with losses or gradients that are none is not saved: a later one will do.
            self._left = result.leave and not last and not self._loss_watch.nonfinite_steps
            last = last or self._left
            if evaluate and not recipe.evaluation.asynchronous:
                evaluation = self._evaluator.measure(self._engine, self._engine.device)
                self._evaluations.take(evaluation, self._step)
                last = last or self._improves_no_more
            self._loss_watch.refuse_divergence(self._step, last=last)
            stall_s = None
            if last or self._save_at_once or recipe.saves_after(self._step):
                beside = evaluate and recipe.evaluation.asynchronous
                beside = beside and (not last or self._run.bench is not None)
                bundle = last or evaluate or recipe.checkpoint.bundles_after(self._step)
                if last or not self._loss_watch.nonfinite_steps:
                    stall_s = self._save(share.batch.next_cursor, result.loss, beside, bundle)
            if last:
                self._hang_watch.progress(self._moving_s)
                self._writer.wait()
            self._log(share.batch, result, step_s, stall_s)
            if last:
                return
            self._hang_watch.progress()
            collect_garbage(self._step)
            self._step_began = time.perf_counter()

    def _load(self) -> tuple[Cursor, Evaluations]:
        """Build the engine, go on from the newest checkpoint.

        Returns the place in the stream, and what the evaluations have come to.
        """
        saved = self._choose_checkpoint()
        self._engine = build_engine(self._recipe, self._workers, self._run.device, saved)
        self._step, self._tokens = 0, 0
        self._newest, self._saved = saved.name if saved is not None else "", saved
        if saved is None:
            return Cursor(), Evaluations()
        load_state(self._engine, saved, self._workers)
        self._step, self._tokens = saved.step, saved.manifest["tokens"]
        return saved.cursor, Evaluations.of_manifest(saved.manifest)

    def _update(self, share: Share) -> StepResult:
        """One step, written down wherever somebody follows it."""
        recipe, batch = self._recipe, share.batch
        look = self._rank == 0 and time.monotonic() - self._looked > LOOK_EVERY_S
        result = self._stepper.step(
            share,
            learning_rate(recipe.optimizer, self._step + 1, recipe.training.steps),
            look=look,
            stop=self._rank == 0 and self._improves_no_more,
            leave=self._board_watch.leave,
            save=look and self._hears_of_leaving(),
        )
        self._board_watch.took(self._stepper.forward_s, share)
        self._step += 1
        self._tokens += batch.num_tokens
        if self._loss_watch.see(result):
            self._warn(f"The loss jumped to {result.loss:.3f} in step {self._step}.")
        if self._audit is not None:
            self._audit.write(self._step, batch)
        self._save_at_once = self._save_at_once or result.save
        if result.look:
            self._look()
        return result

    def _hears_of_leaving(self) -> bool:
        """Whether nodes are to go away that were not when this was asked before."""
        new = nodes_to_go() - self._leaving
        self._leaving |= new
        if new:
            self._warn(f"A node is to go away: saving a checkpoint after step {self._step + 1}.")
        return bool(new)

    def _look(self) -> None:
        """At what has gone on beside the steps; every rank calls it in the same step."""
        self._looked = time.monotonic()
        if self._rank == 0:
            self._writer.look()
        self._refuse_trouble()
        self._evaluations.look()
        self._board_watch.look()

    def _refuse_trouble(self, *, leaving: bool = False, last: bool = False) -> None:
        """
        Raises:
            Superseded: another attempt owns the run.
            CheckpointUnsaved: the last save failed, and the recipe says to stop then, or the run
                was to leave with it.
            StorageStumbled: it failed for what may be over by now, and was the run's last.
        """
        if self._writer.superseded is not None:
            raise self._writer.superseded
        unsaved = self._writer.problem
        if unsaved and (leaving or self._recipe.checkpoint.when_unsaved == "stop"):
            raise CheckpointUnsaved(unsaved)
        if unsaved and last and self._writer.problem_passes:
            raise StorageStumbled(unsaved)

    @property
    def _improves_no_more(self) -> bool:
        return self._evaluations.so_far.is_over(self._recipe.evaluation)

    def _finish(self) -> None:
        """Evaluate the last checkpoint if need be, and point W&B at the model.

        The last checkpoint is evaluated by the workers themselves, which have nothing else to do;
        what a benchmark asks of it, beside them as ever.
        It is there already, so that who resumes a run that dies in here comes back here.
        """
        self._refuse_trouble(last=True)
        self._hang_watch.progress()
        evaluations, name = self._evaluations, self._newest
        self._post(phase="evaluating")
        last = None
        if evaluations.so_far.step != self._step:
            self._mean.put_into(self._engine)
            last = self._evaluator.measure(self._engine, self._engine.device)
        if self._tracker is None:  # that is rank 0's
            return
        evaluations.wait(self._hang_watch.progress)
        if last is not None and evaluations.so_far.step != self._step:
            evaluations.take(last, self._step)
            evaluations.write_down(name)
        evaluations.refuse_unwritten()
        self._writer.prune(name)
        for evaluation in evaluations.unlogged():
            self._tracker.log(self._step, evaluation)
        self._link_model()

    def _link_model(self) -> None:
        assert self._tracker is not None
        with best_effort(self._warn, "W&B was not told of the model"):
            saved = newest_checkpoint(Storage.of_ray_train(), only=f"{MODEL}/")
            if saved is not None:
                facts = {"step": saved.step, **self._evaluations.so_far.to_manifest()}
                self._tracker.link("model", self._run.run_id, f"{saved.uri}/{MODEL}", **facts)

    def _log(
        self, batch: BatchShare, result: StepResult, step_s: float, stall_s: float | None
    ) -> None:
        """Metrics, made where they are kept and when they are due."""
        if self._tracker is None:
            return
        evaluations = self._evaluations.unlogged()
        due = self._step % self._recipe.tracking.log_every == 0
        if not (due or evaluations or stall_s is not None):
            return
        metrics = {
            **self._measures.loss(self._step, result),
            **self._measures.speed(batch, step_s, self._shares.last_wait_s),
            "train/spikes": self._loss_watch.spikes,
            "train/skipped_steps": self._loss_watch.skipped,
            "progress/tokens": self._tokens,
            "progress/epoch": batch.next_cursor.epoch,
            "system/restarts": self._attempt.number - 1,
            **self._board_watch.metrics,
        }
        if stall_s is not None:
            metrics["speed/checkpoint_stall_s"] = stall_s
        if self._writer.last_seconds is not None:
            metrics["speed/checkpoint_s"] = self._writer.last_seconds
            self._writer.last_seconds = None
        for evaluation in evaluations or [{}]:
            self._tracker.log(self._step, metrics | evaluation)

    def _save(self, cursor: Cursor, loss: float, evaluate_beside: bool, bundle: bool) -> float:
        """Save what this step has come to; the seconds that training stood still for it."""
        self._hang_watch.progress(self._moving_s)  # the one before may still be on its way
        started = time.perf_counter()
        run, recipe = self._run, self._recipe
        inv_freq = self._engine.module.frequencies()
        manifest = {
            "step": self._step,
            "tokens": self._tokens,
            "cursor": asdict(cursor),
            "fingerprint": run.plan.fingerprint(),
            "workers": self._workers,
            "recipe": recipe.model_dump(),
            "corpus_digest": run.plan.corpus_digest,
            "code_version": run.code_version,
            "wandb_run_id": run.run_id,
            "train_loss": loss,
            "inv_freq": None if inv_freq is None else inv_freq.tolist(),
            **self._evaluations.so_far.to_manifest(),
        }
        step_bundle = StepBundle(recipe, manifest, self._mean) if bundle else None
        self._newest = self._writer.save(
            self._engine, manifest | {"awaits_evaluation": evaluate_beside}, step_bundle
        )
        if self._save_at_once:  # the notice may be short
            self._writer.wait()
            self._save_at_once = False
        return time.perf_counter() - started

    def _prepare_saving(self, workers_here: int, sender: Sender | None) -> CheckpointWriter:
        recipe, run = self._recipe, self._run
        scratch = scratch_folder(run.run_id, f"rank-{self._rank:05d}", empty=True)
        own, others = (saved_bytes(recipe, self._workers, rank) for rank in (self._rank, 1))
        needed = own + (workers_here - 1) * others  # rank 0 asks for what it writes besides
        self._mean = RunningMean(recipe, scratch / "mean")
        if self._rank == 0:
            self._mean.take_up(self._saved)
            needed += self._mean.bytes_to_come
        send_beside = sender.send if sender is not None else None
        return CheckpointWriter(
            *(recipe.checkpoint, run.board, self._attempt, scratch, needed), send_beside=send_beside
        )

    def _prepare_evaluations(self, so_far: Evaluations) -> RunEvaluations:
        run, board = self._run, self._run.board if self._rank == 0 else None
        waiting = self._writer.unevaluated
        return RunEvaluations(
            *(run.recipe, run.plan, run.device, board, waiting, so_far),
            bench=run.bench,
            refuse_others=self._writer.refuse_others,
        )

    def _choose_checkpoint(self) -> SavedCheckpoint | None:
        """The newest checkpoint that counts, as rank 0 sees it."""
        storage = Storage.of_ray_train()
        newest = newest_checkpoint(storage, skipped=self._warn) if self._rank == 0 else None
        # By reference, since a manifest names the files of all ranks, and every rank's answer comes
        # out of one process; and as plain values: that process would import all of PyTorch.
        found = ray.put(newest and (newest.name, newest.manifest)) if self._rank == 0 else None
        found = ray.get(broadcast_from_rank_zero([found])[0])
        if found is None and self._recipe.continue_from is not None:
            raise CheckpointError(
                f"The copy of {self._recipe.continue_from} is damaged; start over with --replace."
            )
        if found is None:
            return None
        saved = SavedCheckpoint(storage, *found)
        saved.refuse_other_run(self._run.plan.fingerprint(), self._recipe)
        return saved

    def _start_stream(self, cursor: Cursor) -> BatchReader:
        """Rank 0 owns the feeder, so that it ends with this group of workers."""
        feeder = None
        if self._rank == 0:
            here = FeederActor.options(scheduling_strategy=on_this_node())
            feeder = here.remote(
                *(self._run.plan, cursor, self._steps_left, self._workers),
                first=self._step,
                blind=self._recipe.model.blind,
                run=self._run.run_id,
            )
        self._feeder = broadcast_from_rank_zero(feeder)  # kept: a feeder nobody holds is ended
        return BatchReader(self._feeder, self._rank, self._recipe.cluster.data_timeout_s)

    def _start_tracking(self, stack: ExitStack) -> Tracker | None:
        if self._rank != 0:
            return None
        run, corpora = self._run, [source.open() for source in self._run.plan.sources]
        facts = {"code_version": run.code_version, "workers": self._workers}
        tracker = start_tracking(
            *(self._recipe, run.folder_here, run.run_id, corpora, facts, self._warn)
        )
        stack.enter_context(tracker)
        tracker.link_corpora(corpora)
        return tracker

    def _post(self, **state: Any) -> None:
        if self._rank == 0:
            self._run.board.post.remote(state)

    def _warn(self, sentence: str) -> None:
        if self._rank == 0:
            self._run.board.warn.remote(sentence)
