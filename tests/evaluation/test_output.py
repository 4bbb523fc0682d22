"""What an evaluation leaves: tables, comparisons with verdicts, the noise floor, a report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from endpoints import make_bundle

from evaluate_model import refuse_equal_repeats
from raptide import ConfigError
from raptide.bulk.work import Model
from raptide.evaluation.cache import ResultCache
from raptide.evaluation.emergence import read_emergence
from raptide.evaluation.output import clear_output, make_content, write_output
from raptide.evaluation.report.page import render_page
from raptide.evaluation.report.terminal import describe
from raptide.evaluation.results import COLUMNS
from raptide.evaluation.run import evaluate
from raptide.evaluation.subjects.model import ModelSubject
from raptide.evaluation.subjects.readers import HereReader
from raptide.evaluation.tasks.space import Space, SpaceSettings
from raptide.evaluation.tasks.variants import Variants, VariantsSettings

TINY = ROOT / "jobs/benchmarks/tiny"


@pytest.fixture(scope="module")
def tasks():
    scans = VariantsSettings(
        kind="variants",
        name="scans",
        assays=str(TINY / "variants/PABP_YEAST.parquet"),
        methods=("wt-marginals",),
    )
    return [Space(SpaceSettings(name="space")), Variants(scans)]


@pytest.fixture(scope="module")
def findings(tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    subjects = []
    for name in ("a", "b", "r1", "r2", "r3"):
        bundle = make_bundle(folder / name, seed=ord(name[-1]))
        model = Model.find(bundle)
        subjects.append(ModelSubject(name, model, "fp32", HereReader(), folder / f"read-{name}"))
    return evaluate(tasks, subjects, ResultCache(folder / "cache"))


@pytest.fixture(scope="module")
def content(findings):
    repeats = ["r1", "r2", "r3"]
    references = ROOT / "jobs/benchmarks/reference.yaml"
    return make_content("small", findings, repeats, references, ["evaluate_model.py", "--x y"])


def test_tables_hold_a_row_a_number(content, tmp_path):
    write_output(tmp_path / "out", content)
    table = pq.read_table(tmp_path / "out/results.parquet")
    assert table.column_names == list(COLUMNS)
    rows = table.to_pylist()
    texts = json.loads((tmp_path / "out/results.json").read_text())
    for row, text in zip(rows, texts, strict=True):
        for name, value in row.items():
            empty = isinstance(value, float) and math.isnan(value)
            assert text[name] == (None if empty else value)
    assert {row["model"] for row in rows if row["baseline"]} == {
        *("random-weights", "blosum62", "unigram")
    }
    places = [(row["model"], row["task"], row["dataset"], row["metric"]) for row in rows]
    assert len(set(places)) == len(places)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("report.html", "results.json", "results.parquet")
    ]
    HTMLParser().feed((tmp_path / "out/report.html").read_text())


def test_a_number_without_end_is_written_all_the_same(content, tmp_path):
    """The ECE of a model that is sure of what is wrong."""
    row = content.rows[0] | {"value": math.inf, "high": math.inf}
    write_output(tmp_path / "out", replace(content, rows=[row, *content.rows[1:]]))
    assert json.loads((tmp_path / "out/results.json").read_text())[0]["value"] is None
    assert pq.read_table(tmp_path / "out/results.parquet")["value"][0].as_py() == math.inf


def test_every_two_models_are_compared_number_by_number(content, findings):
    pairs = {(each.a, each.b) for each in content.comparisons}
    assert pairs == {("a", "b")}, "repeats are no models to compare"
    values = {
        (row["model"], row["task"], row["dataset"], row["metric"]): row for row in content.rows
    }
    for each in content.comparisons:
        mine, theirs = (values[name, *each.place]["value"] for name in (each.a, each.b))
        assert each.difference == pytest.approx(mine - theirs, abs=1e-9)
        assert each.paired
        apart = each.low > 0 or each.high < 0  # one assay alone has no interval
        assert (each.verdict == "no measured difference") == (not apart)
        assert not each.metric.startswith(("control/", "chance/"))
    assert {("space", "scans")} == {tuple(dict.fromkeys(c.task for c in content.comparisons))}


def test_layers_of_one_number_are_told_apart(findings):
    """Of two models they are those asked for in the same place, whatever their numbers."""

    def layered(finding):
        layers = {"a": (2, 4), "b": (2, 6)}.get(finding.subject.name, (1, 2))
        measured = [
            replace(each, measure=replace(each.measure, layer=layer))
            for layer in layers
            for each in finding.result.measured
        ]
        return replace(finding, result=replace(finding.result, measured=measured))

    found = replace(findings, found=[layered(each) for each in findings.found])
    repeats = ["r1", "r2", "r3"]
    content = make_content("small", found, repeats, None, [], ["a", "b", *repeats])
    [first, second] = [
        each
        for each in content.comparisons
        if (each.a, each.b, each.metric) == ("a", "b", "letters-silhouette")
    ]
    assert (first.layers, second.layers) == ("layer 2", "layers 4 and 6")
    assert content.noise_of(first) is not None
    assert content.noise_of(second) is None
    for text in (describe(content), render_page(content)):
        assert "letters-silhouette" in text
        assert "layer 2" in text
        assert "layers 4 and 6" in text


def test_a_repeat_that_was_asked_as_a_model_is_compared(findings):
    repeats = ["r1", "r2", "r3"]
    content = make_content("small", findings, repeats, None, [], ["a", "r1"])
    pairs = {(each.a, each.b) for each in content.comparisons}
    assert pairs == {("a", "b"), ("a", "r1"), ("b", "r1")}
    assert content.noise["space", "letters", "letters-silhouette"] is not None


def test_repeats_of_the_same_weights_are_no_noise(tmp_path):
    one, two = (Model.find(make_bundle(tmp_path / name, seed=1)) for name in ("one", "two"))
    other = Model.find(make_bundle(tmp_path / "other", seed=2))
    refuse_equal_repeats({"one": one, "other": other})
    with pytest.raises(ConfigError, match="one and two have the same weights"):
        refuse_equal_repeats({"one": one, "other": other, "two": two})


def test_the_noise_floor_is_that_of_runs_that_differ_in_the_seed_alone(content):
    values = [
        row["value"]
        for row in content.rows
        if row["model"] in ("r1", "r2", "r3")
        and (row["task"], row["metric"]) == ("space", "letters-silhouette")
    ]
    floor = content.noise["space", "letters", "letters-silhouette"]
    # Twice the deviation, unbiased: c4 of three values is 0.8862.
    assert floor == pytest.approx(2 * np.std(values, ddof=1) / 0.886227, rel=1e-4)


def test_the_terminal_says_what_is_beaten_and_by_how_much_models_differ(content):
    text = describe(content)
    assert "blosum62" in text
    assert "controls came out at chance" in text
    assert max(map(len, text.splitlines())) <= 100
    assert any(f"{verdict}" in text for verdict in ("better", "worse", "no measured difference"))


def test_only_what_an_evaluation_wrote_is_deleted(content, tmp_path):
    out = tmp_path / "out"
    write_output(out, content)
    cache = ResultCache(out / "cache")
    cache.folder.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match=r"mine\.txt"):
        clear_output(out, cache)
    assert (out / "results.parquet").exists()
    (out / "mine.txt").unlink()
    clear_output(out, cache)
    assert list(out.iterdir()) == []


def test_a_cache_that_holds_other_things_or_is_in_use_is_not_deleted(content, tmp_path):
    write_output(tmp_path / "out", content)
    home = ResultCache(tmp_path / "home")
    home.folder.mkdir()
    (home.folder / "thesis.tex").write_text("keep")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        clear_output(tmp_path / "out", home)
    assert (home.folder / "thesis.tex").exists()
    assert (tmp_path / "out/results.parquet").exists()
    (home.folder / "thesis.tex").unlink()
    for name in ("read-0123456789abcdef-fp32", "random-0123456789abcdef", "partial"):
        (home.folder / name).mkdir()
    for name in (f"{'a' * 40}.npz", f"ngrams-{'b' * 32}.safetensors"):
        (home.folder / name).write_text("")
    with home.turn("0123456789abcdef"), pytest.raises(ConfigError, match="at work"):
        clear_output(tmp_path / "out", home)
    assert len(list(home.folder.iterdir())) == 5
    clear_output(tmp_path / "out", home)
    assert not home.folder.exists()


def test_a_runs_curve_is_read_past_a_torn_line(tmp_path):
    lines = [{"trainer/global_step": s, "progress/tokens": 100 * s} for s in (1, 2, 3, 4)]
    lines[2] |= {"eval/step": 2, "eval/ece_masked": 16.0, "bench/contacts/p@l/long": 0.1}
    lines[3] |= {"eval/step": 4, "eval/ece_masked": 15.0, "bench/contacts/p@l/long": 0.2}
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"trainer/glo')
    found = read_emergence(tmp_path)
    assert [(m.step, m.tokens, m.ece) for m in found.moments] == [(2, 200, 16.0), (4, 400, 15.0)]
    assert found.moments[1].metrics == {"contacts/p@l/long": 0.2}
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_emergence(tmp_path) is None
    assert read_emergence(tmp_path / "none") is None
