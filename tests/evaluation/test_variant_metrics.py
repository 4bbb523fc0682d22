"""ProteinGym's metrics against other libraries, second formulas and slow loops."""

import time

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import matthews_corrcoef, roc_auc_score

from raptide.evaluation.metrics.variants import (
    METRICS,
    Grouped,
    Scan,
    Scans,
    group,
    spearman,
    standard_errors,
)
from raptide.evaluation.ridge import PENALTIES, fit_ridge
from raptide.evaluation.samples import of_arrays, to_arrays


def draw_scan(n, seed, levels=None):
    """What was measured, scores, fit, unit; with `levels`, both hold many equal values."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    scores = truth * 0.5 + rng.normal(size=n)
    if levels:
        truth, scores = np.round(truth * levels) / levels, np.round(scores * levels) / levels
    unit = np.unique(np.sort(rng.integers(0, max(2, n // 8), n)), return_inverse=True)[1]
    return truth, scores, truth > rng.normal(), unit


def draw_counts(units, draws, seed=0):
    return np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), draws)


def ndcg_by_hand(truth, scores):
    """Walking down the list, a variant at a time."""
    n = len(truth)
    top = int(n * (10 / 100))
    if top == 0:
        return 0.0
    gains = (truth - truth.min()) / (truth.max() - truth.min())
    listed = sorted(range(n), key=lambda i: (-scores[i], i))
    found = sum(gains[i] / np.log2(place + 2) for place, i in enumerate(listed[:top]))
    best = sum(g / np.log2(place + 2) for place, g in enumerate(sorted(gains)[::-1][:top]))
    return found / best


def top10_by_hand(truth, scores):
    fittest = truth > np.percentile(truth, 90)
    called = scores > np.percentile(scores, 90)
    return (fittest & called).sum() / fittest.sum()


def mcc_by_library(fit, scores):
    return matthews_corrcoef(fit, scores >= np.median(scores))


INDEPENDENT = {
    "spearman": lambda truth, scores, fit: stats.spearmanr(truth, scores)[0],
    "ndcg": lambda truth, scores, fit: ndcg_by_hand(truth, scores),
    "top10": lambda truth, scores, fit: top10_by_hand(truth, scores),
    "auc": lambda truth, scores, fit: roc_auc_score(fit, scores),
    "mcc": lambda truth, scores, fit: mcc_by_library(fit, scores),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("n", [7, 20, 101, 1000])
def test_metrics_are_those_of_independent_code(metric, levels, n):
    checked = 0
    for seed in range(10):
        truth, scores, fit, _ = draw_scan(n, seed, levels)
        if fit.all() or not fit.any() or not (truth > np.percentile(truth, 90)).any():
            continue
        found = Scan(metric, truth, scores, fit, np.arange(n)).value()
        assert found == pytest.approx(INDEPENDENT[metric](truth, scores, fit), abs=1e-9)
        checked += 1
    assert checked >= 3


def test_auc_is_the_chance_that_a_fit_variant_scores_higher():
    _, scores, fit, _ = draw_scan(200, 3, 2)
    pairs = scores[fit][:, None] - scores[~fit]
    expected = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    found = Scan("auc", scores, scores, fit, np.arange(200)).value()
    assert found == pytest.approx(expected, abs=1e-12)


def test_mcc_is_a_correlation():
    _, scores, fit, _ = draw_scan(200, 4, 2)
    called = scores >= np.median(scores)
    found = Scan("mcc", scores, scores, fit, np.arange(200)).value()
    assert found == pytest.approx(np.corrcoef(called, fit)[0, 1], abs=1e-12)


def test_spearman_of_gaussians_is_known_in_closed_form():
    rng = np.random.default_rng(0)
    for rho in (-0.7, 0.2, 0.9):
        x, y = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], 50_000).T
        assert spearman(x, y) == pytest.approx(6 / np.pi * np.arcsin(rho / 2), abs=0.015)


def test_what_cannot_be_ordered_is_no_number():
    truth = np.arange(20.0)
    constant, fit = np.ones(20), np.ones(20, bool)
    unit = np.arange(20)
    assert np.isnan(Scan("spearman", truth, constant, fit, unit).value())
    assert np.isnan(Scan("auc", truth, truth, fit, unit).value())
    assert Scan("mcc", truth, truth, fit, unit).value() == 0  # as scikit-learn
    assert np.isnan(Scan("top10", constant, truth, fit, unit).value())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("levels", [None, 2])
def test_replicates_are_the_metric_of_what_was_drawn(metric, levels):
    truth, scores, fit, unit = draw_scan(150, 1, levels)
    scan = Scan(metric, truth, scores, fit, unit)
    counts = draw_counts(scan.units, 40)
    found = scan.replicates(counts)
    assert found.shape == (40,)
    for row, value in zip(counts, found, strict=True):
        drawn = np.repeat(np.arange(150), row[unit])
        expected = INDEPENDENT[metric](truth[drawn], scores[drawn], fit[drawn])
        assert value == pytest.approx(expected, abs=1e-9)


def test_replicates_do_not_depend_on_how_many_are_held_at_once(monkeypatch):
    truth, scores, fit, unit = draw_scan(150, 1)
    counts = draw_counts(unit.max() + 1, 40)
    scan = Scan("ndcg", truth, scores, fit, unit)
    whole = scan.replicates(counts)
    monkeypatch.setattr("raptide.evaluation.metrics.variants.CELLS", 450)
    assert np.array_equal(scan.replicates(counts), whole)


def test_bootstraps_of_a_scan_are_fast():
    truth, scores, fit, unit = draw_scan(3000, 0)
    counts = draw_counts(unit.max() + 1, 200)
    begun = time.process_time()
    for metric in METRICS:
        assert np.isfinite(Scan(metric, truth, scores, fit, unit).replicates(counts)).all()
    assert time.process_time() - begun < 2


def test_scans_are_the_mean_over_assays():
    a, b = draw_scan(60, 5), draw_scan(90, 6)
    alone = [Scan("spearman", *each) for each in (a, b)]
    start = alone[0].units
    both = Scans(
        np.concatenate([a[0], b[0]]),
        np.concatenate([a[1], b[1]]),
        np.concatenate([a[3], b[3] + start]),
        np.array([60, 150]),
    )
    assert both.units == alone[0].units + alone[1].units
    assert both.value() == pytest.approx(np.mean([each.value() for each in alone]), abs=1e-12)
    counts = draw_counts(both.units, 9)
    parts = [alone[0].replicates(counts[:, :start]), alone[1].replicates(counts[:, start:])]
    assert both.replicates(counts) == pytest.approx(np.mean(parts, 0), abs=1e-12)


PROTEINS = ["P1", "P1", "P2", "P3", "P1", "P4"]
TYPES = ["Activity", "Activity", "Activity", "Binding", "Binding", "Stability"]


def test_the_grouped_mean_is_proteingyms():
    values = [0.12345, 0.2, 0.4, 0.6, 0.1, np.nan]
    found = group(values, PROTEINS, TYPES)
    activity = ((0.123 + 0.2) / 2 + 0.4) / 2  # three decimals before anything else
    binding = (0.6 + 0.1) / 2
    assert found.value() == pytest.approx((activity + binding) / 2, abs=1e-12)
    assert found.units == 6


def test_the_grouped_mean_of_draws():
    rng = np.random.default_rng(0)
    sample = group(rng.uniform(size=6), PROTEINS, TYPES)
    counts = draw_counts(6, 50)
    for row, found in zip(counts, sample.replicates(counts), strict=True):
        groups = {}
        for index in np.repeat(np.arange(6), row):
            groups.setdefault((TYPES[index], PROTEINS[index]), []).append(sample.values[index])
        types = {}
        for (kind, _), values in groups.items():
            types.setdefault(kind, []).append(np.mean(values))
        expected = np.mean([np.mean(each) for each in types.values()])
        assert found == pytest.approx(expected, abs=1e-12)


def test_standard_errors_are_those_of_a_slow_bootstrap():
    rng = np.random.default_rng(1)
    best = rng.uniform(0.4, 0.6, 12)
    worse = best - rng.uniform(0, 0.2, 12)
    proteins = [f"P{i // 2}" for i in range(12)]
    types = [["Activity", "Binding"][i // 6] for i in range(12)]
    samples = [group(each, proteins, types) for each in (worse, best)]
    found = standard_errors(samples)
    assert found[1] == 0
    means = (np.round(worse, 3) - np.round(best, 3)).reshape(2, 3, 2).mean(2)
    drawn = [np.mean([rng.choice(row, 3).mean() for row in means]) for _ in range(4000)]
    assert found[0] == pytest.approx(np.std(drawn, ddof=1), rel=0.06)
    exact = np.sqrt((means.var(1) / 3).sum()) / 2
    assert found[0] == pytest.approx(exact, rel=0.03)


def test_samples_are_kept_and_come_back():
    truth, scores, fit, unit = draw_scan(50, 0)
    grouped = group([0.1, 0.2], ["a", "b"], ["x", "y"])
    scan = Scan("auc", truth, scores, fit, unit)
    for sample in (scan, grouped, Scans(truth, scores, unit, np.array([50]))):
        again = of_arrays(to_arrays(sample))
        assert type(again) is type(sample)
        assert again.value() == sample.value()
    assert isinstance(grouped, Grouped)


@pytest.mark.parametrize("shape", [(60, 8), (30, 90)])
def test_ridge_is_scikit_learns(shape):
    rng = np.random.default_rng(0)
    n, width = shape
    x, new = rng.normal(size=shape), rng.normal(size=(7, width))
    y = x[:, :3].sum(1) + rng.normal(size=n) + 5
    fit = fit_ridge(x, np.stack([y, y[::-1]], 1), new)
    centred = x - x.mean(0)
    penalties = PENALTIES * (centred**2).sum() / n
    for column, targets in enumerate([y, y[::-1]]):
        chosen = RidgeCV(penalties, store_cv_results=True).fit(x, targets)
        assert fit.predictions[:, column] == pytest.approx(chosen.predict(new), abs=1e-9)
        assert fit.errors[column] == pytest.approx(-chosen.best_score_, rel=1e-9)
        left_out = []
        for i in range(n):
            others = np.arange(n) != i
            alone = Ridge(chosen.alpha_).fit(x[others], targets[others])
            left_out.append((alone.predict(x[i : i + 1])[0] - targets[i]) ** 2)
        assert fit.errors[column] == pytest.approx(np.mean(left_out), rel=1e-9)


def test_a_free_feature_has_no_penalty():
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(40, 100)), rng.normal(size=(40, 1))
    new, new_z = rng.normal(size=(5, 100)), rng.normal(size=(5, 1))
    y = 10 * z[:, 0] + rng.normal(size=40)
    fit = fit_ridge(x, y[:, None], new, (z, new_z))
    # The same with the feature among the others, so large that its weight costs nothing.
    lone = np.hstack([np.ones((40, 1)), z])
    rest = x - lone @ np.linalg.lstsq(lone, x, rcond=None)[0]
    errors = []
    for penalty in PENALTIES * (rest**2).sum() / 40:
        ridge = Ridge(penalty).fit(np.hstack([x, 1e5 * z]), y)
        expected = ridge.predict(np.hstack([new, 1e5 * new_z]))
        errors.append(abs(expected - fit.predictions[:, 0]).max())
    assert min(errors) < 1e-5
