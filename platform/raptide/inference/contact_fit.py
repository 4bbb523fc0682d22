"""Fit a contact head to attention maps: the paper's unsupervised contacts.

An L1-penalised logistic regression finds the few heads whose attention marks contacts (Rao et al.,
ICLR 2021: 20 proteins, penalty 0.15, pairs at least 6 apart).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from raptide.errors import InputError
from raptide.inference.engine import Engine
from raptide.model.contacts import ContactHead

MIN_SEPARATION = 6
"""Residues between the partners of a pair that is learned from; nearer ones always touch."""

LONG_RANGE = 24
"""Least separation of a long-range contact, as the paper counts them."""

CONTACT_ANGSTROM = 8.0


def contact_map(cb_angstrom: np.ndarray) -> np.ndarray:
    """Which residues touch, [L, L] fp32: 1 yes, 0 no, NaN where a coordinate is missing.

    Args:
        cb_angstrom: Cβ coordinates (Cα for glycine), [L, 3], NaN where unknown.
    """
    difference = cb_angstrom[:, None] - cb_angstrom[None]
    distance = np.sqrt((difference.astype(np.float64) ** 2).sum(-1))
    return np.where(np.isnan(distance), np.nan, distance < CONTACT_ANGSTROM).astype(np.float32)


def fit_contacts(
    engine: Engine, examples: Iterable[tuple[str, np.ndarray]], penalty: float = 0.15
) -> ContactHead:
    """Fit the regression on a few proteins of known structure.

    Memory: 4 bytes for every pair of residues and head, doubled while fitting.

    Args:
        examples: sequences with their `contact_map` [L, L].
        penalty: weight of the L1 norm; larger keeps fewer heads.

    Raises:
        InputError: a map does not fit its sequence, or there is nothing to tell apart, or the
            model's attention maps are no numbers.
        SequenceError: as in `Engine.contacts`.
    """
    from sklearn.linear_model import LogisticRegression

    tables, answers = [], []
    for index, (sequence, contacts) in enumerate(examples):
        features, answer = _pairs(engine, sequence, contacts, index)
        tables.append(features)
        answers.append(answer)
    if not tables or len(np.unique(np.concatenate(answers))) < 2:
        raise InputError(
            f"A contact head needs proteins with and without contacts {MIN_SEPARATION} or more "
            f"residues apart, but the {len(tables)} given have only one kind."
        )
    if not all(np.isfinite(table).all() for table in tables):
        raise InputError(
            "Attention maps of the model are NaN or infinite, as those of weights are that have "
            "diverged, so no contact head can be fitted; name an earlier checkpoint."
        )
    # fp64 in place of sklearn's own copy; liblinear with these settings is the published recipe.
    model = LogisticRegression(l1_ratio=1.0, C=1 / penalty, solver="liblinear")
    model.fit(np.concatenate(tables), np.concatenate(answers))
    weight, bias = (torch.from_numpy(x.astype(np.float32)) for x in (model.coef_, model.intercept_))
    return ContactHead(weight, bias)


def long_range_precision(probabilities: np.ndarray, contacts: np.ndarray) -> float:
    """Share of true contacts among the L likeliest pairs at least 24 apart; NaN if there are none.

    Args:
        probabilities: [L, L].
        contacts: `contact_map`, [L, L]; pairs of unknown distance are left out.
    """
    i, j = np.triu_indices(len(contacts), LONG_RANGE)
    known = ~np.isnan(contacts[i, j])
    ranked = np.argsort(-probabilities[i, j][known], kind="stable")[: len(contacts)]
    return float(contacts[i, j][known][ranked].mean()) if len(ranked) else float("nan")


def _pairs(
    engine: Engine, sequence: str, contacts: np.ndarray, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features [pairs, layers * heads] and answers [pairs] of one protein."""
    maps = engine.corrected_maps(sequence)
    rows = []
    for maps_HLL in maps:
        length = maps_HLL.shape[1]
        if contacts.shape != (length, length):
            raise InputError(
                f"Example {index}: a contact map of {length} by {length} residues is needed, but "
                f"it has shape {contacts.shape}."
            )
        i, j = np.triu_indices(length, MIN_SEPARATION)
        known = ~np.isnan(contacts[i, j])
        i, j = i[known], j[known]
        rows.append(maps_HLL[:, i, j].T)
    return np.concatenate(rows, axis=1), contacts[i, j]
