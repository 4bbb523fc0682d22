"""Build a corpus from FASTA files, or look at one.

    python jobs/build_corpus.py --input proteins.fasta more.fasta.gz --output corpora/mine
    python jobs/build_corpus.py --input proteins.fasta --clusters proteins_cluster.tsv.gz \\
        --output corpora/mine
    python jobs/build_corpus.py inspect corpora/mine --verify

Reads plain, gz, bz2, xz and zst files of protein sequences (told by content, not by name), orders
clusters by a hash, holds a share of them out, and writes Parquet shards with a manifest. The result
does not depend on the order of the files or on the number of cores. Unpack large files first: plain
ones are read by all cores at once, a compressed one by a single core.

A build that was interrupted goes on when the same command is given again, and ends with the same
corpus. Until then it is a folder DIR.partial.

Letters A to Z are residues (J reads as X); lower case counts as upper case; a trailing * is
dropped; anything else stops the build with its file and line, or is dropped and counted
(--stop-codons, --bad-letters, --nucleotides).

Whole clusters are held out, chosen by a hash of the name or listed in a file. A training sequence
that equals a held-out one letter for letter is dropped; what else is dropped is up to you. The
manifest counts every reason.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from commandline import (
    add_reading_options,
    as_called,
    job_parser,
    reading_rules,
    refuse_output,
    run_job,
)
from raptide.cluster import local_cpus, ray_session
from raptide.config import parse_settings
from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.building.cleaning import CleaningSettings
from raptide.data.building.heldout import read_list
from raptide.data.building.picture import draw_corpus
from raptide.data.corpus import Corpus
from raptide.data.fasta_text import refuse_missing


def main() -> None:
    if sys.argv[1:2] == ["inspect"]:
        inspect(sys.argv[2:])
    else:
        build()


def inspect(arguments: list[str]) -> None:
    parser = job_parser("Print what a corpus holds, and draw it.")
    parser.prog += " inspect"
    parser.add_argument("corpus", type=Path, metavar="DIR", help="a corpus")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--verify", action="store_true", help="compare every file's hash with the manifest's"
    )
    args = parser.parse_args(arguments)
    corpus = Corpus.open(args.corpus)
    _print_counts(corpus)
    _print_samplings(corpus)
    _print_shares("lengths", _merge(corpus, "length_histogram", width=250))
    _print_shares("residues", _merge(corpus, "residue_counts"))
    if args.verify:
        corpus.verify()
        shards = len(corpus.manifest["shards"])
        print(f"Verified: {shards} shards and the block table have the hashes of the manifest.")
    _draw(corpus)


def _print_samplings(corpus: Corpus) -> None:
    train = corpus.manifest["counts"]["train"]
    clusters, sequences = train.get("clusters", 0), train.get("sequences", 0)
    print("  an epoch of training, by stream.sampling")
    print(f"    representatives {clusters:>12,} sequences (UR50/S)")
    print(f"    members         {clusters:>12,} sequences, drawn from {sequences:,} (UR50/D)")
    print(f"    all             {sequences:>12,} sequences (UR100)")


def _draw(corpus: Corpus) -> None:
    """The picture is an extra: a corpus on a read-only disk can be looked at without."""
    try:
        print(f"Picture: {draw_corpus(corpus)}")
    except OSError as error:
        print(f"No picture was drawn: {error}")


def _merge(corpus: Corpus, field: str, width: int | None = None) -> dict[str, int]:
    """Sum of a counter over both splits; lengths in coarser bins."""
    total: dict[str, int] = {}
    for counter in corpus.manifest[field].values():
        for key, count in counter.items():
            name = f"{int(key) // width * width:,}" if width else key
            total[name] = total.get(name, 0) + count
    if width:
        return dict(sorted(total.items(), key=lambda item: int(item[0].replace(",", ""))))
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _print_shares(title: str, counter: dict[str, int]) -> None:
    """A bar a line; what is below 0.05% is summed up."""
    total = sum(counter.values())
    print(f"  {title}")
    rest = 0
    for name, count in counter.items():
        if count < 0.0005 * total:
            rest += count
            continue
        print(f"    {name:>7} {100 * count / total:5.1f}% {'#' * round(120 * count / total)}")
    if rest:
        print(f"    {'others':>7} {100 * rest / total:5.2f}%")


def build() -> None:
    defaults = BuildSettings()
    parser = job_parser(__doc__)
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="FASTA",
        help="files, plain or compressed",
    )
    group.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the corpus, a new folder"
    )
    group = parser.add_argument_group("clusters, and which are held out")
    group.add_argument(
        "--holdout-fraction",
        type=float,
        default=defaults.holdout_fraction,
        metavar="SHARE",
        help="of the clusters, 0 to 1, held out of training",
    )
    group.add_argument(
        "--cluster-tag",
        metavar="NAME",
        help="header field that names a record's cluster, e.g. cluster50 for cluster50=P12345, or "
        "UniRef's Tax for whole species (default: each record is its own cluster); refused if no "
        "header has it",
    )
    group.add_argument(
        "--clusters",
        type=Path,
        nargs="+",
        default=[],
        metavar="TSV",
        help="cluster tables as MMseqs2 writes them (representative, tab, member; plain or "
        "compressed); for records that no line names see --unclustered",
    )
    group.add_argument(
        "--unclustered",
        choices=get_args(BuildSettings.model_fields["unclustered"].annotation),
        help="records that no table and no header puts into a cluster: each becomes a cluster "
        "of its own, though relatives may be held out (the default), or is dropped and counted, or "
        "ends the build",
    )
    group.add_argument(
        "--holdout-clusters",
        type=Path,
        metavar="FILE",
        help="names of clusters to hold out, or of members whose clusters are meant, one a line, "
        "beside those that the hash chooses; plain or compressed, also FASTA headers; P69905 and "
        "sp|P69905|HBA_HUMAN are one name, as in cluster tables",
    )
    group.add_argument(
        "--clusters-of-a-larger-set",
        action="store_true",
        help="the tables may name members that the input has not, as UniRef's do for a part of it",
    )
    group = parser.add_argument_group("how it is written")
    group.add_argument(
        "--block-residues",
        type=int,
        default=defaults.block_residues,
        metavar="N",
        help="residues in a block, the unit of reading and shuffling",
    )
    add_reading_options(parser)
    cleaning = parser.add_argument_group("cleaning")
    cleaning.add_argument(
        "--min-residues", type=int, metavar="N", help="drop sequences of fewer residues"
    )
    cleaning.add_argument(
        "--max-residues", type=int, metavar="N", help="drop sequences of more residues"
    )
    cleaning.add_argument(
        "--max-unknown-fraction",
        type=float,
        metavar="SHARE",
        help="drop those of whose residues more than this, 0 to 1, are X",
    )
    cleaning.add_argument(
        "--drop-duplicates",
        action="store_true",
        default=None,
        help="keep one of sequences that are equal letter for letter",
    )
    args = parser.parse_args()
    given = {name: value for name, value in vars(args).items() if value is not None}
    rules = {name: given[name] for name in CleaningSettings.model_fields if name in given}
    shape = {name: given[name] for name in BuildSettings.model_fields if name in given}
    tree = shape | {"cleaning": rules, "reading": reading_rules(args)}
    settings = parse_settings(BuildSettings, tree, source="command line")
    refuse_output(args.output, "--output")
    for file in args.input:
        refuse_missing(file)
    for file in args.clusters:
        refuse_missing(file, what="cluster table")
    listed = read_list(args.holdout_clusters) if args.holdout_clusters else []
    with _told_how_to_go_on(), ray_session(num_cpus=local_cpus(), verbose=args.verbose):
        corpus = build_corpus(
            args.input,
            args.output,
            settings,
            cluster_tables=args.clusters,
            heldout_clusters=listed,
            say=lambda line: print(line, flush=True),
        )
    _print_summary(corpus)


@contextmanager
def _told_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("The same command goes on where this build stopped.", file=sys.stderr)
        raise


def _print_summary(corpus: Corpus) -> None:
    _print_counts(corpus)
    _draw(corpus)
    print(
        as_called(
            "Train on it: python jobs/pretrain_model.py --config jobs/recipes/demo.yaml "
            f"--output runs/mine {shlex.quote(f'corpus={corpus.where}')}"
        )
    )


def _print_counts(corpus: Corpus) -> None:
    print(f"Corpus {corpus.where}, digest {corpus.digest[:16]}")
    for split in ("train", "heldout"):
        counts = corpus.manifest["counts"][split]
        print(
            f"  {split:8} {counts.get('clusters', 0):>12,} clusters "
            f"{counts.get('sequences', 0):>12,} sequences {counts.get('residues', 0):>15,} residues"
        )
    if stated := corpus.manifest.get("stated_members"):
        print(f"  UniRef's headers count {stated:,} members of these clusters (n=)")
    for reason, count in corpus.manifest["dropped"].items():
        first = corpus.manifest.get("dropped_first", {}).get(reason)
        named = f", first {first}" if first else ""
        print(f"  {count:,} of {corpus.manifest['read']:,} records dropped: {reason}{named}")
    if latin1 := corpus.manifest.get("latin1_headers"):
        print(f"  {latin1:,} headers are no UTF-8 and were read as Latin-1")
    if renamed := corpus.manifest["renamed_duplicates"]:
        print(
            f"  {renamed:,} records shared a name with another and were numbered (name#2, or "
            "name##2 where a name ends so already)"
        )


if __name__ == "__main__":
    run_job(main)
