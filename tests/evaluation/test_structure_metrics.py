import numpy as np
import pytest
import torch
from draws import generator

from raptide.evaluation.metrics.structure import (
    BANDS,
    STATES,
    THREE_STATES,
    band_pairs,
    chance_precision,
    precision_curve,
    state_classes,
    summary,
    three_state_scores,
)


def random_case(length, unresolved=0.1, dense=0.3):
    rng = generator()
    scores = rng.random((length, length))
    contacts = (rng.random((length, length)) < dense).astype(np.float32)
    contacts = np.triu(contacts, 1) + np.triu(contacts, 1).T
    missing = rng.random(length) < unresolved
    contacts[missing] = contacts[:, missing] = np.nan
    return scores + scores.T, contacts


def curve_of(scores, contacts, band):
    i, j = band_pairs(contacts, band)
    return precision_curve(scores[i, j], contacts[i, j], len(contacts))


def slow_precision(scores, contacts, band, taken):
    """By sorting a list of pairs."""
    least, below = {"near": (3, 6), "short": (6, 12), "medium": (12, 24), "long": (24, 10**9)}[band]
    length = len(contacts)
    pairs = [
        (-scores[i, j], i, j)
        for i in range(length)
        for j in range(length)
        if least <= j - i < below and contacts[i, j] in (0, 1)
    ]
    if not pairs:
        return float("nan")
    return sum(float(contacts[i, j]) for _, i, j in sorted(pairs)[:taken]) / taken


@pytest.mark.parametrize("length", [10, 23, 25, 29, 47, 71])
@pytest.mark.parametrize("band", BANDS)
def test_precisions_are_those_of_sorted_pairs(length, band):
    scores, contacts = random_case(length)
    found = summary(curve_of(scores, contacts, band))
    slow = [slow_precision(scores, contacts, band, k * length // 10) for k in range(1, 11)]
    expected = {"p@l": slow[9], "p@l/2": slow[4], "p@l/5": slow[1], "p@mean": np.mean(slow)}
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert np.isnan(found["p@l"]) == (not len(band_pairs(contacts, band)[0]))


def notebook_precisions(scores, contacts, least, below):
    """As fair-esm's notebook has it: cumulated over all pairs, gathered at fp32 tenths of L."""
    length = len(contacts)
    targets = torch.from_numpy(np.nan_to_num(contacts, nan=-1)).double()
    separation = torch.arange(length)[None] - torch.arange(length)[:, None]
    counts = (separation >= least) & (separation < below) & (targets >= 0)
    likely = torch.from_numpy(scores).masked_fill(~counts, -torch.inf)
    i, j = torch.triu_indices(length, length, least)
    order = likely[i, j].argsort(descending=True)[:length]
    hits = torch.nn.functional.pad(targets[i, j][order], (0, length - len(order)))
    tenths = (torch.arange(0.1, 1.1, 0.1) * length).long()
    return (hits.cumsum(0)[tenths - 1] / tenths).numpy()


@pytest.mark.parametrize("length", [60, 100, 137, 211])
def test_precisions_are_those_of_the_notebook(length):
    scores, contacts = random_case(length)
    for band, (least, below) in BANDS.items():
        i, _ = band_pairs(contacts, band)
        if len(i) >= length:  # where they lack, the notebook counts what it has masked
            ours = curve_of(scores, contacts, band)
            theirs = notebook_precisions(scores, contacts, least, below)
            assert np.abs(ours - theirs).max() < 1e-9


def test_tenths_of_every_length_are_the_notebooks():
    for length in range(10, 1100):
        theirs = (torch.arange(0.1, 1.1, 0.1) * length).long().numpy()
        assert np.array_equal(theirs, np.arange(1, 11) * length // 10), length


def test_pairs_that_a_band_lacks_are_misses():
    contacts = np.ones((26, 26), np.float32)  # 3 pairs are 24 or more apart
    assert curve_of(contacts, contacts, "long")[-1] == pytest.approx(3 / 26)
    i, j = band_pairs(contacts, "long")
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 24), (0, 25), (1, 25)]
    assert chance_precision(contacts[i, j], 26) == pytest.approx(3 / 26)
    assert np.isnan(chance_precision(np.zeros(0), 20))


def test_equal_scores_rank_as_pairs_come():
    _, contacts = random_case(60)
    i, j = band_pairs(contacts, "medium")
    curve = precision_curve(np.zeros(len(i)), contacts[i, j], 60)
    assert curve[-1] == pytest.approx(contacts[i, j][:60].mean())


def test_scores_that_know_nothing_are_as_precise_as_contacts_are_dense():
    _, contacts = random_case(80, dense=0.2)
    i, j = band_pairs(contacts, "long")
    drawn = [
        precision_curve(generator().random(len(i)), contacts[i, j], 80)[-1] for _ in range(2000)
    ]
    expected = chance_precision(contacts[i, j], 80)
    assert np.mean(drawn) == pytest.approx(expected, abs=5 * np.std(drawn) / 2000**0.5)


def test_eight_states_make_three():
    classes = state_classes("HGIEBTSC-")
    assert classes.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1]
    three = {state: "HEC"[THREE_STATES[STATES.index(state)]] for state in STATES}
    assert three == dict(zip("HGIEBTSC", "HHHEECCC", strict=True))
    scores = three_state_scores(np.array([[0.2, 0.1, 0.1, 0.3, 0.0, 0.1, 0.1, 0.1]]))
    assert scores == pytest.approx(np.array([[0.4, 0.3, 0.3]]))
