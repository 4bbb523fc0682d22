"""Run a scaling study: models of several sizes on several shares of data, and what follows.

    python jobs/run_scaling_study.py --study jobs/recipes/scaling/miniature.yaml --output runs/study
    python jobs/run_scaling_study.py --study jobs/recipes/scaling/paper.yaml --output x --dry-run
    python jobs/run_scaling_study.py --study jobs/recipes/scaling/miniature.yaml \\
        --output runs/study corpus=corpora/mine

Every run is an ordinary one, in DIR/runs, as many at once as the cluster has room for. Killed and
given again, the same command passes over what is finished and goes on with what is not. Then every
model is asked the same held-out proteins and a benchmark, beside n-grams of the same data.

DIR holds study.json (how each run stands; laws that were fitted), study.parquet (a row a model) and
study.html (ECE by parameters, data and compute; what emerges with it). Settings of the recipe are
overridden for all runs with section.field=value. A dry run prints the grid with its costs.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import ray

from commandline import job_parser, refuse_output, run_job, shipped_file
from raptide.cluster import ray_session, training_cpus
from raptide.errors import RaptideError
from raptide.evaluation.benchmark import Benchmark
from raptide.evaluation.cache import ResultCache
from raptide.evaluation.subjects.readers import BulkReader, HereReader, Reader
from raptide.scaling.cost import describe_grid
from raptide.scaling.laws import Curves
from raptide.scaling.manifest import circumstances, refuse_other_study, write_manifest
from raptide.scaling.measuring import measure, tasks_of
from raptide.scaling.page import write_page
from raptide.scaling.study import Study
from raptide.scaling.table import write_table
from raptide.scaling.training import Ending, slots, train_all, unfinished
from raptide.training.planning.room import choose_device, look_around

RUNS, CACHE = "runs", "cache"


def main() -> None:
    args = read_arguments()
    study = Study.load(shipped_file(args.study, "recipes/scaling"), args.overrides)
    print("\n".join(describe_grid(study.settings, study.runs)))
    if args.dry_run:
        if study.benchmark is not None:
            Benchmark.load(study.benchmark, list(study.settings.tasks) or None)
        return
    output = args.output.absolute()
    refuse_output(output, "--output")
    refuse_other_study(output, study)
    with TemporaryDirectory() as scratch:  # what is wrong with the data, before days of training
        tasks_of(study, Path(scratch))
    with ray_session(num_cpus=training_cpus(cpus_of(study)), verbose=args.verbose):
        endings = train(study, output)
        cache = ResultCache(output / CACHE)
        tasks = tasks_of(study, cache.folder)
        points = measure(study, tasks, list(endings.values()), cache, reader(), say)
    curves = Curves.through(points)
    write_manifest(output, study, endings, sys.argv, curves)
    print(f"\n  {write_table(output, points)}")
    missing = [name for name, ending in endings.items() if ending.problem]
    facts = circumstances(sys.argv)
    print(f"  {write_page(output, study.settings.name, points, curves, facts, missing)}")
    refuse_failures(endings)


def read_arguments() -> argparse.Namespace:
    parser = job_parser(__doc__)
    group = parser.add_argument_group("which study")
    group.add_argument(
        "--study",
        type=Path,
        required=True,
        metavar="YAML",
        help="a study file, or the name of one that comes along",
    )
    group.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder of the study and its runs"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print the grid with its costs, train nothing"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings of every run's recipe"
    )
    return parser.parse_intermixed_args()


def cpus_of(study: Study) -> int | None:
    """What the workers of runs side by side ask for; None takes what there is."""
    most = max(
        run.recipe.cluster.max_workers * run.recipe.cluster.cpus_per_worker for run in study.runs
    )
    return most * study.settings.at_once if study.settings.at_once else None


def train(study: Study, output: Path) -> dict[str, Ending]:
    """All runs; how each has ended is written down as it does."""
    room = look_around()
    device = choose_device(study.runs[0].recipe, room)
    left = unfinished(study.runs, output / RUNS)
    fitting = slots(left or study.runs, device, room)
    at_once = min(fitting, study.settings.at_once or fitting)
    say(f"{len(study.runs)} runs, {at_once} at once")
    endings = {r.name: Ending(r, output / RUNS / r.name) for r in study.runs if r not in left}
    write_manifest(output, study, endings, sys.argv)
    with closing(train_all(study.runs, output / RUNS, at_once, say)) as ended:
        for ending in ended:
            endings[ending.run.name] = ending
            write_manifest(output, study, endings, sys.argv)
            done = f"{len(endings)} of {len(study.runs)}"
            say(f"{ending.run.name}: {ending.problem or 'finished'} ({done})")
    return {run.name: endings[run.name] for run in study.runs}


def reader() -> Reader:
    """GPUs are kept busy by bulk jobs; small models on CPUs need no process of their own."""
    return BulkReader() if ray.cluster_resources().get("GPU") else HereReader(os.cpu_count() or 1)


def refuse_failures(endings: dict[str, Ending]) -> None:
    """Raises RaptideError, once all that there is has been written, where runs have failed."""
    failed = [each for each in endings.values() if each.problem]
    if failed:
        raise RaptideError(
            f"{len(failed)} of {len(endings)} runs failed, such as {failed[0].run.name}: "
            f"{failed[0].problem} The same command tries them again."
        )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_job(main)
