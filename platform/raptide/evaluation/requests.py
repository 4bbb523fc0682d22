"""What tasks ask of subjects, and what they get.

Shape letters: L residues of a sequence, P places asked for, D width of a subject's vectors.
"""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple, Protocol

import numpy as np

Kind = Literal[
    "residues",
    "mean",
    "sites",
    "contacts",
    "masked",
    "marginals",
    "pseudo",
    "letters",
    "hits",
    "scores",
]
"""What can be read off a subject, always fp32:

residues   [L, D]   a vector for each residue, out of `layer`
mean       [D]      their mean: a vector for the protein
sites      [P, D]   those at `places`
contacts   [L, L]   symmetric; the higher, the likelier two residues touch
masked     [C, 2]   of each of the C residues that `masks.choose_residues` chooses in the sequence:
                    -log p of the true letter in nats, and 1 where it is the likeliest, else 0 (of n
                    equally likely ones, 1 / n); with method "shuffled" of a letter that has nothing
                    to do with it, in place of the true one (`masks.score_masked`)
marginals  [P, 20]  log p of each standard letter (`alphabet.STANDARD`) at `places`, up to a
                    constant a place; with method "wt-marginals" of the sequence as it is, with
                    "masked-marginals" while that place alone is masked
pseudo     [1]      pseudo log likelihood of the whole sequence, nats
letters    [20, D]  what a subject makes of each standard letter at its output; sequence ""
hits       [N]      similarity to each of the N sequences that hits are asked of, in the order in
                    which they are asked; -inf where none is found
scores     never asked for: a table of variants with their scores (`subjects/predictions.py`)
"""


class Reading(NamedTuple):
    """What is read; of all fields but `kind`, those that the kind knows."""

    kind: Kind
    layer: int = -1
    """0 is the embedding, i the output of layer i; counted from the front, never negative, once a
    subject has been asked (`Subject.layers` tells how many)."""
    method: str = ""


class Request(NamedTuple):
    """One thing that a task wants of one sequence. Equal requests are read once."""

    reading: Reading
    sequence: str
    places: tuple[int, ...] = ()
    """Counted from 0."""

    @property
    def key(self) -> bytes:
        """16 bytes that stand for it."""
        text = "\0".join((*map(str, self.reading), self.sequence, *map(str, self.places)))
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Readings(Protocol):
    """What a subject was asked, on disk or made on the spot; memory does not grow with it."""

    def get(self, request: Request) -> np.ndarray:
        """The array of one request, as `Kind` says; read-only.

        Raises:
            KeyError: it was not asked.
        """
