"""BLOSUM62 as a subject: what a substitution costs whatever the protein around it.

Henikoff and Henikoff, PNAS 1992; the numbers as NCBI distributes them, in half bits, which are in
the public domain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from raptide.alphabet import STANDARD
from raptide.evaluation.requests import Kind, Readings, Request
from raptide.evaluation.subjects.subject import Ask

BLOSUM62 = """
A  4
R -1  5
N -2  0  6
D -2 -2  1  6
C  0 -3 -3 -3  9
Q -1  1  0  0 -3  5
E -1  0  0  2 -4  2  5
G  0 -2  0 -1 -3 -2 -2  6
H -2  0  1 -1 -3  0  0 -2  8
I -1 -3 -3 -3 -1 -3 -3 -4 -3  4
L -1 -2 -3 -4 -1 -2 -3 -4 -3  2  4
K -1  2  0 -1 -3  1  1 -2 -1 -3 -2  5
M -1 -1 -2 -3 -1  0 -2 -3 -2  1  2 -1  5
F -2 -3 -3 -3 -2 -3 -3 -3 -1  0  0 -3  0  6
P -1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4  7
S  1 -1  1  0 -1  0  0  0 -1 -2 -2  0 -1 -2 -1  4
T  0 -1  0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1  1  5
W -3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1  1 -4 -3 -2 11
Y -2 -2 -2 -3 -2 -1 -2 -3  2 -1 -1 -2 -1  3 -3 -2 -2  2  7
V  0 -3 -3 -3 -1 -2 -2 -3 -3  3  1 -2  1 -1 -2 -2  0 -3 -1  4
"""
"""The lower triangle, a line a residue."""


class Blosum:
    """Scores a variant by the matrix's entries for its substitutions, added up."""

    name = "blosum62"
    digest = hashlib.sha256(BLOSUM62.encode()).hexdigest()
    baseline = True
    layers = 0
    kinds: frozenset[Kind] = frozenset({"marginals"})

    @contextmanager
    def read(self, ask: Ask) -> Iterator[Readings]:
        yield self

    def get(self, request: Request) -> np.ndarray:
        """[P, 20]: at each place the entries of its residue, whose own is 0 so that log odds are
        the entry itself; all 0 where it is none of the standard ones."""
        if request.reading.kind not in self.kinds:
            raise KeyError(request)
        rows = [STANDARD.find(request.sequence[place]) for place in request.places]
        return MARGINALS[rows]


def read_matrix() -> np.ndarray:
    """The whole matrix, rows and columns as STANDARD, [20, 20] fp32."""
    lines = [line.split() for line in BLOSUM62.strip().splitlines()]
    places = [STANDARD.index(letter) for letter, *_ in lines]
    matrix = np.zeros((20, 20), np.float32)
    for row, (_, *values) in enumerate(lines):
        for column, value in enumerate(values):
            matrix[places[row], places[column]] = matrix[places[column], places[row]] = int(value)
    return matrix


MARGINALS = np.vstack([read_matrix() * (1 - np.eye(20, dtype=np.float32)), np.zeros((1, 20), "f4")])
"""What is read at a residue, [21, 20]; the last row is for other letters."""
