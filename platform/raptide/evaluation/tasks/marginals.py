"""Scores of an assay's variants off a subject's marginals: what tasks of variants share.

A substitution scores log p(mutant) - log p(wild type) at its position, a variant the sum over its
substitutions (Meier et al., NeurIPS 2021). Of a target longer than `window` residues, a window at a
time is asked for, as ProteinGym does whatever the model could take:

wt-marginals       windows from both ends, half a window apart, and one in the middle where they
                   barely meet; where they overlap, an average that leaves out their ends
masked-marginals   for each position the window that has it in the middle

Each window is a sequence of its own, with its own first and last token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from raptide.calls.windows import window_around
from raptide.evaluation.datasets.assays import Assay
from raptide.evaluation.requests import Reading, Readings, Request
from raptide.methods import ScanMethod


class Piece(NamedTuple):
    """A request, and what becomes of it."""

    request: Request
    rows: np.ndarray
    """Of the assay's positions, by index, those that it is asked at, [P]."""
    weights: np.ndarray
    """Of this window in the average there, [P] float64."""


def cut_pieces(assay: Assay, method: ScanMethod, window: int) -> Iterator[Piece]:
    """All that is asked to score an assay."""
    positions = assay.positions
    length = len(assay.target)
    if length <= window:
        windows = [(0, np.ones(length))]
    elif method == "wt-marginals":
        windows = overlapping_windows(length, window)
    else:
        for row, position in enumerate(positions):
            start = window_around(int(position), length, window)
            request = _ask(assay, method, start, window, positions[row : row + 1])
            yield Piece(request, np.array([row]), np.ones(1))
        return
    for start, weights in windows:
        inside = (start <= positions) & (positions < start + len(weights))
        if inside.any():
            there = positions[inside]
            request = _ask(assay, method, start, len(weights), there)
            yield Piece(request, np.flatnonzero(inside), weights[there - start])


def _ask(assay: Assay, method: str, start: int, size: int, positions: np.ndarray) -> Request:
    places = tuple(int(position) - start for position in positions)
    reading = Reading("marginals", method=method)
    return Request(reading, assay.target[start : start + size], places)


def score_assay(assay: Assay, method: ScanMethod, window: int, readings: Readings) -> np.ndarray:
    """Of all its variants, [n] float64."""
    positions = assay.positions
    total = np.zeros((len(positions), 20))
    weight = np.zeros((len(positions), 1))
    for piece in cut_pieces(assay, method, window):
        shares = piece.weights[:, None]
        total[piece.rows] += shares * readings.get(piece.request)
        weight[piece.rows] += shares
    table = total / weight
    variant, position, wild_type, mutant = assay.changes
    rows = np.searchsorted(positions, position)
    odds = table[rows, mutant] - table[rows, wild_type]
    return np.bincount(variant, odds, minlength=len(assay.mutants))


def overlapping_windows(length: int, size: int) -> list[tuple[int, np.ndarray]]:
    """Starts of windows of `size` residues, and the weights of what is read in them, [size].

    They start where those of ProteinGym's compute_fitness.py do, whose windows are of tokens, two
    more; at other sizes than 1,022 all is in proportion. A window that is reached from both ends
    counts twice, there as here.
    """
    step = size // 2
    starts, left, right = [], 0, length - size
    while True:
        starts += [left, right]
        if left + size + 1 > right:
            break
        left, right = left + step, right - step
    if left + size + 2 - right < step:
        starts.append(length // 2 - step)
    weights = _weights(size)
    return [(start, weights) for start in starts]


def _weights(size: int) -> np.ndarray:
    """1 in the middle; a logistic curve rises over the first quarter and falls over the last."""
    ramp = -(-size // 4)
    weights = np.ones(size)
    rising = 1 / (1 + np.exp(-(np.arange(1, ramp + 1) - ramp / 2) / (ramp / 16)))
    weights[:ramp] = rising
    falling = 1 / (1 + np.exp((np.arange(-ramp, 1) + ramp / 2) / (ramp / 16)))
    weights[-len(falling) :] = falling
    return weights
