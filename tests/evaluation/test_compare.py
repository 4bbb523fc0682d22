"""Intervals, differences, the noise floor and controls, against scipy and closed forms."""

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from raptide.errors import InputError
from raptide.evaluation.compare import (
    difference,
    draws,
    interval,
    judge_control,
    noise_floor,
)
from raptide.evaluation.samples import Ratio, mean_of


def test_an_interval_of_a_mean_is_that_of_scipy_and_of_the_closed_form():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = interval(mean_of(values), replicates=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", random_state=2
    ).confidence_interval
    error = values.std() / np.sqrt(len(values))
    # The 2.5% quantile of 20,000 replicates is known to 0.03 standard errors, each.
    assert [low, high] == pytest.approx([theirs.low, theirs.high], abs=0.1 * error)
    assert [low, high] == pytest.approx(values.mean() + np.array([-1, 1]) * 1.96 * error, abs=0.1)


def test_an_interval_of_a_ratio_is_that_of_scipy():
    generator = np.random.default_rng(3)
    weights = generator.integers(1, 60, 150).astype(float)
    losses = weights * generator.gamma(9, 0.3, 150)
    low, high = interval(Ratio(losses, weights, exp=True), replicates=20_000)
    theirs = stats.bootstrap(
        (losses, weights),
        lambda a, b, axis: np.exp(a.sum(axis) / b.sum(axis)),
        n_resamples=20_000,
        method="percentile",
        paired=True,
        vectorized=True,
        random_state=4,
    )
    between = theirs.confidence_interval
    assert [low, high] == pytest.approx(
        [between.low, between.high], abs=0.1 * theirs.standard_error
    )


def test_draws_are_even_over_units_and_the_same_however_many_are_held(monkeypatch):
    whole = np.concatenate(list(draws(7, 3000)))
    assert whole.shape == (3000, 7)
    assert (whole.sum(axis=1) == 7).all()
    assert stats.chisquare(whole.sum(axis=0)).pvalue > 1e-3
    # A unit's count is binomial: variance 7 · 1/7 · 6/7.
    assert whole.var(axis=0) == pytest.approx(6 / 7, rel=0.15)
    monkeypatch.setattr("raptide.evaluation.compare.CHUNK", 50)
    parts = list(draws(7, 3000))
    assert max(map(len, parts)) == 7
    assert (np.concatenate(parts) == whole).all()


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(5)
    samples = generator.exponential(1.0, (400, 80))
    covered = 0
    for values in samples:
        low, high = interval(mean_of(values), replicates=400)
        covered += low <= 1.0 <= high
    # 95% less what a skewed distribution and 80 units cost a percentile interval.
    assert 0.91 <= covered / len(samples) <= 0.975


def test_memory_is_bounded_whatever_the_units():
    sample = mean_of(np.random.default_rng(6).random(400_000))
    tracemalloc.start()
    low, high = interval(sample, replicates=30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert low < sample.value() < high
    assert peak < 80e6  # all 30 replicates at once take 96 MB for the counts alone


def test_of_one_unit_or_none_nothing_is_known():
    assert np.isnan(interval(mean_of([3.0]))).all()
    assert np.isnan(interval(mean_of([]))).all()
    for values in ([], [1.0]):
        found = difference(mean_of(values), mean_of(np.array(values) - 1), True)
        assert found.verdict == "no measured difference"
        assert np.isnan(found.low)


def test_replicates_that_are_no_number_are_left_out():
    few = Ratio(np.array([1.0, 0, 0, 0]), np.array([1.0, 0, 0, 0]))
    assert interval(few) == (1.0, 1.0)
    assert np.isnan(interval(Ratio(np.zeros(4), np.zeros(4)))).all()


def test_what_units_have_in_common_cancels_out_of_a_difference():
    generator = np.random.default_rng(7)
    hard = generator.normal(0, 5, 300)
    better, worse = mean_of(hard + 0.2), mean_of(hard + generator.normal(0, 0.3, 300))
    found = difference(better, worse, higher_is_better=True)
    assert found.paired
    assert found.verdict == "better"
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(better.value() - worse.value())
    gaps = better.numerators - worse.numerators
    assert found.high - found.low == pytest.approx(2 * 1.96 * gaps.std() / 300**0.5, rel=0.1)
    assert difference(worse, better, True).verdict == "worse"
    assert difference(better, worse, False).verdict == "worse"
    assert difference(worse, better, False).verdict == "better"
    assert difference(better, better, True).verdict == "no measured difference"


def test_samples_of_other_units_are_drawn_apart_and_that_is_said():
    generator = np.random.default_rng(8)
    hard = generator.normal(0, 5, 300)
    found = difference(mean_of(hard + 0.2), mean_of(hard[:-1]), higher_is_better=True)
    assert not found.paired
    assert found.verdict == "no measured difference"
    assert found.high - found.low == pytest.approx(
        2 * 1.96 * hard.std() * (2 / 300) ** 0.5, rel=0.1
    )


def test_differences_of_equal_models_are_found_rarely():
    generator = np.random.default_rng(9)
    pairs = generator.normal(0, 1, (300, 2, 60))
    verdicts = [difference(mean_of(a), mean_of(b), True, 400).verdict for a, b in pairs]
    assert sum(verdict != "no measured difference" for verdict in verdicts) <= 0.1 * len(pairs)


@pytest.mark.parametrize(("runs", "c4"), [(2, 0.797885), (3, 0.886227), (4, 0.921318)])
def test_the_noise_floor_of_few_runs_is_not_too_small(runs, c4):
    values = list(np.random.default_rng(runs).normal(2.2, 0.001, runs))
    found = noise_floor(values)
    assert found.spread == pytest.approx(max(values) - min(values))
    assert found.deviation == pytest.approx(np.std(values, ddof=1) / c4, rel=1e-5)
    assert found.threshold == 2 * found.deviation
    assert found.cautious > found.threshold
    assert f"{runs} runs" in found.sentence()


def test_the_noise_floor_is_unbiased_and_the_cautious_one_holds():
    generator = np.random.default_rng(10)
    floors = [noise_floor(list(values)) for values in generator.normal(0, 1, (1500, 3))]
    assert np.mean([floor.deviation for floor in floors]) == pytest.approx(1, abs=0.05)
    others = np.abs(generator.normal(0, 2**0.5, 1500))
    exceeded = np.mean(others > [floor.cautious for floor in floors])
    assert exceeded == pytest.approx(0.05, abs=0.02)


def test_the_noise_floor_needs_two_runs():
    with pytest.raises(InputError, match=r"at least two runs .* but 1 was given"):
        noise_floor([2.0])


def test_a_control_at_chance_or_below_is_well_and_another_is_named():
    generator = np.random.default_rng(11)
    shuffles = generator.normal(0.1, 0.02, 100)
    chance = mean_of([0.1])
    assert judge_control(mean_of(shuffles), chance, higher_is_better=True) == ""
    assert judge_control(mean_of(shuffles - 0.05), chance, higher_is_better=True) == ""
    sentence = judge_control(mean_of(shuffles + 0.05), chance, higher_is_better=True)
    assert "did not come out at chance: 0.15" in sentence
    assert "chance gives 0.1 " in sentence
    assert judge_control(mean_of(shuffles + 0.05), chance, higher_is_better=False) == ""
    assert judge_control(mean_of(shuffles - 0.05), chance, higher_is_better=False)


def test_controls_at_chance_are_hardly_ever_named():
    generator = np.random.default_rng(12)
    chance = mean_of([0.0])
    named = [judge_control(mean_of(v), chance, True) for v in generator.normal(0, 1, (150, 50))]
    assert sum(map(bool, named)) <= 3
