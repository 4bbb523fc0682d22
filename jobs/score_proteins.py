"""Score proteins: how likely the model finds each, or every substitution in each.

    python jobs/score_proteins.py --model runs/demo --input my.fasta --output scores
    python jobs/score_proteins.py --model runs/demo --input my.fasta --output scans --scan

Without --scan: `score`, the mean log likelihood of a protein's residues in nats. --method one-pass
reads it off a single pass; pseudo-ppl masks every residue in turn, which costs a pass of the whole
protein for each residue, and exp(-score) is the pseudo perplexity.

With --scan: `scan`, a list of 20 numbers for each residue: how much likelier each of
ACDEFGHIKLMNPQRSTVWY is there than the residue itself. --method wt-marginals (one pass) or
masked-marginals (one for each residue).

Writes DIR/parts/*.parquet (`id`, `sequence_sha256`, `length` and the numbers, in the order of the
input), DIR/rejects.parquet and DIR/manifest.json; with --format csv DIR/scores.csv too. Killed and
given again, the same command does what is missing.
"""

from __future__ import annotations

import argparse
from typing import Any

from bulk_commandline import (
    add_bulk_options,
    add_dedup_option,
    add_model_options,
    add_protein_options,
    find_model,
    protein_sources,
    run_bulk_job,
)
from commandline import job_parser, run_job
from raptide.bulk import ScanWork, ScoreWork
from raptide.bulk.exports import write_csv
from raptide.bulk.folder import CSV_FILE, OutputFolder
from raptide.bulk.work import Precision, Work
from raptide.errors import ConfigError

METHODS = {False: ("one-pass", "pseudo-ppl"), True: ("wt-marginals", "masked-marginals")}


def main() -> None:
    parser = job_parser(__doc__)
    add_model_options(parser)
    add_protein_options(parser)
    group = parser.add_argument_group("what is computed and written")
    group.add_argument("--scan", action="store_true", help="every substitution of each protein")
    group.add_argument(
        "--method",
        choices=(*METHODS[False], *METHODS[True]),
        help="default: one-pass, or wt-marginals with --scan",
    )
    group.add_argument(
        "--format",
        choices=("parquet", "csv"),
        default="parquet",
        help="csv makes DIR/scores.csv too",
    )
    add_dedup_option(group)
    add_bulk_options(parser)
    args = parser.parse_args()
    method = choose_method(args)
    if args.scan and args.format == "csv":
        raise ConfigError("--format csv holds one number a protein; scans are written as Parquet.")
    sources = protein_sources(args)
    model = find_model(args.model)

    def work(precision: Precision) -> Work:
        kind: Any = ScanWork if args.scan else ScoreWork
        return kind(model, precision, args.long, method)

    def finish(output: OutputFolder) -> None:
        if args.format == "csv" and not output.storage.holds(CSV_FILE):
            write_csv(output)

    run_bulk_job(args, work, sources, [model], finish)


def choose_method(args: argparse.Namespace) -> str:
    methods = METHODS[args.scan]
    if args.method in (None, *methods):
        return args.method or methods[0]
    where = "with --scan" if args.scan else "without --scan"
    raise ConfigError(f"{where} the methods are {' and '.join(methods)}, not {args.method}.")


if __name__ == "__main__":
    run_job(main)
