"""How vectors lie in space: groups that keep apart, and a plane to look at them."""

from __future__ import annotations

import numpy as np


def cosine_distances(vectors: np.ndarray) -> np.ndarray:
    """1 less the cosine of each pair of vectors [n, D], [n, n] float64; a vector of zeros is at 1
    from all others."""
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    units = np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths != 0)
    distances = 1 - np.clip(units @ units.T, -1, 1)
    np.fill_diagonal(distances, 0)
    return distances


def silhouettes(distances: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Silhouette of each point (Rousseeuw, 1987): (b - a) / max(a, b), [n] float64.

    a is its mean distance to the rest of its group, b that to the nearest other group. From -1 to
    1; above 0 it is nearer to its own. A point alone in its group has 0.

    Args:
        distances: [n, n] float64, 0 on the diagonal.
        groups: the group of each point, [n] int64 from 0 on, of which none is empty and there are
            at least two.
    """
    rows = np.arange(len(groups))
    sizes = np.bincount(groups)
    sums = distances @ np.eye(len(sizes))[groups]
    own = sums[rows, groups] / np.maximum(sizes[groups] - 1, 1)
    means = sums / sizes
    means[rows, groups] = np.inf
    other = means.min(axis=1)
    greater = np.maximum(own, other)
    values = np.divide(other - own, greater, out=np.zeros_like(own), where=greater != 0)
    return np.where(sizes[groups] == 1, 0.0, values)


def shuffled_silhouettes(
    distances: np.ndarray, groups: np.ndarray, shuffles: int, seed: int
) -> np.ndarray:
    """Mean silhouette where groups are shuffled over points, for each shuffle, [shuffles] float64.

    Below 0 on average: a group of points at random is no nearer than another, and b is that to the
    nearest of several.
    """
    generator = np.random.Philox(key=[seed, len(groups)])
    orders = (np.argsort(generator.random_raw(len(groups)), kind="stable") for _ in range(shuffles))
    return np.array([silhouettes(distances, groups[order]).mean() for order in orders])


def plane(vectors: np.ndarray) -> np.ndarray:
    """The first two principal components of vectors [n, D], [n, 2] fp32.

    Each points to where its greatest value is positive, so that a picture is never mirrored.
    """
    wide = vectors.astype(np.float64)
    left, strengths, _ = np.linalg.svd(wide - wide.mean(axis=0), full_matrices=False)
    points = np.zeros((len(vectors), 2))
    shown = min(2, len(strengths))
    points[:, :shown] = left[:, :shown] * strengths[:shown]
    greatest = points[np.abs(points).argmax(axis=0), [0, 1]]
    return (points * np.where(greatest < 0, -1, 1)).astype(np.float32)
