"""What each Ray Train worker runs: build the engine, go on from the checkpoint, train, save."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.collective import broadcast_from_rank_zero

from raptide.alphabet import ALPHABETS
from raptide.data.corpus import MANIFEST, Corpus
from raptide.data.feeder import BatchReader, FeederActor
from raptide.data.stream import Cursor, GlobalBatch, StreamPlan
from raptide.errors import RaptideError, TrainingDiverged
from raptide.model.bundle import write_bundle
from raptide.model.weights import Weights
from raptide.training.batches import empty_micro_batch, micro_batches, share_bounds
from raptide.training.checkpoint import (
    CHECKPOINTS,
    MODEL,
    SavedCheckpoint,
    Storage,
    newest_checkpoint,
    save_checkpoint,
)
from raptide.training.engine import build_engine, full_state, load_state
from raptide.training.estimate import peak_flops, step_flops
from raptide.training.heldout import Evaluations, HeldoutEvaluator, heldout_rows
from raptide.training.recipe import Recipe, learning_rate
from raptide.training.scratch import scratch_folder
from raptide.training.tracking import Tracker, resolve_mode


@dataclass(frozen=True)
class Run:
    """What the driver tells every worker."""

    recipe: Recipe
    plan: StreamPlan
    folder: str
    run_id: str
    """W&B's id, the same through all restarts."""
    code_version: str
    device: str
    board: Any
    """Handle of the driver's progress board."""


def train_worker(config: dict[str, Any]) -> None:
    """The Ray Train loop function; `config["run"]` is a `Run`."""
    run: Run = config["run"]
    os.environ["DS_ACCELERATOR"] = run.device
    rank = ray.train.get_context().get_world_rank()
    attempt = ray.get(run.board.begin_attempt.remote()) if rank == 0 else None
    attempt = broadcast_from_rank_zero(attempt)
    if attempt == 0:  # Ray Train restarts after any error; this one no restart can mend
        return
    try:
        with ExitStack() as stack:
            Worker(run, attempt, stack).train()
    except RaptideError as error:
        ray.get(run.board.give_up.remote(error))
        raise


class Worker:
    """One rank of a run."""

    def __init__(self, run: Run, attempt: int, stack: ExitStack) -> None:
        context = ray.train.get_context()
        self._run = run
        self._recipe = run.recipe
        self._rank, self._workers = context.get_world_rank(), context.get_world_size()
        self._alphabet = ALPHABETS[run.plan.alphabet]
        self._bounds = share_bounds(
            self._recipe.stream.batch_rows,
            self._rank,
            self._workers,
            self._recipe.training.micro_batch_rows,
            self._recipe.accumulation(self._workers),
        )
        self._attempt = attempt
        self._scratch = scratch_folder(run.run_id, f"rank-{self._rank:05d}", empty=True)
        self._post(phase="loading DeepSpeed")
        saved = self._choose_checkpoint()
        self._engine = build_engine(self._recipe, self._workers, run.device, saved)
        self._step, self._tokens, cursor = 0, 0, Cursor()
        self._nonfinite_steps = 0
        self._heldout = Evaluations()
        if saved is not None:
            load_state(self._engine, saved, self._workers, self._scratch)
            self._heldout = Evaluations.of_manifest(saved.manifest)
            self._step, self._tokens = saved.step, saved.manifest["tokens"]
            cursor = saved.cursor
        self._reader = self._start_stream(cursor)
        self._evaluator = HeldoutEvaluator(
            heldout_rows(run.plan, self._recipe.evaluation),
            run.plan,
            self._recipe.training.micro_batch_rows,
            self._rank,
            self._workers,
        )
        self._peak_flops = peak_flops(self._recipe, run.device)
        self._tracker = self._start_tracking(stack)
        self._audit = self._open_audit(stack)

    def train(self) -> None:
        """All steps that are left."""
        recipe = self._recipe
        patience = recipe.evaluation.patience
        if self._heldout.is_over(patience):
            return
        self._post(phase="training", step=self._step)
        self._step_began = time.perf_counter()
        for batch in self._reader.batches(recipe.training.steps - self._step):
            metrics = self._timed_step(batch)
            last = self._step == recipe.training.steps
            self._refuse_divergence(last)
            if last or self._step % recipe.evaluation.every_steps == 0:
                ece = self._evaluator.measure(self._engine)
                self._heldout = self._heldout.after(ece, self._step)
                metrics |= {"eval/ece": ece.all_chosen, "eval/ece_masked": ece.masked_only}
                self._post(heldout_ece=ece.all_chosen)
                last = last or self._heldout.is_over(patience)
            due = last or self._step % recipe.checkpoint.every_steps == 0
            if due and not self._nonfinite_steps:  # else the weights may be no numbers any more
                metrics |= self._save(batch.next_cursor, metrics["train/loss"])
            if last and self._tracker:
                self._link_model()
            special = "eval/ece" in metrics or "speed/checkpoint_s" in metrics
            if self._tracker and (special or self._step % recipe.tracking.log_every == 0):
                self._tracker.log(self._step, metrics)
            if last:
                return
            self._step_began = time.perf_counter()

    def _timed_step(self, batch: GlobalBatch) -> dict[str, float]:
        recipe = self._recipe
        rate = learning_rate(recipe.optimizer, self._step + 1, recipe.training.steps)
        result = train_step(self._engine, batch, self._bounds, rate, self._alphabet, self._workers)
        loss = result.loss
        self._step += 1
        self._nonfinite_steps = self._nonfinite_steps + 1 if result.left_out else 0
        self._write_audit(batch)
        tokens = int(sum(s.sum() for s in batch.rows.segments))
        self._tokens += tokens
        step_s = time.perf_counter() - self._step_began
        metrics = {
            "train/loss": loss,
            "train/ece": math.exp(min(loss, 50.0)),
            "train/lr": rate,
            "train/nonfinite_targets": result.left_out,
            "progress/tokens": self._tokens,
            "progress/epoch": batch.next_cursor.epoch,
            "speed/step_s": step_s,
            "speed/tokens_per_s": tokens / step_s,
            "speed/data_wait_fraction": self._reader.last_wait_s / step_s,
            "speed/padding_percent": 100 * (1 - tokens / batch.rows.tokens.size),
            "system/memory_gb": _memory_gb(self._run.device),
            "system/workers": self._workers,
            "system/restarts": self._attempt - 1,
            **self._arithmetic(batch, step_s),
        }
        if (norm := self._engine.get_global_grad_norm()) is not None:  # not at stage 0 in fp32
            metrics["train/grad_norm"] = float(norm)
        self._post(
            step=self._step, loss=loss, step_s=step_s, tokens_per_s=metrics["speed/tokens_per_s"]
        )
        return metrics

    def _refuse_divergence(self, last: bool) -> None:
        streak = self._nonfinite_steps
        if streak >= self._recipe.training.max_nonfinite_steps or (last and streak):
            raise TrainingDiverged(
                f"The loss was NaN or infinite in {streak} steps in a row, up to step "
                f"{self._step}; resume from the last checkpoint with a lower optimizer.lr or a "
                "longer warm-up."
            )

    def _link_model(self) -> None:
        assert self._tracker is not None
        folder = Path(self._run.folder) / CHECKPOINTS / f"step-{self._step:08d}" / MODEL
        self._tracker.link(
            "model", self._run.run_id, folder, step=self._step, **self._heldout.to_manifest()
        )

    def _arithmetic(self, batch: GlobalBatch, step_s: float) -> dict[str, float]:
        """What each worker computes a second, and its share of what the device could (MFU)."""
        each = step_flops(self._recipe.model, batch) / step_s / self._workers
        metrics = {"speed/model_tflops": each / 1e12}
        if self._peak_flops is not None:
            metrics["speed/mfu"] = each / self._peak_flops
        return metrics

    def _save(self, cursor: Cursor, loss: float) -> dict[str, float]:
        started = time.perf_counter()
        run, recipe = self._run, self._recipe
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
            **self._heldout.to_manifest(),
        }
        state = full_state(self._engine, recipe.training)
        lineage = {name: value for name, value in manifest.items() if name != "cursor"}
        inv_freq = getattr(self._engine.module, "inv_freq", None)
        weights = Weights(recipe.model, state, inv_freq, lineage=lineage)
        save_checkpoint(
            self._engine,
            manifest,
            lambda folder: write_bundle(folder, weights),
            scratch=self._scratch,
            keep=recipe.checkpoint.keep,
            keep_best=recipe.checkpoint.keep_best,
        )
        return {"speed/checkpoint_s": time.perf_counter() - started}

    def _choose_checkpoint(self) -> SavedCheckpoint | None:
        """The newest checkpoint that counts, as rank 0 sees it."""
        saved = None
        if self._rank == 0:
            saved = newest_checkpoint(Storage.of_ray_train())
        saved = broadcast_from_rank_zero(saved)
        if saved is not None:
            zero_stage = self._recipe.training.zero_stage
            saved.refuse_other_run(self._run.plan.fingerprint(), zero_stage)
        return saved

    def _start_stream(self, cursor: Cursor) -> BatchReader:
        """Rank 0 owns the feeder, so that it ends with this group of workers."""
        feeder = None
        if self._rank == 0:
            left = self._recipe.training.steps - self._step
            feeder = FeederActor.remote(self._run.plan, cursor, left, self._workers)
        self._feeder = broadcast_from_rank_zero(feeder)  # kept: a feeder nobody holds is ended
        return BatchReader(self._feeder, self._recipe.cluster.data_timeout_s)

    def _start_tracking(self, stack: ExitStack) -> Tracker | None:
        if self._rank != 0:
            return None
        run, recipe = self._run, self._recipe
        corpus = run.plan.open_corpus()
        facts = corpus_facts(corpus)
        config = recipe.model_dump() | {
            "corpus_manifest": facts,
            "code_version": run.code_version,
            "workers": self._workers,
        }
        tracker = Tracker(
            recipe.tracking,
            Path(run.folder),
            mode=resolve_mode(recipe.tracking),
            run_id=run.run_id,
            name=recipe.name,
            config=config,
        )
        tracker.link("corpus", corpus.digest[:16], corpus.path.resolve() / MANIFEST, **facts)
        return stack.enter_context(tracker)

    def _open_audit(self, stack: ExitStack) -> Any:
        if not self._recipe.tracking.audit:
            return None
        folder = Path(self._run.folder) / "audit"
        folder.mkdir(exist_ok=True)
        return stack.enter_context((folder / f"rank-{self._rank:05d}.jsonl").open("a"))

    def _write_audit(self, batch: GlobalBatch) -> None:
        if self._audit is not None:
            rows = batch.row_ids[self._bounds[0][0] : self._bounds[-1][1]]
            line = {"step": self._step, "attempt": self._attempt, "rows": rows.tolist()}
            self._audit.write(json.dumps(line) + "\n")
            self._audit.flush()

    def _post(self, **state: Any) -> None:
        if self._rank == 0:
            self._run.board.post.remote(state)


def corpus_facts(corpus: Corpus) -> dict[str, Any]:
    """What a corpus's manifest says, without its lists of files."""
    return {k: v for k, v in corpus.manifest.items() if k not in ("shards", "inputs")}


@dataclass(frozen=True)
class StepResult:
    """What one update came to, over all workers."""

    loss: float
    """Mean over the targets, in nats; NaN if none was finite."""

    left_out: int
    """Targets in micro-batches whose loss was NaN or infinite."""


def train_step(
    engine: Any,
    batch: GlobalBatch,
    bounds: list[tuple[int, int]],
    rate: float,
    alphabet: Any,
    workers: int,
) -> StepResult:
    """One update on a global batch.

    The loss of a micro-batch is a sum, scaled so that the whole step is the mean over the targets
    of the global batch, whatever the number of workers: DeepSpeed divides gradients by workers and
    by accumulation, which the factor takes back. A micro-batch whose loss is not finite gives way
    to an empty one: every worker goes on with equally many passes, and the update leaves it out.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    targets = max(batch.num_targets, 1)
    factor = workers * len(bounds) / targets
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for micro in micro_batches(batch.rows, bounds, alphabet, engine.device):
        losses = engine(micro.packed, micro.targets_T)
        loss = losses.sum()
        if not torch.isfinite(loss):
            total[1] += len(losses)
            nothing = empty_micro_batch(alphabet, engine.device)
            loss = engine(nothing.packed, nothing.targets_T).sum()
        else:
            total[0] += loss.detach()
        engine.backward(loss * factor)
        engine.step()
    dist.all_reduce(total)
    nats, left_out = total.tolist()
    kept = targets - left_out
    return StepResult(nats / kept if kept > 0 else math.nan, int(left_out))


def _memory_gb(device: str) -> float:
    """Peak memory of this worker: of the GPU, or resident on a CPU."""
    if device == "cuda":  # not exercised without a GPU
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
