"""What the bulk jobs share: their options, and the way from those to an output folder."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bulk_tracking import log_output
from commandline import refuse_output
from raptide.bulk import BulkSettings, OutputFolder, run_bulk
from raptide.bulk.job import fingerprint
from raptide.bulk.places import choose_precision
from raptide.bulk.report import describe, progress_bar
from raptide.bulk.sources.find import LENIENT, find_sources
from raptide.bulk.units import Source
from raptide.bulk.work import Model, Precision, Work
from raptide.cluster import ray_session
from raptide.data.fasta import ReadingRules
from raptide.data.fasta_text import is_stream
from raptide.errors import ConfigError
from raptide.training.checkpoints.checkpoint import find_bundle

Options = argparse._ArgumentGroup
"""A group of options."""


def add_model_options(parser: argparse.ArgumentParser, **more: Any) -> None:
    options = {"help": "model folder, .pt, checkpoint or run", **more}
    group = parser.add_argument_group("the model")
    group.add_argument("--model", type=Path, required=True, **options)
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the computation; auto takes bf16 where it is faster (default: %(default)s)",
    )


def add_long_option(group: Options) -> None:
    group.add_argument(
        "--long",
        choices=("reject", "window", "error"),
        default="reject",
        help="proteins that the model does not take whole: rejected, computed in overlapping "
        "windows of 1,022 residues, or the end of the job (default: %(default)s)",
    )


def add_protein_options(parser: argparse.ArgumentParser) -> None:
    """Options for inputs that are proteins; `protein_sources` reads them."""
    group = parser.add_argument_group("what is read")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="INPUT",
        help="FASTA (plain or compressed) or Parquet files with id and sequence, folders, globs, "
        "URIs, - for standard input, or one corpus folder",
    )
    add_long_option(group)
    group.add_argument(
        "--stop-codons",
        choices=("reject", "split"),
        default="reject",
        help="records with an inner * or .; split cuts them there into NAME/START-END",
    )
    group.add_argument(
        "--nucleotides",
        choices=("reject", "keep"),
        default="reject",
        help="records of DNA or RNA; keep takes them for proteins, such as poly-GA",
    )
    group.add_argument(
        "--split", choices=("train", "heldout"), default="train", help="of a corpus folder"
    )
    group.add_argument(
        "--sampling",
        choices=("representatives", "all"),
        default="representatives",
        help="of a corpus folder: one protein a cluster, or every member",
    )


def add_dedup_option(group: Options) -> None:
    group.add_argument(
        "--dedup",
        action="store_true",
        help="find equal sequences in a first pass over all inputs, and compute them once; without "
        "it they are where they stand close to each other",
    )


def protein_sources(args: argparse.Namespace) -> list[Source]:
    """What `--input` stands for.

    Raises:
        ConfigError: something is not there, or a pipe is named twice.
    """
    for given, times in Counter(args.input).items():
        if times > 1 and is_stream(given):
            raise ConfigError(f"--input names {given} {times} times, but it can be read only once.")
    rules = ReadingRules(
        **LENIENT.model_dump()
        | {
            "stop_codons": "split" if args.stop_codons == "split" else "drop",
            "nucleotides": "keep" if args.nucleotides == "keep" else "drop",
        }
    )
    return find_sources(args.input, rules, args.split, args.sampling)


def add_engine_options(group: argparse._ArgumentGroup) -> None:
    """How many engines, and how large each."""
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="engines (default: one for each GPU, or share of the CPUs)",
    )
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPUs of one engine where there are no GPUs (default: by the model's size)",
    )


def add_bulk_options(parser: argparse.ArgumentParser) -> None:
    """Options of every bulk job; `run_bulk_job` reads them."""
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--output", required=True, metavar="DIR", help="folder or URI; given again, it goes on"
    )
    add_engine_options(group)
    group.add_argument(
        "--timeout-s",
        type=float,
        default=BulkSettings().timeout_s,
        metavar="S",
        help="seconds that some 65,000 tokens, or one record of more, may take; then the record "
        "that hangs is found and rejected (default: %(default)s)",
    )
    group.add_argument(
        "--memory-gb",
        type=float,
        metavar="GB",
        help="that one engine may take; a record that needs more is rejected (default: its share "
        "of the node)",
    )
    group.add_argument(
        "--replace", action="store_true", help="delete another job's output in DIR, start anew"
    )
    group.add_argument(
        "--allow-rejects", action="store_true", help="end with 0, not 3, if records were rejected"
    )
    group.add_argument(
        "--price-per-hour",
        type=float,
        metavar="PRICE",
        help="of the machines, in any currency; prices a million such proteins",
    )
    group.add_argument(
        "--track", action="store_true", help="log the output to W&B, beside its model"
    )


def find_model(path: Path) -> Model:
    return Model.find(find_bundle(path))


def read_settings(args: argparse.Namespace, threads: int) -> BulkSettings:
    """How a job is to run.

    Raises:
        ConfigError: a number is none that makes sense.
    """
    positive = ("workers", "threads", "timeout_s", "memory_gb", "price_per_hour")
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} must be above 0, but {value:g} was given.")
    return BulkSettings(
        workers=args.workers,
        threads=args.threads or threads,
        timeout_s=args.timeout_s,
        memory_gb=args.memory_gb,
        dedup=getattr(args, "dedup", False),
        replace=args.replace,
    )


def run_bulk_job(
    args: argparse.Namespace,
    make_work: Callable[[Precision], Work],
    sources: Sequence[Source],
    models: list[Model],
    finish: Callable[[OutputFolder], None] = lambda output: None,
    things: str = "proteins",
) -> None:
    """Run a job, say how it went, and end with 3 where records were rejected.

    Args:
        make_work: the work, given the precision it is computed in.
        models: whose sizes tell an engine's share of CPUs.
        finish: makes other files of the parts.
        things: what a record is.
    """
    settings = read_settings(args, max(model.threads for model in models))
    output = OutputFolder.at(args.output)
    if output.storage.is_local:
        refuse_output(Path(output.name), "--output")
    known = fingerprint(make_work("fp32"), settings)
    if args.precision == "auto":
        del known["precision"]
    if not args.replace:
        output.refuse_strangers(known)
    cpus = os.cpu_count() or 1
    with ray_session(num_cpus=max(cpus, settings.threads), verbose=args.verbose):
        work = make_work(choose_precision(args.precision))
        with progress_bar() as watch:
            outcome = run_bulk(work, sources, output, settings, watch, finish)
    print(describe(outcome, output, args.price_per_hour, things))
    if args.track:
        log_output(output, outcome, models)
    if outcome.rejects and not args.allow_rejects:
        sys.exit(3)
