"""Random proteins with the lengths of UniRef and the residue frequencies of Swiss-Prot.

Lengths are log-normal (median 250, mean 331 residues), residues independent. Only the amount is
like real proteins: no two are related.
"""

from __future__ import annotations

import numpy as np

MEDIAN, SIGMA = 250, 0.75
SHORTEST, LONGEST = 10, 35_000

LETTERS = "ARNDCQEGHILKMFPSTWYV"
PERCENT = np.fromstring(
    "8.25 5.53 4.06 5.45 1.37 3.93 6.75 7.07 2.27 5.96 "
    "9.66 5.84 2.42 3.86 4.70 6.56 5.34 1.08 2.92 6.87",
    sep=" ",
)
"""How often each letter occurs, about as UniProt states it for Swiss-Prot."""


def random_proteins(count: int, *, longest: int = LONGEST, seed: int = 1) -> list[str]:
    """`count` proteins of at most `longest` residues; lengths beyond are drawn again."""
    rng = np.random.default_rng(seed)
    lengths = draw_lengths(rng, count)
    while (beyond := lengths > longest).any():
        lengths[beyond] = draw_lengths(rng, int(beyond.sum()))
    letters = draw_letters(rng, int(lengths.sum())).decode()
    ends = np.cumsum(lengths)
    return [letters[start:end] for start, end in zip(ends - lengths, ends, strict=True)]


def draw_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Residues of `count` proteins, [count] int64."""
    drawn = rng.lognormal(np.log(MEDIAN), SIGMA, count)
    return np.clip(drawn, SHORTEST, LONGEST).astype(np.int64)


def draw_letters(rng: np.random.Generator, count: int) -> bytes:
    """Through a table of 2^16 letters, to the frequencies' fourth digit."""
    ends = np.round(np.cumsum(PERCENT) / PERCENT.sum() * 2**16).astype(int)
    table = np.repeat(np.frombuffer(LETTERS.encode(), np.uint8), np.diff(ends, prepend=0))
    return table[rng.integers(0, 2**16, count, np.uint16)].tobytes()
