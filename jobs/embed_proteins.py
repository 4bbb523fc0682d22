"""Embed proteins: whole proteomes, on any number of engines, resumed where they were killed.

    python jobs/embed_proteins.py --model runs/demo --input my.fasta --output embeddings
    python jobs/embed_proteins.py --model runs/demo --input proteomes/ 's3://bucket/*.fasta.gz' \\
        --output s3://bucket/embeddings --pooling residue --layers -1,6 --dtype fp16
    zcat *.fasta.gz | python jobs/embed_proteins.py --model runs/demo --input - --output embeddings

Writes DIR/parts/*.parquet, one data set to pandas, polars, DuckDB and pyarrow, in the order of the
input: `id`, `sequence_sha256`, `length` and `embedding` (several layers: `embedding_-1`, ...); then
DIR/rejects.parquet, the records that were not embedded and why, and DIR/manifest.json. The numbers
are those of the engine and of the endpoint.

Killed and given again, the same command does what is missing. docs/bulk.md has the whole story.
"""

from __future__ import annotations

import argparse

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
from raptide.bulk import EmbedWork
from raptide.bulk.exports import refuse_no_h5py, write_h5
from raptide.bulk.folder import H5_FILE, OutputFolder
from raptide.errors import ConfigError


def main() -> None:
    parser = job_parser(__doc__)
    add_model_options(parser)
    add_protein_options(parser)
    group = parser.add_argument_group("what is computed and written")
    group.add_argument(
        "--pooling",
        choices=("mean", "bos", "residue"),
        default="mean",
        help="the mean over the residues, the first token, or a vector each",
    )
    group.add_argument(
        "--layers",
        type=layer_list,
        default=(-1,),
        metavar="LIST",
        help="such as -1,6: 0 is the embedding, negative ones count from the last (default: -1)",
    )
    group.add_argument(
        "--dtype", choices=("fp32", "fp16"), default="fp32", help="of what is written"
    )
    group.add_argument(
        "--format",
        choices=("parquet", "h5"),
        default="parquet",
        help="h5 makes DIR/embeddings.h5 too, as biotrainer reads it",
    )
    add_dedup_option(group)
    add_bulk_options(parser)
    args = parser.parse_args()
    if args.format == "h5":
        refuse_no_h5py()
        if len(args.layers) > 1:
            raise ConfigError("--format h5 holds one layer, so --layers can name only one.")
    sources = protein_sources(args)
    model = find_model(args.model)

    def finish(output: OutputFolder) -> None:
        if args.format == "h5" and not output.storage.holds(H5_FILE):
            write_h5(output)

    run_bulk_job(
        args,
        lambda precision: EmbedWork(
            *(model, precision, args.long, args.pooling, args.layers, args.dtype),
            h5_keys=args.format == "h5",
        ),
        sources,
        [model],
        finish,
    )


def layer_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers such as -1,6") from None


if __name__ == "__main__":
    run_job(main)
