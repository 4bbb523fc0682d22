"""Start, replace or resume a run: check everything, then hand over to Ray Train."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from raptide.data.corpus import Corpus
from raptide.data.streaming.stream import Source, StreamPlan
from raptide.errors import CheckpointError, ConfigError, CorpusError, plain_errors
from raptide.model.formats.detect import read_weights
from raptide.patience import reason_of
from raptide.training.checkpoints.adopting import adopt, find_checkpoint, refuse_to_adopt
from raptide.training.checkpoints.checkpoint import (
    SavedCheckpoint,
    find_bundle,
    forget_ray_snapshot,
    has_finished_one,
    newest_checkpoint,
)
from raptide.training.checkpoints.owned import (
    RECIPE,
    RESULT,
    RUN_INFO,
    Storage,
    read_run_info,
)
from raptide.training.group import train_worker
from raptide.training.lean import Lean
from raptide.training.meeting import RoomForAll
from raptide.training.mirror import Mirror
from raptide.training.planning.estimate import moving_s
from raptide.training.planning.recipe import Recipe
from raptide.training.planning.resuming import with_absolute_paths
from raptide.training.planning.room import choose_device, look_around, worker_needs
from raptide.training.result import RunResult, is_finished, read_result, write_result
from raptide.training.run import Run
from raptide.training.run_folder import (
    alone_in,
    begin_run,
    delete_run,
    keep_recipe,
    refuse_folder,
    refuse_to_delete,
)
from raptide.training.watching.audit import SUMMARY
from raptide.training.watching.heldout import heldout_rows, unigram_ece
from raptide.training.watching.leaving import LEFT, saved_on_sigterm
from raptide.training.watching.picture import PICTURE, draw_run
from raptide.training.watching.progress import board_here, shown, warn_here
from raptide.training.watching.validation import Bench
from raptide.version import code_version


def prepare_run(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    replace: bool = False,
    begun: bool = False,
) -> StreamPlan:
    """Check a run against its folder and corpus; changes nothing.

    Args:
        resume: the run goes on from its newest checkpoint.
        replace: an earlier run in the folder will be deleted.
        begun: the run in the folder was begun by this recipe, has no checkpoint yet, and starts
            over.

    Raises:
        ConfigError: a new run's folder exists, or `replace` would delete something else; the
            weights to start from have another shape, or lie in what `replace` would delete; the
            storage is of no known kind.
        BundleError: there are no weights to start from.
        CorpusError: the corpus is missing or damaged, or has nothing to train or evaluate on.
        CheckpointError: the run cannot go on with these settings, or has no good checkpoint.
    """
    corpora = [Corpus.open(share.path) for share in recipe.corpus]
    plan = StreamPlan(
        sources=tuple(
            Source(corpus.everywhere, corpus.digest, share.weight)
            for corpus, share in zip(corpora, recipe.corpus, strict=True)
        ),
        settings=recipe.stream,
        alphabet=recipe.model.alphabet.name,
    )
    if resume:
        saved = newest_checkpoint(Storage.of_run(folder))
        if saved is None:
            raise CheckpointError(
                f"{folder} has no checkpoint that counts; start over with --replace, or give "
                "its recipe with --start-or-resume if none was finished yet."
            )
        saved.refuse_other_run(plan.fingerprint(), recipe)
    elif not begun:
        refuse_folder(folder, replace)
    if recipe.checkpoint.storage is not None:
        Storage.at(recipe.checkpoint.storage)
    if not resume:
        _refuse_start(recipe, plan, folder if replace else None)
    for corpus in corpora:
        if not plan.training_blocks(corpus):
            raise CorpusError(
                f"{corpus.where} has no clusters to train on; build it again with more sequences "
                "or a smaller --holdout-fraction."
            )
        corpus.verify()
    heldout_rows(plan, recipe.evaluation)
    return plan


def pretrain(
    recipe: Recipe,
    plan: StreamPlan,
    folder: Path,
    *,
    replace: bool = False,
    bench: Bench | None = None,
    mirror: Mirror | None = None,
) -> RunResult:
    """Run a recipe to its last step; `plan` comes from `prepare_run`. Ray must be running.

    Args:
        replace: delete an earlier run in `folder` once everything else is in order.
        mirror: the run lives at a URI, and `folder` is what is here of it.
        bench: asked of each checkpoint that is evaluated beside the training.

    Raises:
        KeyboardInterrupt: the run was told to end by SIGTERM, and has saved.
        ConfigError: the workers have no room on this machine or cluster; another process trains
            the run.
        StreamStalled: no data came.
        CorpusError: a block could not be read.
    """
    uri = mirror.uri if mirror is not None else None
    if not replace and is_finished(folder, recipe):
        print(f"{uri or folder} is finished; raise training.steps to go on with it.")
        if mirror is not None:
            mirror.fetch_all()
        return read_result(folder, recipe)
    ray.data.DataContext.get_current().enable_progress_bars = False
    device = choose_device(recipe, look_around())
    recipe = with_absolute_paths(recipe)
    begun = not replace and (folder / RUN_INFO).exists()
    source = None
    if not (begun and has_finished_one(Storage.of_run(folder))):
        source = _find_source(recipe, plan)
    if replace or not (folder / RUN_INFO).exists():
        baseline = unigram_ece(plan, heldout_rows(plan, recipe.evaluation))
        if replace:
            delete_run(folder)
        begin_run(folder, recipe, baseline, uri)
        if mirror is not None:
            mirror.begin()
    with alone_in(folder):
        (folder / RESULT).unlink(missing_ok=True)  # there again once all is done
        with without_ending("The run goes on, but its recipe was not written down"):
            keep_recipe(folder, recipe)
        if mirror is not None:
            mirror.storage.delete(RESULT)
            mirror.send(RECIPE)
        if source is not None:
            adopt(source, Storage.of_run(folder), recipe, read_run_info(folder)["wandb_run_id"])
        result = _train(recipe, plan, folder, device, bench, mirror)
        if mirror is not None:
            mirror.send(*(name for name in (PICTURE, SUMMARY, RESULT) if (folder / name).is_file()))
        return result


def _train(
    recipe: Recipe,
    plan: StreamPlan,
    folder: Path,
    device: str,
    bench: Bench | None,
    mirror: Mirror | None,
) -> RunResult:
    info, uri = read_run_info(folder), mirror.uri if mirror is not None else None
    with board_here() as board:
        run = Run(
            recipe=recipe,
            plan=plan,
            folder=str(folder.resolve()),
            uri=uri,
            run_id=info["wandb_run_id"],
            code_version=code_version(),
            device=device,
            driver=uuid.uuid4().hex,
            board=board,
            bench=bench,
        )
        with shown(board, recipe.training.steps), saved_on_sigterm(board):
            _fit(run)
        ended, _ = ray.get(board.read.remote())
    if ended["phase"] == LEFT:
        print(
            f"{uri or folder} is saved at step {ended['step']}; --resume goes on.", file=sys.stderr
        )
        raise KeyboardInterrupt
    if mirror is not None:
        mirror.fetch_all()
    result = read_result(folder, recipe, step=ended["step"])
    with without_ending("The run's curve was not drawn"):
        draw_run(folder, result.unigram_ece.all_chosen)
    with without_ending(f"The run is done, but {RESULT} was not written; --resume writes it"):
        write_result(result)
    return result


@contextmanager
def without_ending(what: str) -> Iterator[None]:
    """Within the block a disk that is full, or fails, is told of and ends nothing.

    Args:
        what: is not done then.
    """
    try:
        yield
    except OSError as error:
        warn_here(f"{what} ({reason_of(error)}).")


def _fit(run: Run) -> None:
    recipe, device = run.recipe, run.device
    cluster = recipe.cluster
    storage = Storage.of_run(Path(run.folder))
    forget_ray_snapshot(storage)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"run": run},
        torch_config=TorchConfig(
            backend="nccl" if device == "cuda" else "gloo",
            # Ours comes first, wherever a rank stands still.
            timeout_s=int(2 * cluster.hang_timeout_s + moving_s(recipe)) + 60,
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers if cluster.elastic else cluster.max_workers,
            use_gpu=device == "cuda",
            resources_per_worker=worker_needs(recipe, device),
            elastic_resize_monitor_interval_s=cluster.resize_check_s,
        ),
        run_config=ray.train.RunConfig(
            name=Path(storage.path).name,
            storage_path=str(Path(storage.path).parent),
            storage_filesystem=storage.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            callbacks=[RoomForAll(), Lean()],
        ),
    )
    with plain_errors():
        trainer.fit()
    mistake = ray.get(run.board.mistake.remote())
    if mistake is not None:
        raise mistake


def _refuse_start(recipe: Recipe, plan: StreamPlan, deleted: Path | None) -> None:
    """Refuse what a new run cannot start from.

    Args:
        deleted: the folder of a run that will be deleted.
    """
    source = _find_source(recipe, plan)
    if recipe.init_from is not None:
        _refuse_other_start(recipe, recipe.init_from)
    if deleted is None:
        return
    if recipe.init_from is not None:
        refuse_to_delete(deleted, recipe.init_from, "init_from")
    if source is not None:
        refuse_to_delete(deleted, f"{source.storage.path}/{source.name}", "continue_from")


def _find_source(recipe: Recipe, plan: StreamPlan) -> SavedCheckpoint | None:
    """The checkpoint that a new run goes on from, if it goes on from one."""
    if recipe.continue_from is None:
        return None
    saved = find_checkpoint(recipe.continue_from)
    refuse_to_adopt(saved, recipe, plan.fingerprint())
    return saved


def _refuse_other_start(recipe: Recipe, source: str) -> None:
    weights = read_weights(find_bundle(Path(source)))
    weights.refuse_headless(f"init_from: {source}")
    there, asked = weights.settings.shape, recipe.model.shape
    for name, value in there.items():
        if value != asked.get(name):
            raise ConfigError(
                f"init_from: {source} has model.{name} {value}, but the recipe asks for "
                f"{asked.get(name)}; set model.{name}={value}, or start from other weights."
            )
