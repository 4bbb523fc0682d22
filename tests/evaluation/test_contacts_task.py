import numpy as np
import pytest
from conftest import ROOT
from planted import Planted, measured, random_chains, write_chains

from raptide.errors import InputError
from raptide.evaluation.requests import Reading, Request
from raptide.evaluation.results import Heatmap, Lines
from raptide.evaluation.subjects.separation import PRIOR_PAIRS, Separation
from raptide.evaluation.tasks.contacts import Contacts, ContactsSettings
from raptide.inference.contact_fit import contact_map

TINY = ROOT / "jobs/benchmarks/tiny"
BANDS = {"near": (3, 6), "short": (6, 12), "medium": (12, 24), "long": (24, 10**6)}
CUTS = {"p@l": 1, "p@l/2": 2, "p@l/5": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files of training and test chains, and the coordinates of each sequence."""
    folder = tmp_path_factory.mktemp("chains")
    rows = {"train": random_chains(40), "test": random_chains(20)}
    paths = {name: write_chains(folder / f"{name}.parquet", rows[name]) for name in rows}
    places = {
        row["sequence"]: np.float32(row["cb_angstrom"]).reshape(-1, 3)
        for row in rows["train"] + rows["test"]
    }
    return rows, paths, places


def make(paths, **settings):
    return Contacts(ContactsSettings(**paths, **settings))


def scores_of(places, noise):
    """The true contacts with noise of a known strength, by sequence."""

    def contacts(request):
        truth = np.nan_to_num(contact_map(places[request.sequence]))
        drawn = np.random.default_rng(list(request.sequence.encode())).normal(size=truth.shape)
        return (truth + noise * (drawn + drawn.T) / 2**0.5).astype(np.float32)

    return contacts


def vectors_of(places, knowing=2, width=64):
    """Random Fourier features of coordinates: their products sum to a Gaussian of the distance."""
    frequencies = np.random.default_rng(1).normal(size=(3, width // 2)) / 4

    def residues(request):
        coordinates = np.nan_to_num(places[request.sequence])
        if request.reading.layer != knowing:
            return np.random.default_rng(3).normal(size=(len(coordinates), width)).astype("f")
        angles = coordinates @ frequencies
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    return residues


def slowly(rows, scores, band, taken):
    """Mean precision of `taken(L)` pairs, counted pair by pair from coordinates."""
    least, below = BANDS[band]
    found = []
    for row in rows:
        xyz = np.float32(row["cb_angstrom"]).reshape(-1, 3)
        length = len(xyz)
        known = ~np.isnan(xyz).any(axis=1)
        score = scores(Request(Reading("contacts"), row["sequence"]))
        pairs = sorted(
            (-float(score[i, j]), i, j)
            for i in range(length)
            for j in range(i + least, min(length, i + below))
            if known[i] and known[j]
        )
        hits = [np.linalg.norm(xyz[i] - xyz[j]) < 8 for _, i, j in pairs[: taken(length)]]
        if pairs:
            found.append(sum(hits) / taken(length))
    return np.mean(found)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_planted_subject_scores_what_it_knows(world, noise):
    rows, paths, places = world
    scores = scores_of(places, noise)
    outcome, values = measured(make(paths), Planted(contacts=scores))
    for band in BANDS:
        for cut, share in CUTS.items():
            expected = slowly(rows["test"], scores, band, lambda length, s=share: length // s)
            assert values[f"{cut}/{band}", "test"] == pytest.approx(expected, abs=1e-9)
        tenths = [
            slowly(rows["test"], scores, band, lambda length, k=k: k * length // 10)
            for k in range(1, 11)
        ]
        assert values[f"p@mean/{band}", "test"] == pytest.approx(np.mean(tenths), abs=1e-9)
    roles = {m.metric: m.role for m in outcome.measures}
    assert roles.pop("p@l/long") == "main"
    assert roles.pop("control/p@l/long") == "control"
    assert roles.pop("chance/p@l/long") == "chance"
    assert set(roles.values()) == {"more"}
    assert len(roles) == 15
    lines, *maps = outcome.figures
    assert isinstance(lines, Lines)
    assert lines.series["long"][-1] == pytest.approx(values["p@l/long", "test"])
    assert lines.series["near"][1] == pytest.approx(values["p@l/5/near", "test"])
    assert len(maps) == 3
    drawn = {f"Contacts of {row['id']}": row["sequence"] for row in rows["test"]}
    for each in maps:
        assert isinstance(each, Heatmap)
        sequence = drawn[each.title]
        assert np.array_equal(each.truth, contact_map(places[sequence]), equal_nan=True)
        assert np.array_equal(each.values, scores(Request(Reading("contacts"), sequence)))


def test_vectors_that_tell_distances_are_found_by_the_probe(world):
    _, paths, places = world
    outcome, values = measured(make(paths), Planted(residues=vectors_of(places)))
    chance = values["chance/probe-p@l/long", "test"]
    assert chance < 0.35
    assert values["probe-p@l/5/long", "test"] > chance + 0.25
    assert values["probe-p@l/long", "test"] > chance + 0.15
    assert {m.layer for m in outcome.measures} == {2}
    assert not any(metric.startswith("p@") for metric, _ in values)
    assert len(outcome.figures) == 4


def test_the_probes_layer_is_chosen_on_training_chains_alone(world):
    rows, paths, places = world
    tested = {row["sequence"] for row in rows["test"]}

    def residues(request):
        return vectors_of(places, 2 if request.sequence in tested else 1)(request)

    outcome, values = measured(make(paths), Planted(residues=residues))
    assert {m.layer for m in outcome.measures} == {1}
    assert abs(values["probe-p@l/long", "test"] - values["chance/probe-p@l/long", "test"]) < 0.1
    assert "Probe, p@l/long on the validation share, by layer: 1: 0." in outcome.notes[-1]


def test_controls_come_out_at_chance(world):
    _, paths, places = world
    subject = Planted(contacts=scores_of(places, 0), residues=vectors_of(places))
    outcome, values = measured(make(paths), subject)
    samples = {m.metric: m.sample for m in outcome.measures}
    for metric in ("p@l/long", "probe-p@l/long"):
        control, chance = samples[f"control/{metric}"], samples[f"chance/{metric}"]
        difference = (control.numerators - chance.numerators)[control.denominators > 0]
        assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5
        assert values[metric, "test"] > values[f"chance/{metric}", "test"] + 0.1
    assert values["chance/p@l/long", "test"] == values["chance/probe-p@l/long", "test"]


def test_the_same_readings_give_the_same_numbers(world):
    _, paths, places = world
    subject = Planted(residues=vectors_of(places))
    found = [measured(make(paths, layers=("last",)), subject)[0] for _ in range(2)]
    for one, other in zip(*(outcome.measures for outcome in found), strict=True):
        assert np.array_equal(one.sample.numerators, other.sample.numerators)


def test_requests_are_what_is_measured_on_and_no_more(world):
    rows, paths, places = world
    task = make(paths, most_train=20)
    subject = Planted(contacts=scores_of(places, 0), residues=vectors_of(places))
    asked = list(task.requests(subject))
    assert asked == list(task.requests(subject))
    assert len(asked) == 2 * (20 + 20) + 20
    scored = [request for request in asked if request.reading.kind == "contacts"]
    assert {request.reading for request in scored} == {Reading("contacts", method=task.fit_digest)}
    assert {request.sequence for request in scored} == {row["sequence"] for row in rows["test"]}
    measured(task, subject)  # which refuses what was not asked
    assert task.files() == (paths["train"], paths["test"])


def test_the_regression_is_fitted_on_short_chains_that_are_resolved(tmp_path):
    rows = random_chains(40)
    for row in rows[:10]:
        row["cb_angstrom"][: 3 * len(row["sequence"]) // 2] = [np.nan] * (
            3 * len(row["sequence"]) // 2
        )
    rows += random_chains(5, 410, 420)
    paths = {"train": write_chains(tmp_path / "a.parquet", rows), "test": tmp_path / "a.parquet"}
    task = make(paths)
    assert len(task.fit_on) == 20
    known = {row["sequence"]: row for row in rows[10:40]}
    for sequence, contacts in task.fit_on:
        xyz = np.float32(known[sequence]["cb_angstrom"]).reshape(-1, 3)
        assert np.array_equal(contacts, contact_map(xyz), equal_nan=True)
    turned = write_chains(tmp_path / "b.parquet", rows[::-1])
    again = make(paths | {"train": turned})
    assert again.fit_digest == task.fit_digest
    assert len(task.fit_digest) == 12
    assert make(paths, chains=5).fit_digest != task.fit_digest
    assert [s for s, _ in make(paths, chains=5).fit_on] == [s for s, _ in task.fit_on[:5]]


def test_long_chains_are_left_out_and_counted(world):
    rows, paths, places = world
    task = make(paths, most_residues=60)
    subject = Planted(contacts=scores_of(places, 0))
    outcome, values = measured(task, subject)
    short = [row for row in rows["test"] if len(row["sequence"]) <= 60]
    assert {m.sample.units for m in outcome.measures} == {len(short)}
    left = f"test: {20 - len(short)} of 20 chains have more than 60 residues and are left out."
    assert left in outcome.notes
    expected = slowly(short, scores_of(places, 0), "long", lambda length: length)
    assert values["p@l/long", "test"] == pytest.approx(expected, abs=1e-9)


def test_a_test_has_its_files_name_or_its_own(world):
    _, paths, places = world
    task = make(paths | {"test": {"mine": paths["test"], "known": paths["train"]}})
    outcome, values = measured(task, Planted(contacts=scores_of(places, 0)))
    assert {name for _, name in values} == {"mine", "known"}
    assert any("known: 40 of 40 sequences are among" in note for note in outcome.notes)


def test_files_with_nothing_to_learn_from_are_refused(tmp_path, world):
    _, paths, _ = world
    (row,) = random_chains(1)
    one = write_chains(tmp_path / "a.parquet", [row, row])
    unresolved = [
        each | {"cb_angstrom": [np.nan] * len(each["cb_angstrom"])} for each in random_chains(3)
    ]
    none = write_chains(tmp_path / "b.parquet", unresolved)
    for path in (one, none):
        with pytest.raises(InputError, match="needs two different sequences at least of 7"):
            make({"train": path, "test": paths["test"]})


def test_separations_are_counted(world):
    _, paths, places = world
    task = make(paths)
    (subject,) = task.baselines()
    sequences = [chain.sequence for chain in task.train]
    counts, touching = np.zeros(80), np.zeros(80)
    for sequence in sequences:
        contacts = contact_map(places[sequence])
        for i in range(len(sequence)):
            for j in range(i + 1, len(sequence)):
                if not np.isnan(contacts[i, j]):
                    counts[j - i] += 1
                    touching[j - i] += contacts[i, j]
    mean = touching.sum() / counts.sum()
    asked = [Request(Reading("contacts", method="any"), "A" * 90)]
    with subject.read(lambda: iter(asked)) as readings:
        found = readings.get(asked[0])
        with pytest.raises(KeyError):
            readings.get(Request(Reading("residues"), "A"))
    assert np.array_equal(found, found.T)
    expected = (touching + PRIOR_PAIRS * mean) / (counts + PRIOR_PAIRS)
    assert found[0, 1:80] == pytest.approx(expected[1:], rel=1e-5)
    assert found[0, 85] == pytest.approx(mean, rel=1e-5)
    other = Separation(contact_map(places[sequence]) for sequence in sequences[1:])
    assert subject.digest == make(paths).baselines()[0].digest != other.digest


def test_separation_tells_something_of_real_chains():
    train, test = (TINY / f"chains_{name}.parquet" for name in ("train", "test"))
    task = make({"train": train, "test": {"chains": test}})
    (separation,) = task.baselines()
    _, values = measured(task, separation)
    assert values["p@l/near", "chains"] > 0.35
    assert 0.02 < values["p@l/long", "chains"] < 0.15
    assert len(task.fit_on) == 20
