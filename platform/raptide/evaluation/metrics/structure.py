"""Secondary structure and contacts, as the field counts them.

Precision of contacts follows examples/contact_prediction.ipynb of facebookresearch/esm: of a
sequence of L residues, the share of true contacts among the k likeliest pairs of a band of
separations, with k = ⌊L/10⌋, ⌊2L/10⌋, …, L. Pairs with an unresolved end are left out. Where a band
has fewer than k pairs, those that lack count as misses (the notebook pads with zeros); where it has
none, there is no precision.

Letters of shapes: L residues.
"""

from __future__ import annotations

import numpy as np

STATES = "HGIEBTSC"
"""The eight states of DSSP by class; C is coil."""

UNCOUNTED = "-"
"""What stands for a residue whose state is not known."""

THREE_STATES = np.array([0, 0, 0, 1, 1, 2, 2, 2])
"""Helix, strand or the rest, by each of `STATES`: H, G, I are helix, E and B strand."""

BANDS: dict[str, tuple[int, int]] = {
    "near": (3, 6),
    "short": (6, 12),
    "medium": (12, 24),
    "long": (24, 1 << 30),
}
"""Separations j - i: from the first on, below the second."""

CUTS = 10
"""Tenths of L at which precision is taken."""


def state_classes(ss8: str) -> np.ndarray:
    """States as classes, [L] int64: places in `STATES`, -1 for what does not count."""
    return np.array([STATES.find(state) for state in ss8], np.int64)


def three_state_scores(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities of eight states [L, 8] to those of helix, strand and the rest, [L, 3]."""
    sums = [probabilities[:, state == THREE_STATES].sum(-1) for state in range(3)]
    return np.stack(sums, axis=-1)


def band_pairs(contacts: np.ndarray, band: str) -> tuple[np.ndarray, np.ndarray]:
    """The pairs i < j of a band whose distance is known, row by row; each [pairs] int64.

    Args:
        contacts: [L, L]: 1 yes, 0 no, NaN unknown.
    """
    least, below = BANDS[band]
    i, j = np.triu_indices(len(contacts), least)
    inside = (j - i < below) & ~np.isnan(contacts[i, j])
    return i[inside], j[inside]


def precision_curve(scores: np.ndarray, touching: np.ndarray, length: int) -> np.ndarray:
    """Precision at L/10, 2L/10, …, L, [CUTS] float64; NaN if there is no pair.

    Args:
        scores: of a band's pairs, [pairs]; the higher, the likelier they touch. Equal ones rank as
            they come.
        touching: whether they do, [pairs]: 1 or 0.
        length: L.
    """
    if not len(scores):
        return np.full(CUTS, np.nan)
    sizes = np.maximum(np.arange(1, CUTS + 1) * length // CUTS, 1)
    hits = np.zeros(sizes[-1])
    ranked = touching[_likeliest(scores, min(len(scores), len(hits)))]
    hits[: len(ranked)] = ranked
    return np.cumsum(hits)[sizes - 1] / sizes


def summary(curve: np.ndarray) -> dict[str, float]:
    """The numbers of a `precision_curve` that are reported."""
    return {
        "p@l": float(curve[-1]),
        "p@l/2": float(curve[CUTS // 2 - 1]),
        "p@l/5": float(curve[CUTS // 5 - 1]),
        "p@mean": float(curve.mean()),
    }


def chance_precision(touching: np.ndarray, length: int) -> float:
    """Expected precision at L of scores that know nothing; NaN if there is no pair."""
    if not len(touching):
        return float("nan")
    return float(touching.mean() * min(1.0, len(touching) / length))


def _likeliest(scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` highest scores, in order; of equal ones the first."""
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    found = np.flatnonzero(scores >= threshold)
    return found[np.argsort(-scores[found], kind="stable")][:count]
