"""The homology task with a planted subject, and its baselines."""

from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from raptide.config import parse_settings
from raptide.errors import ConfigError, InputError
from raptide.evaluation.compare import interval, judge_control
from raptide.evaluation.datasets.domains import read_domains
from raptide.evaluation.requests import Reading, Request
from raptide.evaluation.subjects import phmmer
from raptide.evaluation.subjects.kmers import Kmers, count_kmers
from raptide.evaluation.subjects.phmmer import Phmmer
from raptide.evaluation.tasks.homology import Homology, HomologySettings

TINY = ROOT / "jobs/benchmarks/tiny/domains.parquet"
LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def random_sequence(generator, length=40):
    return "".join(generator.choice(list(LETTERS), length))


class Planted:
    """Vectors that a test gives, by layer and sequence."""

    name, digest, baseline, kinds = "planted", "00", False, frozenset({"mean"})

    def __init__(self, layers, vector):
        self.layers = layers
        self._vector = vector

    @contextmanager
    def read(self, ask):
        asked = set(ask())

        class Found:
            def get(_, request):
                if request not in asked:
                    raise KeyError(request)
                return self._vector(request.reading.layer, request.sequence)

        yield Found()


def outcome_of(task, subject):
    with subject.read(lambda: task.requests(subject)) as readings:
        return task.measure(subject, readings)


def values_of(outcome, layer=None):
    rows = [m for m in outcome.measures if layer is None or m.layer == layer]
    assert len({(m.metric, m.layer) for m in rows}) == len(rows)
    return {m.metric: m.sample.value() for m in rows}


def write_domains(path, classes, column="scop_class"):
    generator = np.random.default_rng(1)
    sequences = [random_sequence(generator) for _ in classes]
    names = [f"d{i}" for i in range(len(classes))]
    pq.write_table(pa.table({"id": names, column: classes, "sequence": sequences}), path)
    return dict(zip(sequences, classes, strict=True))


@pytest.fixture
def planted_file(tmp_path):
    """20 folds of five superfamilies of six domains, each a family; one fold is a propeller."""
    classes = [f"a.{f}.{s}.{i}" for f in range(1, 20) for s in range(5) for i in range(6)]
    classes += [f"b.68.{s}.{i}" for s in range(5) for i in range(6)]
    path = tmp_path / "planted.parquet"
    return path, write_domains(path, classes)


def noisy(classes, share, layers=4):
    """Vectors in the direction of their fold, of `share` of the domains; the others lie alone.

    In layers below the last all lie alone.
    """
    generator = np.random.default_rng(2)
    folds = sorted({label.rsplit(".", 2)[0] for label in classes.values()})
    alone = {sequence: generator.random() >= share for sequence in classes}
    places = {sequence: i for i, sequence in enumerate(classes)}

    def vector(layer, sequence):
        found = np.zeros(len(folds) + len(classes), np.float32)
        lost = alone[sequence] or layer < layers
        fold = folds.index(classes[sequence].rsplit(".", 2)[0])
        found[len(folds) + places[sequence] if lost else fold] = 3.0
        return found

    return Planted(layers, vector), alone


def test_a_planted_fold_is_found_as_the_closed_form_says(planted_file):
    path, classes = planted_file
    share = 0.6
    subject, alone = noisy(classes, share)
    outcome = outcome_of(Homology(HomologySettings(domains=path)), subject)
    found = values_of(outcome, 4)
    # A query that lies with its fold finds the other superfamilies' 24 domains that do: of those it
    # is above all others, with the rest it ties.
    names = list(classes)
    groups = [classes[name].rsplit(".", 2)[0] for name in names]
    inner = [classes[name].rsplit(".", 1)[0] for name in names]
    hits, areas = [], []
    for i, name in enumerate(names):
        others = [
            not alone[names[j]]
            for j in range(len(names))
            if groups[j] == groups[i] and inner[j] != inner[i]
        ]
        hits.append(float(any(others) and not alone[name]))
        areas.append(0.5 + np.mean(others) / 2 if not alone[name] else 0.5)
    assert found["hit10"] == pytest.approx(np.mean(hits), abs=1e-12)
    assert found["auc"] == pytest.approx(np.mean(areas), abs=1e-12)
    # And in expectation: share · (1 - (1 - share)^24), 1/2 + share²/2.
    assert found["hit10"] == pytest.approx(share, abs=4 * (share * (1 - share) / 600) ** 0.5)
    assert found["auc"] == pytest.approx(0.5 + share**2 / 2, abs=0.05)
    # Where all lie alone, nothing is found.
    below = values_of(outcome, 2)
    assert below["hit10"] == 0
    assert below["auc"] == pytest.approx(0.5)


def test_rows_of_a_model(planted_file):
    path, classes = planted_file
    subject, _ = noisy(classes, 0.9)
    outcome = outcome_of(Homology(HomologySettings(domains=path)), subject)
    metrics = [
        f"{metric}{level}{filtered}"
        for filtered in ("", "/filtered")
        for level in ("", "/superfamily")
        for metric in ("hit10", "auc")
    ]
    assert [m.metric for m in outcome.measures if m.layer == 2] == metrics
    assert [m.metric for m in outcome.measures if m.layer == 4] == metrics
    assert {(m.metric, m.layer) for m in outcome.measures if m.role == "main"} == {("hit10", 4)}
    assert {m.dataset for m in outcome.measures} == {"planted"}
    units = {m.metric: m.sample.units for m in outcome.measures}
    assert (units["hit10"], units["hit10/filtered"]) == (600, 570)
    # At superfamily level, those of other superfamilies in the fold are as near as the positives:
    # of 594 others, 24 tie with them where they lie with the fold.
    found = values_of(outcome, 4)
    assert found["hit10/superfamily"] == 0
    assert found["auc/superfamily"] == pytest.approx(0.5 + 0.9**2 / 2, abs=0.04)
    assert "Fold level: 600 of 600 domains are queries; 0 have no positive" in outcome.notes[0]


def test_the_control_is_at_chance(planted_file):
    path, classes = planted_file
    subject, _ = noisy(classes, 0.9)
    task = Homology(HomologySettings(domains=path))
    measures = {m.metric: m for m in outcome_of(task, subject).measures if m.role != "more"}
    shuffled, level = measures["control/hit10"].sample, measures["chance/hit10"].sample
    assert shuffled.units == 100
    assert judge_control(shuffled, level, True) == ""
    low, high = interval(shuffled)
    assert low - 0.01 < level.value() < high + 0.01
    # 24 positives among 594: a third of the queries find one in ten by chance.
    assert level.value() == pytest.approx(1 - (570 / 594) ** 10, abs=0.005)


def test_the_same_numbers_to_the_last_digit(planted_file):
    path, classes = planted_file
    subject, _ = noisy(classes, 0.5)
    first, second = (
        outcome_of(Homology(HomologySettings(domains=path)), subject) for _ in range(2)
    )
    for a, b in zip(first.measures, second.measures, strict=True):
        np.testing.assert_array_equal(a.sample.numerators, b.sample.numerators)


def test_cath_has_no_families_and_nothing_is_made_up_of_them(tmp_path):
    classes = [f"1.10.{t}.{h}" for t in (10, 20, 30) for h in range(4) for _ in range(3)]
    path = tmp_path / "cath.parquet"
    by_sequence = write_domains(path, classes, "cath")
    subject = Planted(2, lambda layer, s: np.eye(3, dtype=np.float32)[int(by_sequence[s][5]) - 1])
    outcome = outcome_of(Homology(HomologySettings(domains=path, layers=(-1,))), subject)
    found = values_of(outcome)
    assert set(found) == {"hit10", "auc", "control/hit10", "chance/hit10"}
    assert (found["hit10"], found["auc"]) == (1, 1)
    assert any("no superfamily level" in note for note in outcome.notes)


def test_domains_without_a_partner_are_left_out_and_counted(tmp_path):
    classes = ["a.1.1.1", "a.1.1.2", "a.1.2.1", "a.2.1.1", "a.3.1.1"]
    by_sequence = write_domains(tmp_path / "few.parquet", classes)
    subject = Planted(1, lambda layer, s: np.ones(2, np.float32) * float(by_sequence[s][2]))
    outcome = outcome_of(Homology(HomologySettings(domains=tmp_path / "few.parquet")), subject)
    units = {m.metric: m.sample.units for m in outcome.measures}
    assert (units["hit10"], units["hit10/superfamily"]) == (3, 2)
    assert "3 of 5 domains are queries; 2 have no positive and are left out" in outcome.notes[0]


def test_a_table_without_any_partner_is_refused(tmp_path):
    write_domains(tmp_path / "lone.parquet", ["a.1.1.1", "a.1.1.2", "a.2.1.1"])
    with pytest.raises(InputError, match=r"no fold of .*lone\.parquet has more than one"):
        Homology(HomologySettings(domains=tmp_path / "lone.parquet"))


def test_layers_count_from_the_front_once_a_subject_is_asked(planted_file):
    path, classes = planted_file
    subject, _ = noisy(classes, 0.5, layers=33)

    def asked(*layers):
        task = Homology(HomologySettings(domains=path, layers=layers))
        return list(dict.fromkeys(r.reading.layer for r in task.requests(subject)))

    assert asked("middle", "last") == [17, 33]
    assert asked(0, -2, 5, "last", -1) == [0, 32, 5, 33]
    with pytest.raises(InputError, match=r"layers 0 \(its embedding\) to 33, but .* names 34"):
        asked(34)
    with pytest.raises(ConfigError, match="layers"):
        parse_settings(HomologySettings, {"domains": "x", "layers": []}, source="b.yaml")


def test_kmers_are_counted_over_standard_letters():
    counts = count_kmers("ACACAXACD")
    assert counts.dtype == np.float32
    assert np.linalg.norm(counts) == pytest.approx(1)
    # ACA twice, CAC and ACD once; whatever holds the X is none.
    assert sorted(counts[counts > 0] * 6**0.5) == pytest.approx([1, 1, 2])
    assert not count_kmers("AC").any()
    assert not count_kmers("AXCXA").any()
    reverse = count_kmers("ADA") @ count_kmers("DAD")
    assert reverse == 0


def test_baselines_find_relatives_through_the_same_lines(tmp_path):
    """Domains of a fold share a stretch, of which each has mutated a tenth."""
    generator = np.random.default_rng(3)
    sequences, classes = [], []
    for fold in range(8):
        common = random_sequence(generator, 80)
        for superfamily in range(3):
            for _ in range(2):
                letters = [
                    random_sequence(generator, 1) if generator.random() < 0.1 else letter
                    for letter in common
                ]
                sequences.append("".join(letters))
                classes.append(f"a.{fold}.{superfamily}.1")
    sequences[5] = sequences[4]  # the same protein twice
    names = [f"d{i}" for i in range(len(classes))]
    pq.write_table(
        pa.table({"id": names, "scop_class": classes, "sequence": sequences}),
        tmp_path / "d.parquet",
    )
    task = Homology(HomologySettings(domains=tmp_path / "d.parquet"))
    baselines = task.baselines()
    assert [each.name for each in baselines] == ["kmer", "phmmer"]
    for subject in baselines:
        outcome = outcome_of(task, subject)
        found = values_of(outcome)
        assert found["hit10"] == 1, subject.name
        assert found["auc"] > 0.99
        assert {m.layer for m in outcome.measures} == {None}
        assert (
            judge_control(
                *(m.sample for m in outcome.measures if m.role in ("control", "chance")), True
            )
            == ""
        )


def test_phmmer_scores_are_those_of_pyhmmer_and_its_files_go(tmp_path, monkeypatch):
    import pyhmmer

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    generator = np.random.default_rng(4)
    common = random_sequence(generator, 60)
    sequences = [common, common[:40] + random_sequence(generator, 20), random_sequence(generator)]
    subject = Phmmer(sequences)
    asked = [Request(Reading("hits"), sequence) for sequence in (sequences[1], common, common)]
    with subject.read(lambda: iter(asked)) as readings:
        assert len(list(tmp_path.iterdir())) == 1
        rows = [readings.get(request) for request in asked]
        with pytest.raises(KeyError):
            readings.get(Request(Reading("hits"), sequences[2]))
    assert not list(tmp_path.iterdir())
    alphabet = pyhmmer.easel.Alphabet.amino()
    digital = [
        pyhmmer.easel.TextSequence(name=str(i).encode(), sequence=s).digitize(alphabet)
        for i, s in enumerate(sequences)
    ]
    builder, pipeline = pyhmmer.plan7.Builder(alphabet), pyhmmer.plan7.Pipeline(alphabet)
    hits = pipeline.search_seq(
        digital[1], pyhmmer.easel.DigitalSequenceBlock(alphabet, digital), builder
    )
    scores = {int(hit.name): hit.score for hit in hits}
    assert set(scores) == {0, 1}
    assert rows[0].tolist() == pytest.approx([scores[0], scores[1], -np.inf])
    assert rows[0].dtype == np.float32
    np.testing.assert_array_equal(rows[1], rows[2])


def test_phmmer_stands_for_its_sequences_and_answers_for_no_others():
    assert Phmmer(["MKTAY"]).digest == Phmmer(["MKTAY"]).digest
    assert Phmmer(["MKTAY"]).digest != Phmmer(["MKTAV"]).digest != Kmers.digest
    with (
        pytest.raises(InputError, match="phmmer searches among the sequences of its task"),
        Phmmer(["MKTAY"]).read(lambda: iter([Request(Reading("hits"), "MKTAV")])),
    ):
        pass


def test_without_pyhmmer_its_baseline_is_left_out_and_that_is_said(planted_file, monkeypatch):
    monkeypatch.setattr(phmmer, "find_spec", lambda name: None)
    path, classes = planted_file
    task = Homology(HomologySettings(domains=path))
    assert [each.name for each in task.baselines()] == ["kmer"]
    outcome = outcome_of(task, noisy(classes, 0.5)[0])
    assert any("phmmer is not among the baselines" in note for note in outcome.notes)


def test_the_shipped_domains_have_folds_to_find():
    domains = read_domains(TINY)
    assert 150 <= len(domains.ids) <= 300
    assert TINY.stat().st_size < 60_000
    task = Homology(HomologySettings(domains=TINY))
    found = values_of(outcome_of(task, Kmers()))
    assert 0.1 < found["chance/hit10"] < 0.6
    assert found["control/hit10"] == pytest.approx(found["chance/hit10"], abs=0.03)
