"""The task of variants, asked of subjects whose answers are planted."""

import gzip

import numpy as np
import pytest
import scans
import torch
from conftest import ROOT
from draws import random_sequence, random_weights

from raptide.alphabet import STANDARD
from raptide.calls.scoring import log_softmax
from raptide.errors import InputError
from raptide.evaluation.results import Heatmap, Lines
from raptide.evaluation.subjects.blosum import Blosum, read_matrix
from raptide.evaluation.subjects.predictions import read_predictions
from raptide.evaluation.tasks.marginals import cut_pieces, overlapping_windows
from raptide.evaluation.tasks.shuffles import order_by_hash
from raptide.evaluation.tasks.variants import Variants, VariantsSettings
from raptide.inference.engine import Engine
from raptide.model.formats.detect import write_weights

METRICS = ("spearman", "ndcg", "top10", "auc", "mcc")


def make_task(pattern, **settings):
    return Variants(VariantsSettings(kind="variants", assays=str(pattern), **settings))


def interval(sample, draws=400):
    rng = np.random.default_rng(0)
    units = sample.units
    found = sample.replicates(rng.multinomial(units, np.full(units, 1 / units), draws))
    return np.percentile(found, [2.5, 97.5])


@pytest.fixture
def planted(tmp_path):
    """Two scans of all single substitutions, and what gives scores that correlate with them."""
    rng = np.random.default_rng(0)
    truth = {}
    for name in ("first", "second"):
        target = scans.make_target(150, seed=len(name))
        mutants = scans.all_singles(target)
        values = rng.normal(size=len(mutants))
        scans.write_parquet(tmp_path / f"{name}.parquet", target, mutants, values)
        truth[target] = dict(zip(mutants, values, strict=True))

    def marginals(rho):
        noise = {target: np.random.default_rng(1).normal(size=(150, 20)) for target in truth}

        def answer(request):
            found = np.zeros((len(request.places), 20))
            for row, place in enumerate(request.places):
                letter = request.sequence[place]
                found[row] = 100 * place  # a constant of the place, which must not matter
                for column, other in enumerate(STANDARD):
                    if other != letter:
                        value = truth[request.sequence][f"{letter}{place + 1}{other}"]
                        blur = noise[request.sequence][place, column]
                        found[row, column] += rho * value + np.sqrt(1 - rho**2) * blur
            return found

        return answer

    return tmp_path / "*.parquet", marginals


def test_a_subject_of_known_strength_has_the_spearman_of_its_strength(planted):
    pattern, marginals = planted
    task = make_task(pattern)
    for rho in (0.3, 0.8):
        _, values = scans.measure(task, scans.Planted({"marginals": marginals(rho)}))
        expected = 6 / np.pi * np.arcsin(rho / 2)
        for dataset in ("first", "second", "all"):
            assert values["spearman", dataset] == pytest.approx(expected, abs=0.04)


def test_rows_are_named_by_method_and_dataset(planted):
    pattern, marginals = planted
    answers = {"marginals": marginals(0.5), "pseudo": lambda request: np.zeros(1)}
    outcome, values = scans.measure(make_task(pattern), scans.Planted(answers))
    expected = {
        (f"{prefix}{metric}", dataset)
        for prefix in ("", "masked-marginals/")
        for metric in METRICS
        for dataset in ("first", "second", "all")
    }
    expected |= {(f"{metric}/mean", "all") for metric in METRICS}
    expected |= {(f"masked-marginals/{metric}/mean", "all") for metric in METRICS}
    expected |= {("control/spearman", "all"), ("chance/spearman", "all")}
    assert set(values) == expected
    main = [(each.metric, each.dataset) for each in outcome.measures if each.role == "main"]
    assert main == [("spearman", "all")]
    _, values = scans.measure(
        make_task(pattern, methods=["masked-marginals"]), scans.Planted(answers)
    )
    assert set(values) == {key for key in expected if not key[0].startswith("masked")}


def test_the_control_is_at_chance_however_good_the_subject_is(planted):
    pattern, marginals = planted
    outcome, values = scans.measure(make_task(pattern), scans.Planted({"marginals": marginals(1)}))
    assert values["spearman", "all"] == pytest.approx(1)
    (control,) = [each for each in outcome.measures if each.role == "control"]
    low, high = interval(control.sample)
    assert low < 0 < high
    assert high - low < 0.15
    assert values["chance/spearman", "all"] == 0


def test_multiple_substitutions_add_up(tmp_path):
    target = "MKTAYIAKQR"
    mutants = ["K2A", "Q9E", "K2A:Q9E", "K2A:A4W:Q9E"]
    scans.write_parquet(tmp_path / "a.parquet", target, mutants, [1, 2, 3, 4])
    table = np.random.default_rng(0).normal(size=(10, 20))
    task = make_task(tmp_path / "a.parquet", methods=["wt-marginals"])
    subject = scans.Planted({"marginals": lambda request: table[list(request.places)]})
    outcome, _ = scans.measure(task, subject)
    (request,) = subject.asked.values()
    assert (request.sequence, request.places) == (target, (1, 3, 8))

    def odds(place, old, new):
        return table[place, STANDARD.index(new)] - table[place, STANDARD.index(old)]

    one, two, three = odds(1, "K", "A"), odds(8, "Q", "E"), odds(3, "A", "W")
    scan = scans.sample_of(outcome, "spearman", "a")
    assert scan.scores == pytest.approx([one, two, one + two, one + two + three], abs=1e-12)


def test_scores_are_the_engines(tmp_path):
    """A model read place by place against its own way of scoring variants."""
    write_weights(tmp_path / "model", random_weights(layers=2, width=32, heads=2))
    engine = Engine.load(tmp_path / "model", device="cpu", dtype="fp32")
    target = random_sequence(60)
    mutants = [m for m in scans.all_singles(target) if m[-1] in "AW"][::3]
    mutants += [f"{mutants[0]}:{mutants[-1]}"]
    scans.write_parquet(tmp_path / "a.parquet", target, mutants, np.arange(len(mutants)))
    columns = [engine.tokens.index(letter) for letter in STANDARD]

    def answer(request):
        if request.reading.method == "masked-marginals":
            return engine.masked_log_p([(request.sequence, request.places)])[0][:, columns]
        return log_softmax(engine.logits([request.sequence])[0])[list(request.places)][:, columns]

    with torch.inference_mode():
        outcome, _ = scans.measure(
            make_task(tmp_path / "a.parquet"), scans.Planted({"marginals": answer})
        )
    for prefix, method in (("", "wt-marginals"), ("masked-marginals/", "masked-marginals")):
        found = scans.sample_of(outcome, f"{prefix}spearman", "a").scores
        assert found == pytest.approx(engine.score_variants(target, mutants, method), abs=1e-5)


def test_blosum_scores_by_its_entries(tmp_path):
    matrix = read_matrix()
    assert np.array_equal(matrix, matrix.T)
    w = "-3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1 1 -4 -3 -2 11 2 -3"  # a row as NCBI prints it
    row = matrix[STANDARD.index("W"), [STANDARD.index(each) for each in "ARNDCQEGHILKMFPSTWYV"]]
    assert row.tolist() == list(map(int, w.split()))
    assert matrix.trace() == 116
    scans.write_parquet(tmp_path / "a.parquet", "MKWX", ["K2R", "W3Y", "K2E:W3A"], [3, 2, 1])
    outcome, values = scans.measure(make_task(tmp_path / "a.parquet"), Blosum())
    assert outcome.measures[0].sample.scores.tolist() == [2, 2, 1 - 3]
    assert not [metric for metric, _ in values if metric.startswith("masked")]


def test_real_scans_have_the_published_order_of_blosum():
    task = make_task(ROOT / "jobs/benchmarks/tiny/variants/*.parquet")
    _, values = scans.measure(task, Blosum())
    assert values["spearman", "PABP_YEAST"] == pytest.approx(0.297, abs=5e-4)
    assert values["spearman", "DLG4_RAT"] == pytest.approx(0.216, abs=5e-4)


@pytest.mark.parametrize("length", [1023, 1100, 1533, 1534, 1863, 2044, 2500, 3033, 3400])
def test_windows_are_proteingyms(length):
    """Against the loop of its compute_fitness.py, whose tokens are our residues and two more."""
    tokens = length + 2
    weights = np.ones(1024)
    for i in range(1, 257):
        weights[i] = 1 / (1 + np.exp(-(i - 128) / 16))
    for i in range(1022 - 256, 1023):
        weights[i] = 1 / (1 + np.exp((i - 1022 + 128) / 16))
    expected = []
    left, right = 0, tokens - 1024
    while True:
        expected += [left, right]
        if left + 1023 > right:
            break
        left, right = left + 511, right - 511
    if left + 1023 - right + 1 < 511:
        expected.append(tokens // 2 - 512)
    found = overlapping_windows(length, 1022)
    assert [start for start, _ in found] == expected
    covered = np.zeros(length)
    for start, each in found:
        assert each == pytest.approx(weights[1:1023], abs=1e-12)
        covered[start : start + 1022] += each
    assert covered.min() > 0


def test_long_proteins_are_read_in_windows(tmp_path):
    target = scans.make_target(300)
    mutants = [m for m in scans.all_singles(target) if m.endswith(("A", "G"))]
    scans.write_parquet(tmp_path / "a.parquet", target, mutants, np.arange(len(mutants)))
    task = make_task(tmp_path / "a.parquet", window=100)
    (assay,) = task.assays
    table = np.random.default_rng(0).normal(size=(300, 20))

    def answer(request):
        """The same wherever the window lies, up to a constant."""
        start = target.index(request.sequence)
        assert len(request.sequence) == 100
        return table[start + np.array(request.places)] + start

    outcome, _ = scans.measure(task, scans.Planted({"marginals": answer}))
    _, position, old, new = assay.changes
    expected = table[position, new] - table[position, old]
    for metric in ("spearman", "masked-marginals/spearman"):
        scan = scans.sample_of(outcome, metric, "a")
        assert scan.scores == pytest.approx(expected, abs=1e-9)
    pieces = list(cut_pieces(assay, "masked-marginals", 100))
    assert len(pieces) == len(assay.positions)
    for piece, place in zip(pieces, assay.positions, strict=True):
        (inside,) = piece.request.places
        assert piece.request.sequence[inside] == target[place]
        assert inside == 50 or place < 50 or place >= 250


def test_pseudo_likelihoods_are_of_whole_sequences_and_their_cost_is_said(tmp_path):
    target = "MKTAYIAKQR"
    mutants = ["K2A", "Q9E", "K2A:Q9E"]
    scans.write_parquet(tmp_path / "a.parquet", target, mutants, [1, 2, 3])
    task = make_task(tmp_path / "a.parquet", methods=["wt-marginals", "pseudo-ppl"])
    subject = scans.Planted(
        {
            "marginals": lambda request: np.zeros((len(request.places), 20)),
            "pseudo": lambda request: np.array([float(request.sequence.count("K"))]),
        }
    )
    assert "40 forward passes, 480 tokens" in task.cost(subject)  # 4 sequences, 10 residues each
    assert task.cost(Blosum()) == ""
    outcome, _ = scans.measure(task, subject)
    scan = scans.sample_of(outcome, "pseudo-ppl/spearman", "a")
    assert scan.scores.tolist() == [-1, 0, -1]


def test_without_bins_auc_is_at_the_median_and_said_so(tmp_path):
    target = scans.make_target(20)
    mutants = scans.all_singles(target)
    values = np.random.default_rng(0).normal(size=len(mutants))
    scans.write_parquet(tmp_path / "bare.parquet", target, mutants, values)
    sequences = [scans.mutate(target, mutant) for mutant in mutants]
    rows = list(zip(mutants, sequences, values, (values > 1).astype(int), strict=True))
    scans.write_csv(tmp_path / "binned.csv", rows)
    outcome, values = scans.measure(make_task(tmp_path / "*"), Blosum())
    (note,) = outcome.notes
    assert "at its median" in note
    assert "1 of 2 assays: bare" in note
    assert values["spearman", "bare"] == values["spearman", "binned"]
    assert values["auc", "bare"] != values["auc", "binned"]


def test_a_table_of_scores_goes_through_the_same_lines(planted, tmp_path):
    pattern, marginals = planted
    task = make_task(pattern, methods=["wt-marginals"])
    outcome, expected = scans.measure(task, scans.Planted({"marginals": marginals(0.5)}))
    rows = [
        (assay.name, mutant, score, -score)
        for assay in task.assays
        for mutant, score in zip(
            assay.mutants, scans.sample_of(outcome, "spearman", assay.name).scores, strict=True
        )
    ]
    header = ("assay", "mutant", "model", "opposite")
    table = scans.write_csv(tmp_path / "t.csv", rows[::-1], header)
    model, opposite = read_predictions([table])
    assert (model.name, opposite.name) == ("model", "opposite")
    assert model.digest != opposite.digest
    _, values = scans.measure(task, model)
    assert values == expected
    _, values = scans.measure(task, opposite)
    assert values["spearman", "first"] == pytest.approx(-expected["spearman", "first"], abs=1e-12)


def test_score_files_may_be_named_after_their_assays(tmp_path):
    target = "MKTAYIAKQR"
    scans.write_parquet(tmp_path / "a.parquet", target, ["K2A", "K2A:Q9E", "T3G"], [1, 2, 3])
    scans.write_parquet(tmp_path / "b.parquet", target, ["K2A", "K2R", "T3G"], [1, 2, 3])
    rows = [("q9e:k2a", 2, 20), ("K2A", 1, 10), ("T3G", 3, 30)]
    table = scans.write_csv(tmp_path / "a.csv", rows, ("mutant", "DMS_score", "x"))
    task = make_task(tmp_path / "*.parquet")
    (found,) = read_predictions([table])
    outcome, values = scans.measure(task, found)
    assert values["spearman", "a"] == 1
    assert ("spearman", "b") not in values
    assert "1 of 2 assays have no score." in outcome.notes
    some = scans.write_csv(tmp_path / "a.csv", [("K2A", 10), ("T3G", "")], ("mutant", "x"))
    with pytest.raises(InputError, match="every variant of a, but 2 have no number, K2A:Q9E"):
        scans.measure(task, read_predictions([some])[0])
    flawed = scans.write_csv(tmp_path / "a.csv", [("K2A", 10), ("T3G", "?")], ("mutant", "x"))
    with pytest.raises(InputError, match=r"a\.csv, row 2: 'x' must hold numbers, but '\?'"):
        read_predictions([flawed])
    bare = scans.write_csv(tmp_path / "a.csv", [("K2A", 10)], ("mutant", "score"))
    with pytest.raises(InputError, match="columns of scores"):
        read_predictions([bare])


def test_pictures_show_all_assays_and_one_landscape(planted):
    pattern, marginals = planted
    subject = scans.Planted({"marginals": marginals(0.5)})
    outcome, values = scans.measure(make_task(pattern, methods=["wt-marginals"]), subject)
    bars, measured, scored = outcome.figures
    assert isinstance(bars, Lines)
    assert bars.x_names == ["first", "second"]
    assert bars.series["spearman"][1] == values["spearman", "second"]
    assert isinstance(measured, Heatmap)
    assert measured.values.shape == scored.values.shape == (20, 150)
    assert np.isnan(measured.values).sum() == 150  # the protein's own letters
    assert np.nanmax(measured.values) < 1


def test_orders_by_hash_are_pinned():
    names = [f"A{i}G" for i in range(1, 9)]
    found = order_by_hash("assay", names, "split 0").tolist()
    assert found == [6, 7, 2, 0, 4, 1, 5, 3]
    assert order_by_hash("assay", names, "split 1").tolist() != found
    assert order_by_hash("other", names, "split 0").tolist() != found
    assert sorted(found) == list(range(8))


def test_compressed_tables_open(tmp_path):
    plain = scans.write_csv(tmp_path / "a.csv", [("K2A", 1)], ("mutant", "x"))
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    one, two = (read_predictions([path])[0] for path in (plain, packed))
    assert one.digest != two.digest  # of other assays
    with pytest.raises(InputError, match=r"a\.csv scores a as 'x', which another table has done"):
        read_predictions([plain, plain])


def test_predictions_score_each_variant_once(tmp_path):
    table = tmp_path / "scan.csv"
    table.write_text("mutant,model\nK2A:A1G,1\nT3G,2\nA1G:K2A,3\n")
    with pytest.raises(InputError, match="row 3 has A1G:K2A of scan again after row 1"):
        read_predictions([table])
    table.write_text("mutant,model\n")
    with pytest.raises(InputError, match="scores no variant"):
        read_predictions([table])
    table.write_text("mutant,model\nK²A,1\n")
    assert len(read_predictions([table])) == 1, "what is no variant is none of an assay's"
