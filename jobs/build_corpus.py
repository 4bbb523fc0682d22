"""Build a corpus from FASTA files.

    python jobs/build_corpus.py --input proteins.fasta more.fasta.gz --output corpora/mine

Reads plain, gz, bz2, xz and zst files of protein sequences, orders clusters by a hash, holds a
share of them out, and writes Parquet shards with a manifest. The result does not depend on the
order of the files or on the number of cores.

Letters A to Z are residues (J reads as X); lower case counts as upper case; a trailing * is
dropped; anything else stops the build with its file and line.
"""

from __future__ import annotations

from pathlib import Path

from commandline import job_parser, run_job
from raptide.cluster import local_cpus, ray_session
from raptide.config import parse_settings
from raptide.data.build import BuildSettings, build_corpus
from raptide.data.corpus import Corpus


def main() -> None:
    defaults = BuildSettings()
    parser = job_parser(__doc__)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FASTA")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--holdout-fraction",
        type=float,
        default=defaults.holdout_fraction,
        help="share of clusters held out of training (default: %(default)s)",
    )
    parser.add_argument(
        "--block-residues",
        type=int,
        default=defaults.block_residues,
        help="residues in a block, the unit of reading and shuffling (default: %(default)s)",
    )
    parser.add_argument(
        "--cluster-tag",
        metavar="NAME",
        help="header field that names a record's cluster, e.g. cluster50 for cluster50=P12345 "
        "(default: each record is its own cluster)",
    )
    args = parser.parse_args()
    settings = parse_settings(
        BuildSettings,
        {name: getattr(args, name) for name in BuildSettings.model_fields},
        source="command line",
    )
    with ray_session(num_cpus=local_cpus(), verbose=args.verbose):
        corpus = build_corpus(args.input, args.output, settings)
    _print_summary(corpus)


def _print_summary(corpus: Corpus) -> None:
    print(f"Corpus {corpus.path}, digest {corpus.digest[:16]}")
    for split in ("train", "heldout"):
        counts = corpus.manifest["counts"][split]
        print(
            f"  {split:8} {counts.get('clusters', 0):>12,} clusters "
            f"{counts.get('sequences', 0):>12,} sequences {counts.get('residues', 0):>15,} residues"
        )
    if renamed := corpus.manifest["renamed_duplicates"]:
        print(f"  {renamed:,} records shared a name with another and were numbered (name#2)")
    print(
        f"Train on it: python jobs/pretrain_model.py --config jobs/recipes/demo.yaml "
        f"--output runs/mine corpus={corpus.path}"
    )


if __name__ == "__main__":
    run_job(main)
