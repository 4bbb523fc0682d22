"""The space task: silhouettes against scikit-learn, planted classes, pictures."""

from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_samples
from sklearn.metrics.pairwise import cosine_distances as sklearn_distances

from raptide.alphabet import STANDARD
from raptide.errors import InputError
from raptide.evaluation.compare import judge_control
from raptide.evaluation.metrics.space import (
    cosine_distances,
    plane,
    shuffled_silhouettes,
    silhouettes,
)
from raptide.evaluation.tasks.space import CLASSES, SIZES, Space, SpaceSettings


class Planted:
    """Vectors of letters, and of proteins by sequence."""

    name, digest, baseline, layers = "planted", "00", False, 3

    def __init__(self, letters, proteins=None):
        self.kinds = frozenset({"letters", "mean"} if proteins else {"letters"})
        self._letters, self._proteins = letters, proteins

    @contextmanager
    def read(self, ask):
        asked = set(ask())

        class Found:
            def get(_, request):
                if request not in asked:
                    raise KeyError(request)
                if request.reading.kind == "letters":
                    return self._letters
                assert request.reading.layer == self.layers
                return self._proteins[request.sequence]

        yield Found()


def outcome_of(task, subject):
    with subject.read(lambda: task.requests(subject)) as readings:
        return task.measure(subject, readings)


def class_vectors(noise, width=12, seed=1):
    """Letters around their class's direction, [20, width] fp32."""
    generator = np.random.default_rng(seed)
    found = generator.normal(0, noise, (20, width))
    for direction, letters in enumerate(CLASSES.values()):
        for letter in letters:
            found[STANDARD.index(letter), direction] += 1
    return found.astype(np.float32)


@pytest.mark.parametrize("number", [20, 75])
def test_silhouettes_are_those_of_scikit_learn(number):
    generator = np.random.default_rng(number)
    vectors = generator.normal(size=(number, 5))
    groups = np.concatenate([[5], np.arange(5), generator.integers(0, 5, number - 6)])
    distances = cosine_distances(vectors)
    np.testing.assert_allclose(distances, sklearn_distances(vectors), atol=1e-9)
    np.testing.assert_allclose(
        silhouettes(distances, groups),
        silhouette_samples(vectors, groups, metric="cosine"),
        atol=1e-9,
    )
    assert silhouettes(distances, groups)[0] == 0  # alone


def test_vectors_of_zeros_keep_nothing_apart():
    distances = cosine_distances(np.zeros((6, 3)))
    assert (silhouettes(distances, np.array([0, 0, 1, 1, 2, 2])) == 0).all()


def test_the_plane_is_that_of_the_principal_components():
    vectors = np.random.default_rng(2).normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1]
    ours, theirs = plane(vectors), PCA(2).fit_transform(vectors)
    signs = np.sign((ours * theirs).sum(axis=0))
    np.testing.assert_allclose(ours, theirs * signs, atol=1e-5)
    np.testing.assert_array_equal(ours, plane(vectors.copy()))
    assert (ours[np.abs(ours).argmax(axis=0), [0, 1]] > 0).all()
    assert plane(np.arange(4.0)[:, None]).shape == (4, 2)


def test_every_letter_has_one_class_and_one_size_by_its_mass():
    for classes in (CLASSES, SIZES):
        assert sorted("".join(classes.values())) == list(STANDARD)
    # Atoms of C, H, N, O and S of the free amino acids.
    atoms = {
        "A": (3, 7, 1, 2, 0), "C": (3, 7, 1, 2, 1), "D": (4, 7, 1, 4, 0), "E": (5, 9, 1, 4, 0),
        "F": (9, 11, 1, 2, 0), "G": (2, 5, 1, 2, 0), "H": (6, 9, 3, 2, 0), "I": (6, 13, 1, 2, 0),
        "K": (6, 14, 2, 2, 0), "L": (6, 13, 1, 2, 0), "M": (5, 11, 1, 2, 1), "N": (4, 8, 2, 3, 0),
        "P": (5, 9, 1, 2, 0), "Q": (5, 10, 2, 3, 0), "R": (6, 14, 4, 2, 0), "S": (3, 7, 1, 3, 0),
        "T": (4, 9, 1, 3, 0), "V": (5, 11, 1, 2, 0), "W": (11, 12, 2, 2, 0), "Y": (9, 11, 1, 3, 0),
    }  # fmt: skip
    masses = {
        letter: np.dot(number, [12.011, 1.008, 14.007, 15.999, 32.06])
        for letter, number in atoms.items()
    }
    below, middle, above = ({masses[x] for x in letters} for letters in SIZES.values())
    assert max(below) < 120 < min(middle) < max(middle) < 150 < min(above)


def test_planted_classes_keep_apart_and_nothing_else_does():
    apart = outcome_of(Space(SpaceSettings()), Planted(class_vectors(0.1)))
    found = {m.metric: m for m in apart.measures}
    assert found["letters-silhouette"].role == "main"
    assert found["letters-silhouette"].sample.units == 20
    assert found["letters-silhouette"].sample.value() > 0.75
    assert found["letters-silhouette/shuffled-as-well"].sample.value() == pytest.approx(1 / 1001)
    control, chance = (found[f"{role}/letters-silhouette"].sample for role in ("control", "chance"))
    assert control.value() < 0 == chance.value()
    assert judge_control(control, chance, higher_is_better=True) == ""

    mixed = outcome_of(Space(SpaceSettings()), Planted(class_vectors(50.0)))
    found = {m.metric: m.sample.value() for m in mixed.measures}
    assert found["letters-silhouette"] < 0.05
    assert found["letters-silhouette/shuffled-as-well"] > 0.01


def test_without_noise_the_silhouette_is_one():
    found = outcome_of(Space(SpaceSettings()), Planted(class_vectors(0.0))).measures[0]
    assert found.sample.value() == pytest.approx(1, abs=1e-6)


def test_shares_of_shuffles_are_even_where_there_are_no_classes():
    """What a share under no effect must be: as often below 0.2 as it says."""
    groups = np.repeat(np.arange(5), 4)
    below = 0
    for seed in range(60):
        distances = cosine_distances(np.random.default_rng(seed).normal(size=(20, 6)))
        shuffled = shuffled_silhouettes(distances, groups, 60, seed)
        below += (1 + (shuffled >= silhouettes(distances, groups).mean()).sum()) / 61 <= 0.2
    assert 3 <= below <= 24


def test_letters_are_drawn_by_class_and_by_size():
    by_class, by_size = outcome_of(Space(SpaceSettings()), Planted(class_vectors(0.1))).figures
    assert by_class.labels == by_size.labels == list(STANDARD)
    assert by_class.groups[STANDARD.index("W")] == "aromatic"
    assert by_size.groups[STANDARD.index("W")] == "above 150 Da"
    assert by_class.xy.shape == (20, 2)
    assert by_class.xy.dtype == np.float32


@pytest.fixture
def folds_file(tmp_path):
    """Ten folds, the n-th with 3 n domains; 130 in another."""
    generator = np.random.default_rng(5)
    classes = [f"a.{f}.{i % 2}.1" for f in range(1, 11) for i in range(3 * f)] + ["c.1.1.1"] * 130
    sequences = ["".join(generator.choice(list(STANDARD), 20)) for _ in classes]
    names = [f"d{i}" for i in range(len(classes))]
    path = tmp_path / "folds.parquet"
    pq.write_table(pa.table({"id": names, "scop_class": classes, "sequence": sequences}), path)
    return path, dict(zip(sequences, classes, strict=True))


def test_proteins_of_the_largest_folds_are_compared(folds_file):
    path, classes = folds_file
    generator = np.random.default_rng(6)
    centres = {
        f: generator.normal(size=16) for f in {c.rsplit(".", 2)[0] for c in classes.values()}
    }
    proteins = {
        s: (centres[c.rsplit(".", 2)[0]] + generator.normal(0, 0.2, 16)).astype(np.float32)
        for s, c in classes.items()
    }
    task = Space(SpaceSettings(domains=path))
    outcome = outcome_of(task, Planted(class_vectors(0.1), proteins))
    found = {m.metric: m for m in outcome.measures}
    measure = found["proteins-silhouette"]
    # The folds of 12 to 30, of which there are seven, and 100 of the one of 130.
    assert measure.sample.units == sum(3 * f for f in range(4, 11)) + 100
    assert (measure.dataset, measure.layer) == ("folds", 3)
    assert measure.sample.value() > 0.6
    control, chance = (
        found[f"{role}/proteins-silhouette"].sample for role in ("control", "chance")
    )
    assert judge_control(control, chance, higher_is_better=True) == ""
    picture = outcome.figures[-1]
    assert set(picture.groups) == {"c.1", *(f"a.{f}" for f in range(4, 11))}
    assert len(picture.xy) == measure.sample.units
    assert task.files() == [path]


def test_a_subject_without_means_has_its_letters_alone(folds_file):
    outcome = outcome_of(Space(SpaceSettings(domains=folds_file[0])), Planted(class_vectors(0.1)))
    assert not any("proteins" in m.metric for m in outcome.measures)


def test_a_diverged_model_gives_no_numbers_and_no_pictures():
    outcome = outcome_of(Space(SpaceSettings()), Planted(np.full((20, 4), np.nan, np.float32)))
    found = {m.metric: m.sample.value() for m in outcome.measures}
    assert np.isnan(found["letters-silhouette"])
    assert found["letters-silhouette/shuffled-as-well"] == 1
    assert not outcome.figures


def test_groups_that_are_not_there_are_refused(tmp_path):
    path = tmp_path / "cath.parquet"
    columns = {"id": ["a", "b"], "cath": ["1.2.3.4", "1.2.4.4"], "sequence": ["MK", "MKT"]}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(InputError, match="CATH names no family"):
        Space(SpaceSettings(domains=path, group_by="family"))
    with pytest.raises(InputError, match="two members each are needed"):
        Space(SpaceSettings(domains=path))
