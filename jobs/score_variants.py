"""Score variants: tables of mutants come back with one column more for each model and method.

    python jobs/score_variants.py --model runs/demo --input ProteinGym/*.csv --output scored
    python jobs/score_variants.py --model esm1v_1.pt esm1v_2.pt --method masked-marginals \\
        --input scans/ --output scored
    python jobs/score_variants.py --model runs/demo --input variants.tsv --fasta proteins.fasta \\
        --offset 23 --output scored

A score says how much likelier the model finds a variant than its protein, in nats; above 0 is
likelier. --method wt-marginals reads all variants of a protein off one pass, masked-marginals masks
each position that changes (a pass a position), pseudo-ppl masks every residue of every variant in
turn (a pass a residue and variant).

Tables are CSV, TSV or Parquet, CSV also compressed. The column `mutant` holds substitutions such as
A42G, several joined as A42G:K50R; `WT`, `_wt` and nothing are the protein itself and score 0. The
protein is in the column `sequence`; or it is the record of --fasta that the column `id` names; or,
in ProteinGym's own files, it is `mutated_sequence` with the variant put back. A Parquet file may
name one for all rows as `target_sequence` in its metadata. --offset 23 says that the first residue
of each protein has number 24 in `mutant`.

Writes DIR/tables/NAME for each input NAME, of its kind: all rows, and all columns and their order
byte for byte, and then `raptide_MODEL_METHOD`. What cannot be scored has an empty score and is in
DIR/rejects.parquet with the reason. DIR/parts/*.parquet is what the tables are made of. Killed and
given again, the same command does what is missing.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import get_args

from bulk_commandline import (
    add_bulk_options,
    add_long_option,
    add_model_options,
    find_model,
    run_bulk_job,
)
from commandline import job_parser, run_job
from raptide.bulk import VariantWork, find_tables
from raptide.bulk.folder import TABLES, OutputFolder
from raptide.bulk.tables import write_tables
from raptide.errors import ConfigError
from raptide.methods import VariantMethod

METHODS = get_args(VariantMethod)


def main() -> None:
    parser = job_parser(__doc__)
    add_model_options(parser, nargs="+", action="extend", help="one or several, of any format")
    add_table_options(parser)
    add_bulk_options(parser)
    args = parser.parse_args()
    methods = tuple(dict.fromkeys(args.method or ["wt-marginals"]))
    names = [f"raptide_{model}_{method}" for model in model_names(args.model) for method in methods]
    tables = find_tables(args.input, names, args.offset, args.fasta)
    models = [find_model(path) for path in args.model]

    def finish(output: OutputFolder) -> None:
        write_tables(output, tables, names)
        print(f"{len(tables):,} table{'s' if len(tables) > 1 else ''} scored")
        print(f"  {output.path(TABLES)}")

    run_bulk_job(
        args,
        lambda precision: VariantWork(
            *(tuple(models), precision, args.long, methods, tuple(names), args.offset)
        ),
        tables,
        models,
        finish,
        "variants",
    )


def add_table_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is read and computed")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="TABLE",
        help="tables, folders, globs or URIs",
    )
    group.add_argument(
        "--fasta", nargs="+", metavar="FILE", help="proteins that the column id names"
    )
    group.add_argument(
        "--method",
        nargs="+",
        action="extend",
        choices=METHODS,
        help="one or several (default: wt-marginals)",
    )
    group.add_argument(
        "--offset",
        type=int,
        default=0,
        metavar="N",
        help="number of the position before a protein's first (default: %(default)s)",
    )
    add_long_option(group)


def model_names(paths: list[Path]) -> list[str]:
    """What models are called: their files' names, with folders before them where two are alike.

    Raises:
        ConfigError: a model is named twice.
    """
    parts = [path.resolve().with_suffix(path.suffix.replace(".pt", "")).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [re.sub(r"[^\w.+-]", "_", "_".join(each[-length:])) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("--model names one model twice; give each once.")


if __name__ == "__main__":
    run_job(main)
