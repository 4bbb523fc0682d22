from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from draws import generator
from planted import STATES, Planted, measured, random_chains, write_chains
from pydantic import ValidationError

from raptide.alphabet import FIRST_RESIDUE, encode_residues
from raptide.errors import InputError
from raptide.evaluation.requests import Reading, Request
from raptide.evaluation.subjects.one_hot import OneHot
from raptide.evaluation.tasks.secondary_structure import (
    SecondaryStructure,
    SecondaryStructureSettings,
)

TINY = ROOT / "jobs/benchmarks/tiny"
THREE = dict(zip(STATES, "HHHEECCC", strict=True))
NOISE = 0.3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files of training and test chains, and of each sequence what a noisy subject takes it for."""
    folder = tmp_path_factory.mktemp("chains")
    rows = {"train": random_chains(80), "test": random_chains(40), "other": random_chains(10)}
    paths = {name: write_chains(folder / f"{name}.parquet", rows[name]) for name in rows}
    told = {}
    for row in rows["train"] + rows["test"] + rows["other"]:
        states = np.array(list(row["ss8"].replace("-", "C")))
        wrong = generator().random(len(states)) < NOISE
        told[row["sequence"]] = np.where(
            wrong, generator().choice(list(STATES), len(states)), states
        )
    return rows, paths, told


def make(paths, **settings):
    tests = {name: path for name, path in paths.items() if name != "train"}
    return SecondaryStructure(
        SecondaryStructureSettings(train=paths["train"], test=tests, **settings)
    )


def marks(states):
    """A vector for each residue that tells its state."""
    return np.eye(8, dtype=np.float32)[[STATES.index(state) for state in states]]


def noise(request):
    seed = list(request.sequence.encode())
    return np.random.default_rng(seed).normal(size=(len(seed), 8)).astype(np.float32)


def knows(told, layer=2):
    """A subject whose one layer tells states, with noise, and whose others tell nothing."""

    def residues(request):
        states = told[request.sequence]
        return marks(states) if request.reading.layer == layer else noise(request)

    return Planted(layers=2, residues=residues)


def shares(rows, told):
    """Q8 and Q3 by counting letters."""
    pairs = [
        (true, said)
        for row in rows
        for true, said in zip(row["ss8"], told[row["sequence"]], strict=True)
        if true != "-"
    ]
    eight = sum(true == said for true, said in pairs) / len(pairs)
    return eight, sum(THREE[true] == THREE[said] for true, said in pairs) / len(pairs)


def test_a_planted_subject_scores_what_it_knows(world):
    rows, paths, told = world
    task = make(paths)
    outcome, values = measured(task, knows(told))
    for name in ("test", "other"):
        q8, q3 = shares(rows[name], told)
        assert values["q8", name] == pytest.approx(q8, abs=1e-9)
        assert values["mlp-q8", name] == pytest.approx(q8, abs=1e-9)
        assert values["q3", name] == pytest.approx(q3, abs=1e-9)
        assert values["mlp-q3", name] == pytest.approx(q3, abs=1e-9)
        assert q8 < q3 < 1
    assert {measure.layer for measure in outcome.measures} == {2}
    roles = {(m.metric, m.role) for m in outcome.measures if m.dataset == "test"}
    assert roles == {
        *(("q8", "main"), ("q3", "more"), ("mlp-q8", "more"), ("mlp-q3", "more")),
        *(("control/q8", "control"), ("chance/q8", "chance")),
    }
    assert {m.sample.units for m in outcome.measures if m.dataset == "test"} == {40}
    assert all(m.higher_is_better for m in outcome.measures)


def test_shuffled_labels_teach_nothing(world):
    rows, paths, told = world
    _, values = measured(make(paths), knows(told))
    counted = "".join(row["ss8"] for row in rows["test"]).replace("-", "")
    assert values["chance/q8", "test"] == pytest.approx(counted.count("H") / len(counted))
    assert values["control/q8", "test"] <= values["chance/q8", "test"] + 0.02
    assert values["q8", "test"] > values["chance/q8", "test"] + 0.2


def test_shuffling_moves_all_labels_over_all_chains(world):
    _, paths, _ = world
    task = make(paths)
    shuffled = task._shuffled()
    places = [*task.learned, *task.valid]
    true = [task._classes(place) for place in places]
    drawn = [shuffled(place) for place in places]
    assert np.array_equal(
        np.bincount(np.concatenate(true) + 1), np.bincount(np.concatenate(drawn) + 1)
    )
    assert all(np.array_equal(a < 0, b < 0) for a, b in zip(true, drawn, strict=True))
    assert all(np.array_equal(shuffled(p), labels) for p, labels in zip(places, drawn, strict=True))
    kept = (np.concatenate(true) == np.concatenate(drawn)).mean()
    frequencies = np.bincount(np.concatenate(true) + 1) / sum(map(len, true))
    unmoved = frequencies[0] + ((frequencies[1:] / (1 - frequencies[0])) ** 2).sum()
    assert kept == pytest.approx(unmoved, abs=0.06)


def test_the_layer_is_chosen_on_training_chains_alone(world):
    rows, paths, told = world
    tested = {row["sequence"] for row in rows["test"]}

    def residues(request):
        """Layer 1 knows training chains, layer 2 test chains."""
        layer = 2 if request.sequence in tested else 1
        states = told[request.sequence]
        return marks(states) if request.reading.layer == layer else noise(request)

    outcome, values = measured(make(paths), Planted(layers=2, residues=residues))
    assert {measure.layer for measure in outcome.measures} == {1}
    assert values["q8", "test"] < 0.45
    assert outcome.notes[0].startswith("Q8 on the validation share, by layer: 1: 0.")


def test_the_same_readings_give_the_same_numbers(world):
    _, paths, told = world
    found = [measured(make(paths), knows(told))[0] for _ in range(2)]
    for one, other in zip(*(outcome.measures for outcome in found), strict=True):
        assert np.array_equal(one.sample.numerators, other.sample.numerators)


def test_requests_are_what_is_measured_on_and_no_more(world):
    rows, paths, told = world
    task = make(paths, most_train=20, layers=(-1, 0))
    subject = knows(told)
    asked = list(task.requests(subject))
    assert asked == list(task.requests(subject))
    assert {request.reading for request in asked} == {
        Reading("residues", 0),
        Reading("residues", 2),
    }
    known = {row["sequence"] for row in rows["train"]}
    assert len({request.sequence for request in asked} & known) == 20
    assert len(asked) == 2 * (20 + 40 + 10)
    measured(task, subject)  # which refuses what was not asked
    assert task.files() == (paths["train"], paths["test"], paths["other"])


def test_layers_that_a_subject_lacks_are_refused(world):
    _, paths, told = world
    with pytest.raises(InputError, match=r"planted has the layers 0 \(its embedding\) to 2, but"):
        list(make(paths, layers=(3,)).requests(knows(told)))


def test_what_does_not_count_and_what_was_learned_from_is_said(world, tmp_path):
    rows, paths, told = world
    mixed = write_chains(tmp_path / "mixed.parquet", rows["other"] + rows["train"][:3])
    task = make({"train": paths["train"], "mixed": mixed})
    notes = " ".join(measured(task, knows(told))[0].notes)
    assert "mixed: 3 of 13 sequences are among those learned from" in notes
    unknown = sum(row["ss8"].count("-") for row in rows["other"] + rows["train"][:3])
    assert f"mixed: {unknown:,} residues without a state do not count." in notes
    assert "Learned from 72 chains; 8 for validation" in notes


def test_one_sequence_is_too_little(tmp_path):
    (row,) = random_chains(1)
    path = write_chains(tmp_path / "a.parquet", [row, row])
    with pytest.raises(InputError, match="needs two different sequences at least"):
        make({"train": path, "test": path})
    with pytest.raises(ValidationError):
        SecondaryStructureSettings(train=path, test={})


def test_a_window_of_letters_is_one_hot():
    (features,) = ask_one_hot(["MKXB"])
    assert features.dtype == np.float32
    assert features.shape == (4, 15 * 21)
    windows = features.reshape(4, 15, 21)
    assert (windows.sum(-1) == 1).all()
    letters = windows.argmax(-1)
    m, k = (encode_residues(letter)[0] - FIRST_RESIDUE for letter in "MK")
    assert letters[0].tolist() == [20] * 7 + [m, k, 20, 20] + [20] * 4
    assert letters[3].tolist() == [20] * 4 + [m, k, 20, 20] + [20] * 7


def ask_one_hot(sequences):
    requests = [Request(Reading("residues", 0), sequence) for sequence in sequences]
    with OneHot().read(lambda: iter(requests)) as readings:
        return [readings.get(request) for request in requests]


def test_letters_alone_tell_more_of_real_chains_than_the_commonest_state():
    train, test = (Path(TINY / f"chains_{name}.parquet") for name in ("train", "test"))
    task = make({"train": train, "test": test}, most_train=60)
    (one_hot,) = task.baselines()
    outcome, values = measured(task, one_hot)
    assert values["q8", "test"] > values["chance/q8", "test"] + 0.03
    assert values["control/q8", "test"] <= values["chance/q8", "test"] + 0.02
    assert {m.sample.units for m in outcome.measures} == {40}
