"""Ridge regression in closed form, its penalty chosen by leaving out one example at a time.

Nothing is iterated: of one decomposition come the fits of many targets at all penalties, and each
example's error when it is left out (Golub, Heath and Wahba, 1979). Shape letters: n examples, D
features, m targets, k examples to predict, r the rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PENALTIES = np.logspace(-4, 4, 17)
"""Times the mean eigenvalue: what is tried."""


class Fit(NamedTuple):
    """What ridge regression says of examples that it has not seen."""

    predictions: np.ndarray
    """[k, m] float64."""
    errors: np.ndarray
    """Mean squared error of the examples when each is left out, at the best penalty, [m]."""


def fit_ridge(
    train: np.ndarray,
    targets: np.ndarray,
    test: np.ndarray,
    free: tuple[np.ndarray, np.ndarray] | None = None,
    own: float = 0.0,
) -> Fit:
    """Fit all targets, each with the penalty whose left-out error is least, and predict.

    Args:
        train: [n, D].
        targets: [n, m].
        test: [k, D].
        free: features without a penalty, of the examples [n, f] and of those to predict [k, f];
            the intercept is always one.
        own: squared length of what each example has besides, that no other one has.
    """
    x, y, new = (np.asarray(each, np.float64) for each in (train, targets, test))
    lone, lone_new = (_with_intercept(each, free, i) for i, each in enumerate((x, new)))
    basis, _ = np.linalg.qr(lone)
    x_rest, y_rest = x - basis @ (basis.T @ x), y - basis @ (basis.T @ y)
    new_rest = new - lone_new @ np.linalg.lstsq(lone, x, rcond=None)[0]
    left, sizes, projected = _decompose(x_rest, new_rest)
    along = left.T @ y_rest
    squares = sizes[:, None] ** 2 + own
    spread = (sizes**2).sum() + own * (len(x) - basis.shape[1])
    penalties = PENALTIES * max(spread / len(x), np.finfo(float).tiny)
    # A fit keeps `rest` of what lies in any direction, and `more` of what lies along features.
    rest = own / (own + penalties)
    more = squares / (squares + penalties) - rest
    hats = rest + (basis**2).sum(1)[:, None] * (1 - rest) + left**2 @ more
    errors = np.empty((len(penalties), y.shape[1]))
    for index in range(len(penalties)):
        fitted = left @ (more[:, index, None] * along) + rest[index] * y_rest
        share = np.maximum(1 - hats[:, index, None], np.finfo(float).eps)
        errors[index] = (((y_rest - fitted) / share) ** 2).mean(0)
    best = errors.argmin(0)
    slopes = sizes[:, None] / (squares + penalties[best]) * along
    predictions = lone_new @ np.linalg.lstsq(lone, y, rcond=None)[0] + projected @ slopes
    return Fit(predictions, errors[best, np.arange(y.shape[1])])


def _with_intercept(
    features: np.ndarray, free: tuple[np.ndarray, np.ndarray] | None, which: int
) -> np.ndarray:
    ones = np.ones((len(features), 1))
    return np.hstack([ones, free[which]]) if free else ones


def _decompose(x: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left singular vectors [n, r], singular values [r], and `new` along the right ones [k, r]."""
    tall = len(x) >= x.shape[1]
    squares, vectors = np.linalg.eigh(x.T @ x if tall else x @ x.T)
    there = squares > squares.max(initial=0) * max(x.shape) * np.finfo(float).eps
    sizes, vectors = np.sqrt(squares[there]), vectors[:, there]
    if tall:
        return x @ vectors / sizes, sizes, new @ vectors
    return vectors, sizes, (new @ x.T) @ (vectors / sizes)
