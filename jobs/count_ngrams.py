"""Count 1- to 4-grams of residues, which models are compared with.

    python jobs/count_ngrams.py --corpus corpora/mine --output corpora/mine.ngrams
    python jobs/count_ngrams.py --fasta train.fasta more.fasta.gz --test test.fasta \\
        --output train.ngrams

Counts the training side of a corpus, or FASTA files, through Ray Data. Then the ECE of n-grams with
interpolated Kneser-Ney smoothing is printed, over all residues of the corpus's first 20,000
held-out representatives, or of the first proteins of --test. The task `perplexity` of
evaluate_model.py takes the file as `counts`, or counts for itself.

The file has 3.5 MB, however much is counted: safetensors, with the digests of what was counted in
its header.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
from tqdm import tqdm

from commandline import add_reading_options, job_parser, reading_rules, refuse_output, run_job
from raptide.alphabet import FIRST_RESIDUE
from raptide.cluster import local_cpus, ray_session
from raptide.data.corpus import Corpus
from raptide.data.streaming.rows import Sampling
from raptide.errors import ConfigError
from raptide.evaluation.counting import CorpusText, FastaText, Text, count_ngrams
from raptide.evaluation.ngrams import MOST_ORDER, NgramCounts, Ngrams

TESTED = 20_000
"""Proteins that the ECE is measured on, at most."""


def main() -> None:
    parser = job_parser(__doc__)
    group = parser.add_argument_group("input and output")
    given = group.add_mutually_exclusive_group(required=True)
    given.add_argument("--corpus", type=Path, metavar="DIR", help="count its training side")
    given.add_argument("--fasta", type=Path, nargs="+", metavar="FASTA", help="count these")
    group.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the counts, 3.5 MB"
    )
    group.add_argument("--replace", action="store_true", help="write over an existing FILE")
    group.add_argument(
        "--sampling",
        choices=get_args(Sampling),
        help="of a corpus: representatives (the default), or of each cluster the member that epoch "
        "0 draws, or all",
    )
    group.add_argument(
        "--test", type=Path, nargs="+", metavar="FASTA", help="proteins to print the ECE of"
    )
    add_reading_options(parser)
    args = parser.parse_args()
    _refuse(args)
    counted, tested = _texts(args)
    with (
        ray_session(num_cpus=local_cpus(), verbose=args.verbose),
        tqdm(desc="counting", unit=" residues", unit_scale=True, disable=None) as bar,
    ):
        counts = count_ngrams(counted, bar.update)
    counts.save(args.output)
    said = counts.manifest
    print(f"{args.output}: {said['proteins']:,} proteins, {said['residues']:,} residues counted")
    if tested and tested.stretches:
        _print_ece(counts, tested)


def _refuse(args: argparse.Namespace) -> None:
    if args.sampling and not args.corpus:
        raise ConfigError("--sampling draws from clusters, which only --corpus has; leave it out.")
    if args.output.exists() and not args.replace:
        raise ConfigError(f"--output {args.output} is there already; give --replace to replace it.")
    refuse_output(args.output, "--output")


def _texts(args: argparse.Namespace) -> tuple[Text, Text | None]:
    """What is counted, and what is tested on."""
    rules = reading_rules(args)
    tested = FastaText.of(args.test, rules) if args.test else None
    if args.fasta:
        return FastaText.of(args.fasta, rules), tested
    corpus = Corpus.open(args.corpus)
    counted = CorpusText.of(corpus, "train", args.sampling or "representatives")
    return counted, tested or CorpusText.of(corpus, "heldout", "representatives")


def _print_ece(counts: NgramCounts, tested: Text) -> None:
    models = [Ngrams(counts, order) for order in range(1, MOST_ORDER + 1)]
    nats, proteins, residues = np.zeros(len(models)), 0, 0
    for each in islice(_one_by_one(tested), TESTED):
        places, letters = np.arange(len(each)), each.astype(np.int64) - FIRST_RESIDUE
        nats -= [model.log_p(each)[places, letters].sum() for model in models]
        proteins += 1
        residues += len(each)
    print(f"ECE over {proteins:,} proteins that were not counted, {residues:,} residues:")
    for model, sum_ in zip(models, nats, strict=True):
        print(f"  {model.order}-gram {math.exp(sum_ / residues):6.2f}")


def _one_by_one(text: Text) -> Iterator[np.ndarray]:
    """The residue ids of each protein, [L] uint8."""
    for proteins in text.read(range(text.stretches)):
        yield from np.split(proteins.residues, np.cumsum(proteins.lengths)[:-1])


if __name__ == "__main__":
    run_job(main)
