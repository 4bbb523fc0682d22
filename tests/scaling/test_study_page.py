"""The page and the table of a study, from points that are known."""

import dataclasses
import re

import pyarrow.parquet as pq
import pytest
from planted_study import a_point

from raptide.evaluation.cache import Measured
from raptide.evaluation.results import Measure
from raptide.evaluation.samples import Ratio
from raptide.scaling.laws import NO_CURVES, Curves
from raptide.scaling.page import render, write_page
from raptide.scaling.table import TABLE, write_table

SIZES = (2e5, 6e5, 1.5e6)
DATA = {"0.1pct": 4e4, "1pct": 4e5, "5pct": 2e6}


def with_bench(point, value):
    measure = Measure("q8", "chains", Ratio(*([value] * 2, [1.0] * 2)))
    return dataclasses.replace(point, bench={"structure/q8": Measured(measure, value, 0.1, 0.9)})


def a_gram(data):
    point = a_point(2.8, 1.0, data=data, kind="n-gram", tokens=DATA[data])
    known = {"name": f"2-gram--{data}", "parameters": None, "flops": None, "model": "2-gram"}
    return dataclasses.replace(point, facts=point.facts | known)


@pytest.fixture
def points():
    found = [
        a_point(5.0 * x**-0.02 * tokens**-0.02, x, data=data, tokens=tokens, flops=x * 1e7)
        for x in SIZES
        for data, tokens in DATA.items()
    ]
    found += [a_point(2.6, 3e5, data="1pct", kind="lstm", tokens=4e5)]
    found += [a_point(2.9 + seed / 50, 6e5, data="1pct", seed=seed, tokens=4e5) for seed in (2, 3)]
    for point in found:
        name = f"{point.facts['model']}--{point.facts['data']}--seed{point.facts['seed']}"
        point.facts |= {"name": name, "tokens": 2_400_000}
    named = [with_bench(point, 0.5 + i / 100) for i, point in enumerate(found)]
    return [*named, *(a_gram(data) for data in DATA)]


def test_the_page_draws_curves_with_laws_and_what_emerges(points):
    page = render(
        "x",
        points,
        Curves.through(points),
        {"command": "raptide scaling-study"},
        ["t--5pct--seed1"],
    )
    for title in ("ECE by parameters", "ECE by data", "ECE by compute", "structure/q8 against ECE"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert "5pct, x^-0.020" in page
    assert page.count('fill-opacity="0.12"') == 7, "a band for each law"
    assert "parameters, 5pct: from m200000 to m1500000 the ECE goes from" in page
    assert "parameters 5pct: Cross entropy goes as x^-0.0200 (95% interval" in page
    assert "best, x^-" in page
    assert "1pct, LSTM" in page
    assert "best n-gram" in page
    assert "Without t--5pct--seed1, which did not come to an end." in page
    assert "3 seeds of weights and order" in page
    assert "a difference of less than twice that counts as none" in page
    assert "2-gram--5pct" in page
    assert not re.search(r"<script|https?://(?!www.w3.org)", page)
    assert "nan" not in page


def test_a_study_without_results_is_a_page_all_the_same(tmp_path):
    write_page(tmp_path, "x", [], NO_CURVES, {}, ["a"])
    assert "Without a" in (tmp_path / "study.html").read_text()


def test_the_table_has_a_row_a_point_and_nulls_where_nothing_is_known(points, tmp_path):
    write_table(tmp_path, points)
    rows = pq.read_table(tmp_path / TABLE).to_pylist()
    assert len(rows) == len(points)
    first, gram = rows[0], rows[-1]
    assert first["epochs"] == pytest.approx(2_400_000 / 4e4)
    assert first["parameters"] == 200_000
    assert first["structure/q8"] == 0.5
    assert (first["structure/q8_low"], first["structure/q8_high"]) == (0.1, 0.9)
    assert (gram["parameters"], gram["epochs"], gram["structure/q8"]) == (None, None, None)
    assert gram["kind"] == "n-gram"
    assert gram["ece_masked"] == pytest.approx(2.718281828**2.8)
