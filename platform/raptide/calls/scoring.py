"""From tables of log probabilities to scores: the arithmetic behind every scoring method.

Shape letters: L residues, V tokens of the alphabet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from raptide.alphabet import FIRST_RESIDUE, RESIDUES, STANDARD
from raptide.calls.variants import Substitution


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits to log probabilities over the last axis, fp32."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def log_likelihood(table_LV: np.ndarray, residues: np.ndarray) -> float:
    """Sum of each residue's own log probability, nats."""
    return float(table_LV[np.arange(len(residues)), residues].sum(dtype=np.float64))


def score_changes(
    changes: Sequence[Sequence[Substitution]], rows: Mapping[int, np.ndarray]
) -> np.ndarray:
    """log p(mutant) - log p(wild type), added up over each variant's positions, [n] float64.

    Args:
        rows: log probabilities [V] at every position that changes (Meier et al., NeurIPS 2021).
    """
    scores = [
        sum(float(rows[s.position][s.mutant] - rows[s.position][s.wild_type]) for s in change)
        for change in changes
    ]
    return np.array(scores, np.float64)


def score_mutants(means: Sequence[float], residues: int) -> np.ndarray:
    """How much likelier each mutant is than the wild type, in nats, [n] float64.

    Args:
        means: mean log likelihoods of a protein of so many residues and of its n mutants.
    """
    totals = np.array(means, np.float64) * residues
    return totals[1:] - totals[0]


def score_substitutions(table_LV: np.ndarray, residues: np.ndarray) -> np.ndarray:
    """The same for every single substitution, [L, 20] fp32; columns as `alphabet.STANDARD`."""
    columns = [FIRST_RESIDUE + RESIDUES.index(letter) for letter in STANDARD]
    return table_LV[:, columns] - np.take_along_axis(table_LV, residues[:, None].astype(int), 1)
