"""Composition as a baseline: a protein is how often each stretch of three residues occurs in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from raptide.alphabet import FIRST_RESIDUE, NUM_STANDARD, encode_residues
from raptide.evaluation.requests import Kind, Request
from raptide.evaluation.subjects.subject import Ask

LENGTH = 3
WIDTH = NUM_STANDARD**LENGTH


class Kmers:
    """Counts of 3-mers over the 20 standard letters, as vectors of length 1."""

    name = "kmer"
    digest = hashlib.sha256(f"{LENGTH}-mer counts, version 1".encode()).hexdigest()
    baseline = True
    layers = 0
    kinds: frozenset[Kind] = frozenset({"mean"})

    @contextmanager
    def read(self, ask: Ask) -> Iterator[KmerReadings]:
        """Nothing is kept: vectors are made when they are asked for, asked before or not."""
        yield KmerReadings()


class KmerReadings:
    """3-mer counts on the spot."""

    def get(self, request: Request) -> np.ndarray:
        return count_kmers(request.sequence)


def count_kmers(sequence: str) -> np.ndarray:
    """Counts of 3-mers as a vector of length 1, [8000] fp32.

    A 3-mer with any other letter than the 20 is not counted; without any, all are 0.
    """
    letters = encode_residues(sequence).astype(np.int64) - FIRST_RESIDUE
    stretches = np.lib.stride_tricks.sliding_window_view(
        np.pad(letters, (0, max(0, LENGTH - len(letters))), constant_values=NUM_STANDARD), LENGTH
    )
    standard = stretches[(stretches < NUM_STANDARD).all(axis=1)]
    places = standard @ (NUM_STANDARD ** np.arange(LENGTH)[::-1])
    counts = np.bincount(places, minlength=WIDTH).astype(np.float32)
    length = np.linalg.norm(counts)
    return counts / length if length else counts
