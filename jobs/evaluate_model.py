"""Evaluate models: what they have learned, in numbers with intervals, beside baselines.

    python jobs/evaluate_model.py --model runs/demo --benchmark jobs/benchmarks/tiny.yaml \\
        --output evaluation
    python jobs/evaluate_model.py --model runs/a --model runs/b --tasks contacts homology \\
        --benchmark jobs/benchmarks/development.yaml --output evaluation
    python jobs/evaluate_model.py --model runs/b --repeats runs/a1 runs/a2 runs/a3 \\
        --benchmark jobs/benchmarks/tiny.yaml --output evaluation

Asks every model, and every task's baselines, the tasks of a benchmark: perplexity, secondary
structure, contacts, homology, effects of variants, the space of representations. Models are runs,
checkpoints, model folders, or .pt files of fair-esm. Writes DIR/results.parquet and results.json, a
row a number, and DIR/report.html with tables, pictures, and how each number is computed.

Several models are compared: each difference has an interval and a verdict, and with --repeats, runs
that differ in the seed alone, the noise floor beside it. What is there already is not computed
again; killed and given again, the same command does what is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bulk_commandline import add_engine_options
from commandline import job_parser, refuse_output, run_job, shipped_file
from evaluation_tracking import log_evaluation
from raptide.bulk import BulkSettings
from raptide.bulk.places import choose_precision
from raptide.bulk.report import progress_bar
from raptide.bulk.work import Model, Precision
from raptide.cluster import ray_session
from raptide.errors import ConfigError
from raptide.evaluation.benchmark import Benchmark
from raptide.evaluation.cache import ResultCache
from raptide.evaluation.output import PARQUET, REPORT, clear_output, make_content, write_output
from raptide.evaluation.report.terminal import describe
from raptide.evaluation.run import Findings, evaluate
from raptide.evaluation.subjects.model import ModelSubject
from raptide.evaluation.subjects.predictions import read_predictions
from raptide.evaluation.subjects.readers import BulkReader
from raptide.evaluation.tasks.task import Task
from raptide.training.checkpoints.checkpoint import find_bundle

CACHE = "cache"
REFERENCES = Path(__file__).parent / "benchmarks/reference.yaml"


def main() -> None:
    args = read_arguments()
    output = Path(args.output)
    refuse_output(output, "--output")
    benchmark = Benchmark.load(shipped_file(args.benchmark, "benchmarks"), args.tasks)
    cache = ResultCache((args.cache or output / CACHE).absolute())
    refuse_output(cache.folder, "--cache")
    models = {str(path): Model.find(find_bundle(path)) for path in (*args.model, *args.repeats)}
    refuse_equal_repeats({name: models[name] for name in map(str, args.repeats)})
    if args.replace:
        clear_output(output, cache)
    threads = args.threads or max(model.threads for model in models.values())
    with ray_session(num_cpus=max(os.cpu_count() or 1, threads), verbose=args.verbose):
        tasks = benchmark.make(cache.folder)
        precision = choose_precision(args.precision)
        reader = BulkReader(BulkSettings(workers=args.workers, threads=threads), progress_bar)
        subjects = [
            ModelSubject(
                *(name, model, precision, reader, scratch_of(cache, model, precision)), say=say
            )
            for name, model in models.items()
        ]
        print_costs(tasks, subjects)
        predictions = read_predictions(args.predictions)
        findings = evaluate(tasks, subjects, cache, say, not args.no_baselines, predictions)
    repeats = [str(path) for path in args.repeats]
    compared = [str(path) for path in args.model]
    content = make_content(benchmark.name, findings, repeats, REFERENCES, sys.argv, compared)
    write_output(output, content)
    print(describe(content))
    print_times(findings)
    print(f"\n  {output / REPORT}\n  {output / PARQUET}")
    if args.track:
        log_evaluation(output, content)


def read_arguments() -> argparse.Namespace:
    parser = job_parser(__doc__)
    group = parser.add_argument_group("what is asked, and of what")
    group.add_argument(
        "--model",
        type=Path,
        action="append",
        required=True,
        help="run, checkpoint, model folder or .pt file; given again, the next one",
    )
    group.add_argument(
        "--benchmark",
        type=Path,
        required=True,
        metavar="YAML",
        help="a file, or the name of one that comes along",
    )
    group.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the results and the report"
    )
    group.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="names or kinds (default: all of the benchmark)"
    )
    group.add_argument(
        "--repeats",
        type=Path,
        nargs="+",
        default=[],
        metavar="MODEL",
        help="at least two models that differ in the seed alone: the noise floor",
    )
    group.add_argument(
        "--predictions",
        type=Path,
        nargs="+",
        default=[],
        metavar="TABLE",
        help="CSV or Parquet with mutant, assay and columns of scores: each column is measured as "
        "a model is",
    )
    group.add_argument(
        "--no-baselines", action="store_true", help="ask the models alone, not the baselines"
    )
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="fp32",
        help="of the computation; auto takes bf16 where it is faster (default: %(default)s)",
    )
    add_engine_options(group)
    group.add_argument(
        "--cache", type=Path, metavar="DIR", help="results and scratch (default: OUTPUT/cache)"
    )
    group.add_argument(
        "--replace", action="store_true", help="delete DIR's results, also cached ones, first"
    )
    group.add_argument("--track", action="store_true", help="log tables and files to W&B")
    args = parser.parse_args()
    if len(set(args.repeats)) == 1:
        raise ConfigError("--repeats needs at least two models that differ in the seed alone.")
    return args


def refuse_equal_repeats(repeats: dict[str, Model]) -> None:
    """Raises ConfigError where two of them have the same weights: no seed made a difference."""
    names: dict[str, str] = {}
    for name, model in repeats.items():
        if model.digest in names:
            raise ConfigError(
                f"--repeats takes models that differ in the seed, but {names[model.digest]} and "
                f"{name} have the same weights; leave one out."
            )
        names[model.digest] = name


def scratch_of(cache: ResultCache, model: Model, precision: Precision) -> Path:
    return cache.folder / f"read-{model.digest[:16]}-{precision}"


def print_costs(tasks: list[Task], subjects: list[ModelSubject]) -> None:
    """What a task says of its price, before it is paid."""
    for task in tasks:
        cost = getattr(task, "cost", None)
        for line in {cost(subject) for subject in subjects} - {""} if cost else ():
            say(f"{task.settings.name}: {line}")


def print_times(findings: Findings) -> None:
    if not findings.computed:
        print("\nNothing was left to compute.")
        return
    read = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in findings.reading_s.items())
    print(f"\nTime to read off subjects: {read}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_job(main)
