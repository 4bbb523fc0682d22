"""Regression on scans, of subjects whose embeddings hold what is planted."""

import numpy as np
import pytest
import scans

from raptide.errors import InputError
from raptide.evaluation.metrics.variants import spearman
from raptide.evaluation.ridge import fit_ridge
from raptide.evaluation.subjects.letters import OneHotLetters
from raptide.evaluation.tasks.shuffles import order_by_hash
from raptide.evaluation.tasks.variants_supervised import (
    VariantsSupervised,
    VariantsSupervisedSettings,
    one_hot,
)


def make_task(pattern, **settings):
    kind = "variants-supervised"
    return VariantsSupervised(
        VariantsSupervisedSettings(kind=kind, assays=str(pattern), **settings)
    )


@pytest.fixture
def planted(tmp_path):
    """A scan of 40 positions, and what gives embeddings: one number tells, the others do not."""
    target = scans.make_target(40)
    mutants = scans.all_singles(target)
    values = np.random.default_rng(0).normal(size=len(mutants))
    scans.write_parquet(tmp_path / "scan.parquet", target, mutants, values)
    truth = {scans.mutate(target, m): v for m, v in zip(mutants, values, strict=True)}

    def tell(rho, width=4):
        def answer(request):
            rng = np.random.default_rng(list(request.sequence.encode()))
            told = rho * truth[request.sequence] + np.sqrt(1 - rho**2) * rng.normal()
            vector = np.append(rng.normal(size=width), told)
            return vector if request.reading.kind == "mean" else vector[None]

        return answer

    return tmp_path / "scan.parquet", tell


def test_what_embeddings_tell_is_found_on_the_rest(planted):
    path, tell = planted
    subject = scans.Planted({"mean": tell(0.8), "sites": tell(0.2)})
    outcome, values = scans.measure(make_task(path), subject)
    expected = 6 / np.pi * np.arcsin(0.8 / 2)
    assert values["spearman", "scan"] == pytest.approx(expected, abs=0.05)
    assert values["spearman/10%", "scan"] == pytest.approx(expected, abs=0.06)
    assert 0.1 < values["spearman/1%", "scan"] < expected
    assert values["mean-spearman", "scan"] == values["spearman", "scan"]  # chosen unseen
    assert values["sites-spearman", "scan"] == pytest.approx(0.19, abs=0.08)
    assert values["spearman", "all"] == values["spearman", "scan"]
    roles = {each.metric: each.role for each in outcome.measures if each.dataset == "all"}
    assert roles["spearman"] == "main"
    assert [m for m, role in roles.items() if role == "main"] == ["spearman"]
    assert {each.layer for each in outcome.measures if each.role != "chance"} == {4}


def test_sites_are_taken_where_they_tell_more(planted):
    path, tell = planted
    _, values = scans.measure(
        make_task(path), scans.Planted({"mean": tell(0.1), "sites": tell(0.9)})
    )
    assert values["spearman", "scan"] == values["sites-spearman", "scan"] > 0.8


def test_the_control_is_at_chance_though_embeddings_tell_all(planted):
    path, tell = planted
    outcome, values = scans.measure(make_task(path), scans.Planted({"mean": tell(1.0)}))
    assert values["spearman", "all"] > 0.99
    (control,) = [each.sample for each in outcome.measures if each.role == "control"]
    units = control.units
    assert units == 5 * 8
    counts = np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), 500)
    low, high = np.percentile(control.replicates(counts), [2.5, 97.5])
    assert low < 0 < high
    assert values["chance/spearman", "all"] == 0


def test_embeddings_are_asked_at_one_layer_and_at_the_changed_places(planted):
    path, tell = planted
    subject = scans.Planted({"mean": tell(0.5), "sites": tell(0.5)}, layers=6)
    scans.measure(make_task(path, layer=2, splits=1), subject)
    kinds = [each.reading.kind for each in subject.asked.values()]
    assert kinds.count("mean") == kinds.count("sites") == 40 * 19
    assert {each.reading.layer for each in subject.asked.values()} == {2}
    (target,) = {each.target for each in make_task(path).assays}
    for request in subject.asked.values():
        if request.reading.kind == "sites":
            (place,) = request.places
            assert request.sequence[place] != target[place]
    with pytest.raises(InputError, match="layers 0 to 6"):
        scans.measure(make_task(path, layer=7), subject)


def test_one_hot_finds_what_positions_and_letters_add_up_to(tmp_path):
    rng = np.random.default_rng(0)
    target = scans.make_target(16)
    by_place = rng.normal(size=16)
    mutants = scans.all_singles(target)
    values = [by_place[int(m[1:-1]) - 1] + 0.1 * rng.normal() for m in mutants]
    scans.write_parquet(tmp_path / "a.parquet", target, mutants, values)
    task = make_task(tmp_path / "a.parquet", splits=1)
    (baseline,) = task.baselines()
    assert baseline.name == "one-hot"
    _, values = scans.measure(task, baseline)
    assert values["spearman", "a"] > 0.95
    assert values["spearman/10%", "a"] > 0.5
    assert not [metric for metric, _ in values if metric.startswith(("augmented", "mean"))]


@pytest.mark.parametrize("more", [[], ["pair"]])
def test_letters_are_those_of_whole_sequences(tmp_path, more):
    """As far apart as one-hot sequences are, and so ridge regression on them is the same."""
    target = scans.make_target(8)
    mutants = scans.all_singles(target)
    mutants += [f"{mutants[0]}:{mutants[-1]}" for _ in more]
    scans.write_parquet(tmp_path / "a.parquet", target, mutants, np.arange(len(mutants)))
    (assay,) = make_task(tmp_path / "a.parquet").assays
    table, own = one_hot(assay)
    assert own == (0 if more else 1)
    letters = np.array([[*scans.mutate(target, m)] for m in assay.mutants])
    plain = (letters[:, :, None] == np.array([*"ACDEFGHIKLMNPQRSTVWY"])).reshape(len(letters), -1)
    distances = (plain[:, None] ^ plain).sum(-1)
    others = ~np.eye(len(letters), dtype=bool)
    assert np.array_equal(distances, ((table[:, None] - table) ** 2).sum(-1) + 2 * own * others)
    learned, rest = np.arange(len(letters)) % 3 > 0, np.arange(len(letters)) % 3 == 0
    rng = np.random.default_rng(0)
    targets, score = rng.normal(size=(learned.sum(), 3)), rng.normal(size=(len(letters), 1))
    free = (score[learned], score[rest])
    one = fit_ridge(plain[learned], targets, plain[rest], free)
    two = fit_ridge(table[learned], targets, table[rest], free, own)
    assert two.errors == pytest.approx(one.errors, rel=1e-9)
    assert two.predictions == pytest.approx(one.predictions, abs=1e-9)


def test_a_score_beside_letters_brings_what_letters_cannot(tmp_path):
    rng = np.random.default_rng(0)
    target = scans.make_target(16)
    mutants = scans.all_singles(target)
    table = rng.normal(size=(16, 20))
    values = [
        table[int(m[1:-1]) - 1, "ACDEFGHIKLMNPQRSTVWY".index(m[-1])] + 0.5 * rng.normal()
        for m in mutants
    ]
    table[np.arange(16), ["ACDEFGHIKLMNPQRSTVWY".index(letter) for letter in target]] = 0
    scans.write_parquet(tmp_path / "a.parquet", target, mutants, values)
    task = make_task(tmp_path / "a.parquet", splits=1)
    subject = scans.Planted(
        {
            "mean": lambda request: np.zeros(3),
            "marginals": lambda request: table[list(request.places)],
        }
    )
    _, values = scans.measure(task, subject)
    _, letters = scans.measure(task, OneHotLetters())
    best = 6 / np.pi * np.arcsin(1 / np.sqrt(1.25) / 2)
    assert abs(letters["spearman", "a"]) < 0.25
    for end in ("", "/10%"):
        assert values[f"augmented-spearman{end}", "a"] == pytest.approx(best, abs=0.12)
    assert values["spearman", "a"] == 0  # constant embeddings say nothing


def test_splits_are_pinned_and_apart(planted):
    path, tell = planted
    task = make_task(path, splits=1)
    (assay,) = task.assays
    order = order_by_hash(assay.name, assay.mutants, "split 0")
    learned, rest = order[: round(0.8 * len(order))], order[round(0.8 * len(order)) :]
    subject = scans.Planted({"mean": tell(0.6)})
    _, values = scans.measure(task, subject)
    told = np.array([subject.answers["mean"](r) for r in task.requests(subject)])
    x, y = told[learned], assay.scores[learned]
    slopes = np.linalg.lstsq(np.column_stack([np.ones(len(x)), x]), y, rcond=None)[0]
    by_hand = spearman(assay.scores[rest], told[rest] @ slopes[1:])
    assert values["spearman", "scan"] == pytest.approx(by_hand, abs=0.01)


def test_large_assays_are_bounded_and_small_ones_left_out(planted, tmp_path):
    path, tell = planted
    scans.write_parquet(tmp_path / "small.parquet", "MKTAYIAKQR", ["K2A", "K2R"], [1, 2])
    task = make_task(tmp_path / "*.parquet", most_variants=100, splits=1)
    (assay,) = task.assays
    assert len(assay.mutants) == 100
    whole = make_task(path).assays[0].mutants
    assert assay.mutants == [each for each in whole if each in set(assay.mutants)]
    outcome, _ = scans.measure(task, scans.Planted({"mean": tell(0.5)}))
    assert "1 assays have fewer than 20 variants and are left out: small." in outcome.notes
    with pytest.raises(InputError, match="none of"):
        make_task(tmp_path / "small.parquet")


def test_long_proteins_are_cut_to_where_the_variants_are(tmp_path):
    target = scans.make_target(300)
    mutants = [m for m in scans.all_singles(target) if 200 < int(m[1:-1]) <= 205]
    scans.write_parquet(tmp_path / "a.parquet", target, mutants, np.arange(len(mutants)))
    task = make_task(tmp_path / "a.parquet", window=50, splits=1)
    subject = scans.Planted({"mean": lambda r: np.ones(2), "sites": lambda r: np.ones((1, 2))})
    scans.measure(task, subject)
    for request in subject.asked.values():
        assert len(request.sequence) == 50
        if request.places:
            (place,) = request.places
            assert 200 <= 177 + place < 205
            assert request.sequence[:place] == target[177 : 177 + place]
