"""Start, replace or resume a run: check everything, then hand over to Ray Train."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import yaml
from ray.train.torch import TorchConfig, TorchTrainer

from raptide.cluster import DATA_CPUS
from raptide.data.corpus import Corpus
from raptide.data.stream import StreamPlan
from raptide.errors import CheckpointError, ConfigError, find_raptide_error
from raptide.training.checkpoint import (
    CHECKPOINTS,
    MODEL,
    SavedCheckpoint,
    Storage,
    newest_checkpoint,
)
from raptide.training.heldout import UNIFORM_ECE, Ece, heldout_rows, unigram_ece
from raptide.training.progress import BoardActor, shown
from raptide.training.recipe import Recipe
from raptide.training.tracking import METRICS, resolve_mode
from raptide.training.worker import Run, train_worker

RECIPE, RUN_INFO = "recipe.yaml", "run.json"


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    checkpoint: Path
    step: int
    tokens: int
    heldout_ece: Ece
    unigram_ece: Ece
    uniform_ece: float
    tokens_per_s: float
    """Median over the logged steps, padding not counted."""
    wandb_mode: str

    @property
    def bundle(self) -> Path:
        return self.checkpoint / MODEL


def prepare_run(recipe: Recipe, folder: Path, *, resume: bool) -> StreamPlan:
    """Check a run against its folder and corpus before any worker starts.

    Raises:
        ConfigError: a new run's folder exists, or a resumed one's does not.
        CorpusError: the corpus is missing or holds nothing out.
        CheckpointError: the run cannot go on with these settings, or has no good checkpoint.
    """
    corpus = Corpus.open(recipe.corpus)
    plan = StreamPlan(
        corpus_path=str(Path(recipe.corpus).resolve()),
        corpus_digest=corpus.digest,
        settings=recipe.stream,
        alphabet=recipe.model.alphabet.name,
    )
    if resume:
        saved = newest_checkpoint(Storage.of(folder / CHECKPOINTS))
        if saved is None:
            raise CheckpointError(
                f"{folder} has no checkpoint that counts; start the run anew with --replace."
            )
        saved.refuse_other_run(plan.fingerprint(), recipe.training.zero_stage)
        _refuse_other_model(saved, recipe)
        if saved.step >= recipe.training.steps:
            raise CheckpointError(
                f"{folder} has reached step {saved.step} of {recipe.training.steps} already; give "
                "a larger training.steps to go on."
            )
    elif folder.exists():
        raise ConfigError(
            f"The run folder {folder} exists already; go on with --resume {folder}, start over "
            "with --replace, or choose another --output."
        )
    heldout_rows(plan, recipe.evaluation)
    return plan


def load_resumed(folder: Path) -> Path:
    """The recipe file of a run to resume.

    Raises:
        CheckpointError: the folder holds no run.
    """
    if not (folder / RECIPE).is_file():
        raise CheckpointError(
            f"{folder} holds no run to resume (no {RECIPE}); name the folder of an earlier run."
        )
    return folder / RECIPE


def pretrain(recipe: Recipe, plan: StreamPlan, folder: Path) -> RunResult:
    """Run a recipe to its last step; `plan` comes from `prepare_run`. Ray must be running.

    Raises:
        ConfigError: the cluster has too few CPUs or GPUs.
        StreamStalled: no data came.
        CorpusError: a block could not be read.
    """
    device = _choose_device(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    info = _run_info(folder)
    (folder / RECIPE).write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False))
    baseline = unigram_ece(plan, heldout_rows(plan, recipe.evaluation))
    board = BoardActor.remote()
    run = Run(
        recipe=recipe,
        plan=plan,
        folder=str(folder.resolve()),
        run_id=info["wandb_run_id"],
        code_version=code_version(),
        device=device,
        tracking_mode=resolve_mode(recipe.tracking),
        board=board,
    )
    with shown(board, recipe.training.steps):
        _fit(run)
    return _result(run, folder, baseline)


def _fit(run: Run) -> None:
    recipe, device = run.recipe, run.device
    resources = {"CPU": recipe.cluster.cpus_per_worker, **({"GPU": 1} if device == "cuda" else {})}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=recipe.cluster.workers,
            use_gpu=device == "cuda",
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=run.folder,
            failure_config=ray.train.FailureConfig(max_failures=recipe.cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=recipe.checkpoint.keep),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        if (cause := find_raptide_error(error)) is not None:
            raise cause from None
        raise


def _result(run: Run, folder: Path, baseline: Ece) -> RunResult:
    saved = newest_checkpoint(Storage.of(folder / CHECKPOINTS))
    if saved is None or saved.step < run.recipe.training.steps:
        raise CheckpointError(f"{folder} ended without its last checkpoint; run it with --resume.")
    return RunResult(
        folder=folder,
        checkpoint=folder / CHECKPOINTS / saved.name,
        step=saved.step,
        tokens=saved.manifest["tokens"],
        heldout_ece=Ece(**saved.manifest["heldout_ece"]),
        unigram_ece=baseline,
        uniform_ece=UNIFORM_ECE,
        tokens_per_s=statistics.median(
            json.loads(line)["speed/tokens_per_s"]
            for line in (folder / METRICS).read_text().splitlines()
        ),
        wandb_mode=run.tracking_mode,
    )


def _refuse_other_model(saved: SavedCheckpoint, recipe: Recipe) -> None:
    before, now = saved.manifest["recipe"]["model"], recipe.model.model_dump()
    if before != now:
        raise CheckpointError(
            f"{saved.name} holds another model ({before}) than the recipe asks for ({now}); resume "
            "with the same model settings, or start a new run."
        )


def _choose_device(recipe: Recipe) -> str:
    """The device, once it is sure that the cluster has room for workers and data tasks."""
    total = ray.cluster_resources()
    workers, cluster = recipe.cluster.workers, recipe.cluster
    gpus, cpus = total.get("GPU", 0), total.get("CPU", 0)
    device = cluster.device
    if device == "auto":
        device = "cuda" if gpus >= workers else "cpu"
    if device == "cuda" and gpus < workers:
        raise ConfigError(
            f"cluster.workers is {workers}, one GPU each, but the cluster has {gpus:.0f} GPUs; "
            "lower cluster.workers or add nodes."
        )
    needed = workers * cluster.cpus_per_worker + DATA_CPUS
    if cpus < needed:
        raise ConfigError(
            f"{workers} workers and their data tasks need {needed} logical CPUs, but the cluster "
            f"has {cpus:.0f}; lower cluster.workers or cluster.cpus_per_worker."
        )
    return device


def _run_info(folder: Path) -> dict[str, Any]:
    """What stays the same through all restarts of a run."""
    file = folder / RUN_INFO
    if file.exists():
        return json.loads(file.read_text())
    info = {"wandb_run_id": uuid.uuid4().hex[:12]}
    file.write_text(json.dumps(info) + "\n")
    return info


def remove_run(folder: Path) -> None:
    """Delete an earlier run's folder.

    Raises:
        ConfigError: the folder holds something else than a run.
    """
    if folder.exists() and not (folder / RECIPE).is_file():
        raise ConfigError(
            f"{folder} is no run folder (no {RECIPE} in it), so it is not replaced; choose another "
            "--output."
        )
    shutil.rmtree(folder, ignore_errors=True)


def code_version() -> str:
    """The package version, with the git commit where the code runs from a checkout."""
    version = importlib.metadata.version("raptide")
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=os.path.dirname(__file__),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version
    return f"{version}+{commit}"
