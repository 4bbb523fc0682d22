"""n-grams of residues, with interpolated Kneser-Ney smoothing.

Of order n, the probability of a letter w after the history h, its last n - 1 letters, is

    P(w | h) = max(c(h w) - D, 0) / c(h .)  +  D N(h .) / c(h .)  P(w | h without its first letter)

where c(h .) sums c(h w) over the letters w, and N(h .) counts those that were seen after h; after a
history that never was, it is the second P alone. In the highest order c counts occurrences; below
it, c(h w) is how many different letters were seen before h w. Each order has one discount,
D = n1 / (n1 + 2 n2), from how many of its n-grams have a count of 1 and of 2. Below the single
letters lies the uniform distribution. (Kneser and Ney, 1995; interpolated as in Chen and Goodman,
1999.)

A protein's beginning is a letter of its own. A history reaches no further than to it; and since
nothing stands before it, n-grams that begin with it count occurrences in every order.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from raptide.alphabet import FIRST_RESIDUE, RESIDUES
from raptide.errors import InputError

LETTERS = RESIDUES[:25]
"""What is predicted: the residue letters less the two signs for gaps, which no protein holds."""

BEGIN = len(LETTERS)
"""The letter before a protein's first."""

SYMBOLS = BEGIN + 1
MOST_ORDER = 4
SHAPE = (SYMBOLS,) * (MOST_ORDER - 1) + (BEGIN,)
"""Of the counts: 3.5 MB, however much is counted."""

CHUNK = 1 << 20
"""Residues whose n-grams are in memory at once."""

FALLBACK = 0.5
"""The discount where no n-gram was seen just once, so that there is nothing to estimate it by."""

FORMAT_VERSION = 1


def count_grams(residues: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How often each letter follows each history of three, [26, 26, 26, 25] int64.

    Args:
        residues: ids of some proteins, end to end, uint8.
        lengths: residues of each, [n] int64.
    """
    before = MOST_ORDER - 1
    starts = np.repeat(np.cumsum(lengths) - lengths, before)
    letters = np.insert(residues - np.uint8(FIRST_RESIDUE), starts, BEGIN)
    counts = np.zeros(SYMBOLS**MOST_ORDER, np.int64)
    for start in range(0, len(letters) - before, CHUNK):
        codes = _codes(letters[start : start + CHUNK + before], MOST_ORDER)
        counts += np.bincount(codes, minlength=len(counts))
    return counts.reshape((SYMBOLS,) * MOST_ORDER)[..., :BEGIN].copy()


def _codes(letters: np.ndarray, width: int) -> np.ndarray:
    """Each `width` letters in a row as one number to the base SYMBOLS, int64."""
    codes = np.zeros(len(letters) - width + 1, np.int64)
    for first in range(width):
        codes *= SYMBOLS
        codes += letters[first : first + len(codes)]
    return codes


@dataclass(frozen=True)
class NgramCounts:
    """What n-grams of all orders are made of: one safetensors file, manifest in its header."""

    table: np.ndarray
    """How often each letter follows each history of three letters, [26, 26, 26, 25] int64."""

    manifest: dict[str, Any]
    """`source`: digests of what was counted, and how it was read; `proteins` and `residues`."""

    @property
    def letters(self) -> np.ndarray:
        """How often each of LETTERS occurs, [25] int64."""
        return self.table.sum((0, 1, 2))

    def save(self, file: Path) -> None:
        """Write a file, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        manifest = {
            "format_version": FORMAT_VERSION,
            **self.manifest,
            "counts_sha256": _sha256(self.table),
        }
        data = save(
            {"counts": np.ascontiguousarray(self.table)}, {"manifest": json.dumps(manifest)}
        )
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            partial.rename(file)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: Path) -> NgramCounts:
        """Read a file that `save` wrote.

        Raises:
            InputError: there is none, it is something else, or it is damaged.
        """
        try:
            with safe_open(file, "np") as opened:
                manifest = json.loads(opened.metadata()["manifest"])
                table = opened.get_tensor("counts")
            whole = manifest.pop("counts_sha256") == _sha256(table) and table.shape == SHAPE
            version = manifest.pop("format_version")
        except (OSError, SafetensorError, TypeError, ValueError, LookupError):
            whole, version = False, None
        if not whole or version != FORMAT_VERSION:
            raise InputError(
                f"{file} holds no n-gram counts of version {FORMAT_VERSION}, or is damaged; count "
                "with `python jobs/count_ngrams.py`."
            )
        return cls(table, manifest)


def _sha256(table: np.ndarray) -> str:
    return hashlib.sha256(table.astype("<i8").tobytes()).hexdigest()


class Ngrams:
    """The n-grams of one order.

    Args:
        order: 1 to 4; 1 looks at no history.
    """

    def __init__(self, counts: NgramCounts, order: int) -> None:
        self.order = order
        self._log_p = np.log(smooth(counts.table, order)).reshape(-1, BEGIN)

    def log_p(self, residues: np.ndarray) -> np.ndarray:
        """log p of each of LETTERS at each residue, given the true ones before it, [L, 25] float64.

        Args:
            residues: ids of one protein, [L] uint8.
        """
        before = np.full(self.order - 1, BEGIN, np.uint8)
        history = np.concatenate([before, residues[:-1] - np.uint8(FIRST_RESIDUE)])
        return self._log_p[_codes(history, self.order - 1)]


def smooth(table: np.ndarray, order: int) -> np.ndarray:
    """P(w | h) of every letter after every history, [26, ..., 26, 25] float64.

    Args:
        table: counts as in `NgramCounts`.
        order: letters of a history, and one.
    """
    p = np.full(BEGIN, 1 / BEGIN)
    for level in range(1, order + 1):
        counts = _counts(table, level, highest=level == order)
        once, twice = ((counts == times).sum() for times in (1, 2))
        discount = once / (once + 2 * twice) if once else FALLBACK
        total = counts.sum(-1, keepdims=True)
        left = discount * (counts > 0).sum(-1, keepdims=True)
        mixed = (np.maximum(counts - discount, 0) + left * p) / np.maximum(total, 1)
        p = np.where(total > 0, mixed, p)
    return p


def _counts(table: np.ndarray, level: int, *, highest: bool) -> np.ndarray:
    """c(h w) at one level of the formula, [26, ..., 26, 25] int64."""
    occurrences = _marginal(table, level)
    counts = occurrences.copy() if highest else (_marginal(table, level + 1) > 0).sum(0)
    if level > 1:
        counts[BEGIN] = occurrences[BEGIN]
    if level > 2:
        counts[BEGIN, BEGIN] = 0  # a history that reaches further back than the beginning
    return counts


def _marginal(table: np.ndarray, level: int) -> np.ndarray:
    """How often each run of `level` letters occurs."""
    return table.sum(tuple(range(MOST_ORDER - level)))
