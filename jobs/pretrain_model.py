"""Pretrain a protein language model from a recipe.

    python jobs/pretrain_model.py --config jobs/recipes/demo.yaml
    python jobs/pretrain_model.py --config jobs/recipes/demo.yaml training.steps=500
    python jobs/pretrain_model.py --config jobs/recipes/demo.yaml --dry-run
    python jobs/pretrain_model.py --resume runs/demo
    python jobs/pretrain_model.py --config jobs/recipes/demo.yaml --start-or-resume

Any setting of the recipe can be overridden with section.field=value. The run folder holds
recipe.yaml, metrics.jsonl, loss.png, wandb/ and checkpoints/; a run is only ever resumed on
request, from its newest checkpoint that is complete, with the very next batch.

--output s3://bucket/runs/mine, or another URI, needs no folder that all nodes see: checkpoints and
all else lie there, each node works in a folder of its cache (RAPTIDE_CACHE), and what it writes is
there half a minute later. --resume takes the same URI, on any machine.

--start-or-resume is one command for the first start and every retry: it starts the run, goes on
with it, starts over where no checkpoint was finished yet, and does nothing once it is finished. A
run of another recipe is refused, with the fields that differ.

A dry run checks the recipe, every file of the corpus, the run folder and what the cluster has, and
prints steps, epochs and memory without training.

SIGTERM, as `submit_job.py stop` and schedulers send it, lets a run end its step and save before it
goes; a second one, or Ctrl-C, ends it at once.
"""

from __future__ import annotations

import argparse
import shlex
from contextlib import nullcontext
from pathlib import Path

from check_cluster import refuse_unfit
from commandline import job_parser, refuse_output, run_job, shipped_file
from raptide.cluster import joins_cluster, ray_session, training_cpus
from raptide.config import load_settings
from raptide.errors import ConfigError
from raptide.evaluation.beside import RunBenchmark
from raptide.storage import Storage, is_uri
from raptide.training.checkpoints.owned import RESULT
from raptide.training.mirror import (
    Mirror,
    mirrored,
    refuse_copy,
    refuse_key,
    refuse_two_storages,
)
from raptide.training.planning.deepspeed_config import check_deepspeed
from raptide.training.planning.estimate import checkpoint_bytes
from raptide.training.planning.overview import describe_run
from raptide.training.planning.recipe import Recipe
from raptide.training.planning.room import choose_device, describe_room, look_around
from raptide.training.result import RunResult
from raptide.training.run_folder import load_resumed, standing_of_run
from raptide.training.trainer import prepare_run, pretrain


def main() -> None:
    parser = job_parser(__doc__)
    group = parser.add_argument_group("which run")
    start = group.add_mutually_exclusive_group(required=True)
    start.add_argument(
        "--config",
        type=Path,
        metavar="YAML",
        help="start a new run from a recipe, a file or the name of one that comes along",
    )
    start.add_argument("--resume", metavar="RUN", help="go on with an earlier run")
    group.add_argument(
        "--output",
        metavar="RUN",
        help="run folder, or URI of one (default: runs/ and the name)",
    )
    group.add_argument(
        "--start-or-resume",
        action="store_true",
        help="with --config: start the run, or go on with it if its folder holds it already",
    )
    group.add_argument("--replace", action="store_true", help="delete an earlier run first")
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--dry-run", action="store_true", help="check everything and print the plan, train nothing"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings of the recipe"
    )
    group.add_argument(
        "--audit",
        action="store_true",
        help="write which packed rows each step trains on (tracking.audit=true)",
    )
    args = parser.parse_intermixed_args()
    overrides = [*args.overrides, *(["tracking.audit=true"] if args.audit else [])]

    _refuse_contradictions(args)
    place = _place(args.resume or args.output)
    if not isinstance(place, str):
        _pretrain(args, overrides, place)
        return
    with mirrored(place, look=args.dry_run) as mirror:
        _pretrain(args, overrides, mirror.folder, mirror)


def _place(named: str | None) -> Path | str | None:
    """The folder of a run, or the URI of one that is in none."""
    if named is None:
        return None
    if is_uri(named):
        refuse_key(named)
        storage = Storage.at(named, "the run's URI")
        return Path(storage.path) if storage.is_local else named
    refuse_copy(Path(named))
    return Path(named)


def _pretrain(
    args: argparse.Namespace,
    overrides: list[str],
    folder: Path | None,
    mirror: Mirror | None = None,
) -> None:
    if args.resume:
        assert folder is not None
        file = load_resumed(folder)
    else:
        file = shipped_file(args.config, "recipes")
    recipe = load_settings(Recipe, file, overrides)
    folder = folder or Path("runs") / recipe.name
    place = folder if mirror is None else mirror.uri
    if mirror is not None:
        refuse_two_storages(recipe, mirror)
    refuse_output(folder, "--output")
    standing = standing_of_run(folder, recipe) if args.start_or_resume else "none"
    if standing == "finished":
        print(f"The run in {place} is finished; see its {RESULT}.")
        return
    bench = None
    if recipe.evaluation.benchmark is not None:
        file = Path(recipe.evaluation.benchmark).resolve()
        bench = RunBenchmark(str(file), str(folder.resolve()))
        bench.check()
    plan = prepare_run(
        recipe,
        folder,
        resume=bool(args.resume) or standing == "saved",
        replace=args.replace,
        begun=standing == "begun",
    )
    asked = recipe.cluster.max_workers * recipe.cluster.cpus_per_worker
    session = ray_session(num_cpus=training_cpus(asked), verbose=args.verbose)
    if args.dry_run:
        with session if joins_cluster() else nullcontext():
            room = look_around()
        print(f"Run {place}\n{describe_run(recipe, plan)}")
        device = choose_device(recipe, room)
        check_deepspeed(recipe, device)
        print(describe_room(recipe, device, room))
        return
    with session:
        if recipe.cluster.check_first:
            storage = recipe.checkpoint.storage or str(place)
            refuse_unfit(storage, 2 * checkpoint_bytes(recipe))
        result = pretrain(recipe, plan, folder, replace=args.replace, bench=bench, mirror=mirror)
    _print_summary(result)
    if mirror is not None:
        print(f"Run:        {mirror.uri}; what is above is this machine's copy")


def _refuse_contradictions(args: argparse.Namespace) -> None:
    if args.resume and (args.output or args.replace):
        raise ConfigError("--resume goes on in the run's own folder; leave out --output/--replace.")
    if args.start_or_resume and (args.resume or args.replace):
        raise ConfigError(
            "--start-or-resume finds out itself what there is; give it --config, without "
            "--resume/--replace."
        )


def _print_summary(result: RunResult) -> None:
    print(
        f"Trained to step {result.step} on {result.tokens:,} tokens. Held-out ECE "
        f"{result.heldout_ece.all_chosen:.3f}, on <mask> alone "
        f"{result.heldout_ece.masked_only:.3f} (unigram {result.unigram_ece.all_chosen:.3f}, "
        f"uniform {result.uniform_ece:.0f}).\n"
        f"  model     {result.bundle}\n"
        f"  metrics   {result.folder / 'metrics.jsonl'}, drawn in {result.folder / 'loss.png'}\n"
        f"Serve it:   serve run serve.app:build {shlex.quote(f'model={result.bundle}')}"
    )
    if result.audit is not None:
        audit = result.audit
        print(
            f"Audit:      {audit.rows:,} rows in {audit.steps:,} steps, digest "
            f"{audit.digest[:16]}; {audit.redone_steps} steps were done again after "
            f"{audit.attempts - 1} restarts, at most {audit.longest_redone} at once"
        )
    if result.wandb_offline:
        print(f"W&B:        wandb sync {result.folder}/wandb/offline-run-*")


if __name__ == "__main__":
    run_job(main)
