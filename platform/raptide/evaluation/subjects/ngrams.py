"""Baselines that know letters alone: uniform, unigram and n-grams, asked as models are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from raptide.alphabet import FIRST_RESIDUE, STANDARD, encode_residues
from raptide.evaluation.masks import BACKGROUND, choose_residues, score_masked
from raptide.evaluation.ngrams import LETTERS, NgramCounts, Ngrams
from raptide.evaluation.requests import Kind, Readings, Request
from raptide.evaluation.subjects.subject import Ask

LogP = Callable[[np.ndarray], np.ndarray]
"""From a protein's residue ids [L] uint8 to log p of each of LETTERS at each residue, [L, 25]."""

STANDARD_COLUMNS = [LETTERS.index(letter) for letter in STANDARD]


@dataclass
class LetterBaseline:
    """A baseline that gives every residue a distribution over the 25 letters."""

    name: str
    digest: str
    kinds: frozenset[Kind]
    load: Callable[[], LogP]
    """Called when it is read, since it may have to count first."""
    baseline: bool = True
    layers: int = 0

    @contextmanager
    def read(self, ask: Ask) -> Iterator[Readings]:
        """What is asked for is computed when it is got: nothing is kept."""
        yield _OnTheSpot(self.load(), self.kinds)


@dataclass(frozen=True)
class _OnTheSpot:
    """Readings of a letter baseline."""

    log_p: LogP
    kinds: frozenset[Kind]

    def get(self, request: Request) -> np.ndarray:
        if request.reading.kind not in self.kinds:
            raise KeyError(request)
        residues = encode_residues(request.sequence)
        log_p_LA = self.log_p(residues)
        if request.reading.kind == "marginals":
            places = np.array(request.places, np.int64)
            return log_p_LA[places][:, STANDARD_COLUMNS].astype(np.float32)
        chosen = choose_residues(request.sequence)
        log_p_CV = np.full((len(chosen.places), FIRST_RESIDUE + len(LETTERS)), -np.inf)
        log_p_CV[:, FIRST_RESIDUE:] = log_p_LA[chosen.places]
        return score_masked(log_p_CV, chosen, residues, request.reading.method)


def uniform() -> LetterBaseline:
    """Every letter has the same probability: its ECE is 25."""
    log_p = np.full(len(LETTERS), -np.log(len(LETTERS)))
    return LetterBaseline(
        "uniform", _digest("uniform"), frozenset({"masked"}), lambda: _everywhere(log_p)
    )


def unigram(digest: str, counts: Callable[[], NgramCounts]) -> LetterBaseline:
    """Each letter has its share of the counted residues, one added to each count.

    Its "marginals" are the same at every place, so that their differences are log odds.

    Args:
        digest: stands for the counts.
        counts: called when it is read.
    """
    return _unigram(digest, lambda: counts().letters)


def natural_unigram() -> LetterBaseline:
    """The unigram of Swiss-Prot, where there are no proteins to count."""
    counts = np.zeros(len(LETTERS), np.int64)
    counts[: len(BACKGROUND)] = 1000 * BACKGROUND  # against which one is little
    return _unigram("Swiss-Prot", lambda: counts)


def _unigram(digest: str, count: Callable[[], np.ndarray]) -> LetterBaseline:
    def load() -> LogP:
        seen = count() + 1
        return _everywhere(np.log(seen / seen.sum()))

    kinds: frozenset[Kind] = frozenset({"masked", "marginals"})
    return LetterBaseline("unigram", _digest("unigram", digest), kinds, load)


def ngram(order: int, digest: str, counts: Callable[[], NgramCounts]) -> LetterBaseline:
    """Each letter has its probability after the true ones before it."""

    def load() -> LogP:
        return Ngrams(counts(), order).log_p

    name = f"{order}-gram"
    return LetterBaseline(name, _digest(name, digest), frozenset({"masked"}), load)


def _everywhere(log_p: np.ndarray) -> LogP:
    return lambda residues: np.broadcast_to(log_p, (len(residues), len(log_p)))


def _digest(*parts: str) -> str:
    return hashlib.sha256(" ".join(("letters 1", *parts)).encode()).hexdigest()
