"""Random proteins with the lengths and headers of UniRef, as a FASTA file of any size.

    python tests/benchmarks/synthetic_proteins.py 500000 proteins.fasta

They are those of raptide.data.building.synthetic, cut at 10 and 35,000 residues, 60 a line. No two
proteins are related, so zstd finds nothing but the frequencies. The first records can be put into
one cluster.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from raptide.data.building.synthetic import draw_lengths, draw_letters

LINE = 60
BATCH = 10_000


def write_proteins(path: Path, count: int, *, one_cluster: int = 0, seed: int = 1) -> int:
    """Write `count` records; returns how many residues they have.

    Args:
        one_cluster: so many of them, the first ones, say `cluster50=giant`.
    """
    rng = np.random.default_rng(seed)
    residues = 0
    with path.open("wb") as file, tqdm(total=count, unit=" proteins", desc=path.name) as bar:
        for first in range(0, count, BATCH):
            lengths = draw_lengths(rng, min(BATCH, count - first))
            file.writelines(_records(rng, first, lengths, one_cluster))
            residues += int(lengths.sum())
            bar.update(len(lengths))
    return residues


def _records(
    rng: np.random.Generator, first: int, lengths: np.ndarray, one_cluster: int
) -> Iterator[bytes]:
    letters = draw_letters(rng, int(lengths.sum()))
    start = 0
    for number, length in enumerate(lengths.tolist(), first):
        name = f"A0A{number:07X}"
        cluster = " cluster50=giant" if number < one_cluster else ""
        yield (
            f">UniRef50_{name} Uncharacterized protein n={1 + number % 7} Tax=Escherichia coli "
            f"TaxID=562 RepID={name}_ECOLX{cluster}\n"
        ).encode()
        lines = range(start, start + length, LINE)
        yield b"\n".join(letters[i : min(i + LINE, start + length)] for i in lines) + b"\n"
        start += length


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int)
    parser.add_argument("output", type=Path)
    parser.add_argument("--one-cluster", type=int, default=0, metavar="N")
    args = parser.parse_args()
    residues = write_proteins(args.output, args.count, one_cluster=args.one_cluster)
    print(f"{residues:,} residues")
