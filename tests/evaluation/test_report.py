"""The report: a page that stands alone, says what is not beaten, and trusts no name."""

import dataclasses
import math
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from evaluated import OTHER, TRAINED, number_row, small_content

from raptide.evaluation.report.axes import axis_over
from raptide.evaluation.report.charts import MOST_POINTS, Series, line_chart, scatter
from raptide.evaluation.report.content import Comparison, Control, SubjectEntry
from raptide.evaluation.report.page import render_page, write_page
from raptide.evaluation.report.pictures import LEVELS, MOST_CELLS, heatmap, palette, png, to_levels
from raptide.evaluation.report.sections import emergence
from raptide.evaluation.report.style import DARK, LIGHT, STYLE
from raptide.evaluation.report.tasks import Album, pictures
from raptide.evaluation.report.words import main_lines, plain_statement, standing, verdict
from raptide.evaluation.results import Heatmap, Points

HOSTILE = "runs/<script>alert('1')</script>\"&amp;<img src=x onerror=y>"


class Page(HTMLParser):
    """Elements with their attributes and text, and whether each is closed where it must be."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def html():
    return render_page(small_content())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def words_of(html):
    return " ".join(" ".join(Page(html).text).split())


def test_every_element_is_closed_and_every_id_is_there_once(page):
    assert not page.open
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.of("a")} <= set(ids)


def test_nothing_comes_from_elsewhere_and_nothing_runs(html, page):
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "data"):
            if name in attrs:
                assert re.match(r"#|data:image/png;base64,", attrs[name]), (tag, attrs[name])
    assert not re.search(r"url\(|@import|https?:", html)
    (policy,) = [m for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"].startswith("default-src 'none'")


def test_names_are_text_wherever_they_stand():
    content = small_content(HOSTILE)
    content = dataclasses.replace(
        content,
        benchmark=HOSTILE,
        command=HOSTILE,
        tasks=[
            dataclasses.replace(each, name=HOSTILE if i == 2 else each.name)
            for i, each in enumerate(content.tasks)
        ],
        rows=[
            row | {"dataset": HOSTILE, "metric": HOSTILE + row["metric"]} for row in content.rows
        ],
        references=[dataclasses.replace(content.references[0], source=HOSTILE, model=HOSTILE)],
    )
    made = Page(render_page(content))
    assert not made.open
    assert not {"script", "img"} & {tag for tag, _ in made.elements}
    assert "".join(made.text).count(HOSTILE) > 20
    plain = Page(render_page(small_content()))
    assert {tag for tag, _ in made.elements} == {tag for tag, _ in plain.elements}
    attributes = {name for _, attrs in plain.elements for name in attrs}
    assert {name for _, attrs in made.elements for name in attrs} == attributes


def test_text_that_is_no_unicode_is_still_written(tmp_path):
    file = write_page(small_content("runs/\udcff"), tmp_path / "report.html")
    assert "runs/\\udcff" in file.read_text("utf-8")
    assert [each.name for each in tmp_path.glob("*.html")] == ["report.html"]


def test_every_colour_that_is_used_has_a_value_in_both_themes(html):
    assert LIGHT.keys() == DARK.keys()
    used = set(re.findall(r"var\(--(\w+)\)", html))
    assert {"c0", "ink", "page"} <= used <= LIGHT.keys()
    light, dark = STYLE.split("@media screen and (prefers-color-scheme:dark)")
    assert all(f"--{name}:{value};" in light for name, value in LIGHT.items())
    assert all(f"--{name}:{value};" in dark for name, value in DARK.items())


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_the_page(theme):
    def contrast(a, b):
        light, dark = sorted((luminance(theme[a]), luminance(theme[b])), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for ground in ("page", "raised"):
        for ink in ("ink", "muted", "link", "good", "bad"):
            assert contrast(ink, ground) >= 4.5, (ink, ground)
    for series in (f"c{i}" for i in range(8)):
        assert contrast(series, "page") >= 3, series


def test_every_picture_says_what_it_shows(page):
    drawings = [svg for svg in page.of("svg") if "aria-hidden" not in svg]
    assert len(drawings) >= 8
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in drawings)
    assert len(page.of("figcaption")) == len(page.of("figure")) == len(drawings)
    assert len(page.of("caption")) == len(page.of("table"))
    assert all("scope" in th for th in page.of("th"))
    assert [tag for tag, _ in page.elements].count("h1") == 1


def test_numbers_come_with_intervals_and_what_is_none_is_a_dash(html):
    words = words_of(html)
    assert "0.520 0.510 to 0.530" in words
    assert "12.00 11.50 to 12.50" in words
    assert not re.search(r"\bnan\b", html, re.IGNORECASE)
    row = re.search(r'<tr><th scope="row">q3.*?</tr>', html)[0]
    assert "–" in row
    assert "layer 3" in words


def test_a_baseline_that_is_not_beaten_is_said_in_words(html):
    words = words_of(html)
    assert (
        f"Not beaten: structure (test, q8): {TRAINED} at 0.520 (0.510 to 0.530) does not beat "
        "one-hot at 0.510 (0.500 to 0.520)." in words
    )
    assert "Drawn in pairs, it is better than one-hot." in words
    assert f"{OTHER} at 0.500 (0.490 to 0.510) does not beat one-hot" in words
    # Of perplexity, variants and structure: two models, one model, two models.
    assert "In 3 of 5 main metrics of models every baseline is beaten." in words


@pytest.mark.parametrize(
    ("value", "higher", "beaten"),
    [(0.526, True, True), (0.524, True, False), (0.474, False, True), (0.476, False, False)],
)
def test_a_baseline_is_beaten_by_a_whole_interval_alone(value, higher, beaten):
    content = small_content()
    rows = [
        number_row(TRAINED, "structure", "q8", value, 0.0125, higher_is_better=higher),
        number_row("one-hot", "structure", "q8", 0.5, 0.0125, higher_is_better=higher),
    ]
    (line,) = main_lines(dataclasses.replace(content, rows=rows))
    expected = "beats every baseline" if beaten else "does not beat one-hot"
    assert standing(line, TRAINED) == expected
    assert expected in plain_statement(content, line, TRAINED)


def test_without_an_interval_a_model_beats_nothing_and_a_baseline_counts_by_its_value():
    rows = [
        number_row(TRAINED, "structure", "q8", 0.9, math.nan),
        number_row(OTHER, "structure", "q8", 0.9),
        number_row("one-hot", "structure", "q8", 0.5, math.nan),
    ]
    (line,) = main_lines(dataclasses.replace(small_content(), rows=rows))
    assert standing(line, TRAINED) == "does not beat one-hot"
    assert standing(line, OTHER) == "beats every baseline"


def test_a_verdict_is_weighed_against_what_seeds_do(html):
    better = Comparison("t", "d", "m", "a", "b", 0.02, 0.01, 0.03, "better")
    assert verdict(better, None) == "better"
    assert verdict(better, 0.03) == "better, but seeds alone differ as much"
    assert verdict(better, 0.01) == "better, and more than seeds alone"
    nothing = dataclasses.replace(better, verdict="no measured difference")
    assert verdict(nothing, 0.03) == "no measured difference"
    assert "+0.020 0.010 to 0.030 0.030 better, but seeds alone differ as much" in words_of(html)


def test_published_numbers_controls_and_lineage_are_there(html):
    words = words_of(html)
    assert "Published numbers: Rives et al. 2021." in words
    assert f"Not at chance: {TRAINED}: q8 is 0.4 on shuffled labels." in words
    assert "At chance: one-hot: q8 is 0.2 on shuffled labels." in words
    assert "corpus efefefefefef step 1,200 weights abababababab" in words
    assert "The model's folder says nothing of where its weights come from." in words
    assert "python jobs/evaluate_model.py" in words


def test_what_all_subjects_say_is_said_once(html):
    assert words_of(html).count("3 chains are left out.") == 3  # once a task


def test_a_report_of_nothing_but_a_model_is_a_page():
    content = dataclasses.replace(
        small_content(), tasks=[], rows=[], comparisons=[], emergence=[], references=[], controls=[]
    )
    made = Page(render_page(content))
    assert not made.open
    assert "Which differences mean something" not in made.text


def test_lines_of_subjects_share_a_picture():
    content = small_content()
    drawn = pictures(content, content.tasks[1])
    shared = [each for each in drawn if "Precision: " in each]
    assert len(shared) == 1
    assert f"lines of {TRAINED}, {OTHER}" in shared[0]
    assert len(drawn) == 2


def test_a_picture_that_is_the_same_for_all_is_drawn_once():
    content = small_content()
    own = content.tasks[2].figures[TRAINED]
    twice = {TRAINED: own, OTHER: own[:1]}
    drawn = pictures(content, dataclasses.replace(content.tasks[2], figures=twice))
    assert [re.search("<figcaption>(.*?)<", each)[1] for each in drawn] == [
        "Landscape",
        f"Letters, {TRAINED}",
    ]
    other = dataclasses.replace(own[0], values=own[0].values + 1)
    drawn = pictures(
        content, dataclasses.replace(content.tasks[2], figures=twice | {OTHER: [other]})
    )
    assert len(drawn) == 3


def test_subjects_of_one_name_are_told_apart_by_their_weights():
    content = small_content()
    twin = SubjectEntry("one-hot", "99" * 32, True)
    rows = [
        *content.rows,
        number_row("one-hot", "structure", "q8", 0.47) | {"weights": twin.weights},
    ]
    for row in rows:
        if row["model"] == "one-hot" and row["weights"] != twin.weights:
            row["weights"] = "01" * 32
    made = render_page(dataclasses.replace(content, subjects=[*content.subjects, twin], rows=rows))
    words = words_of(made)
    assert "does not beat one-hot (010101) at 0.510" in words
    assert "0.470 0.460 to 0.480" in words
    assert made.count(">one-hot (999999)</th>") == 4  # columns, digests, seconds, controls


def test_a_control_that_is_as_it_should_be_needs_no_sentence():
    content = small_content()
    silent = [Control("structure", "one-hot", "", True)] * 2  # it has two controls
    assert "At chance: one-hot Notes" in words_of(
        render_page(dataclasses.replace(content, controls=silent))
    )


def test_long_axes_are_labelled_with_the_names_of_their_places():
    names = [f"M{i + 1}" for i in range(100)]
    drawn = heatmap(Heatmap("h", np.eye(3, 100), column_names=names))
    assert ">M20</text>" in drawn
    assert ">M19</text>" not in drawn


def test_pictures_beyond_what_a_page_may_weigh_are_left_out_and_counted():
    content = small_content()
    drawn = pictures(content, content.tasks[1])
    album = Album(len(drawn[1]))
    assert album.admit(drawn[1:]) == drawn[1:]
    assert not album.admit(drawn[:1])
    assert album.left_out == 1


def test_many_points_and_long_chains_stay_small():
    draws = np.random.default_rng(1)
    many = Points("p", draws.random((20_000, 2), np.float32), [f"g{i % 30}" for i in range(20_000)])
    drawn = scatter(many)
    assert len(drawn) < 120_000
    assert "of 20,000 points are drawn." in drawn
    assert "23 smaller groups" in drawn
    assert drawn.count("M") < MOST_POINTS + 50
    levels = to_levels(draws.random((1_500, 1_500), np.float32), False)
    assert levels.size <= MOST_CELLS
    assert to_levels(draws.random((20, 3_000), np.float32), True).shape == (20, 3_000)


def test_a_gap_parts_a_line():
    drawn = line_chart("t", "x", "y", [Series("s", [0, 1, 2, 3], [1.0, math.nan, 2.0, 3.0])])
    (path,) = re.findall(r'<path d="([^"]*)" class="line" stroke="[^"]*"></path></?[^s]', drawn)[:1]
    assert path.count("M") == 2
    assert path.count("L") == 1
    assert "nan" not in drawn


@pytest.mark.parametrize("values", [[], [math.nan], [3.0], [0.0, 0.0], [-1e-9, 1e-9], [1e12, 2e12]])
def test_any_values_have_an_axis(values):
    axis = axis_over(values, 0, 100)
    assert axis.low < axis.high
    assert 1 <= len(axis.ticks()) <= 7
    assert all(-1e-6 <= axis.at(tick) <= 100 + 1e-6 for tick in axis.ticks())


def decode(image):
    """The palette, transparency and indices of a PNG; checksums are looked at."""
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(image):
        (length,) = struct.unpack(">I", image[at : at + 4])
        data = image[at + 4 : at + 8 + length]
        assert struct.unpack(">I", image[at + 8 + length : at + 12 + length])[0] == zlib.crc32(data)
        chunks[data[:4]] = data[4:]
        at += 12 + length
    columns, rows = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, columns + 1)
    return np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3), chunks[b"tRNS"], lines[:, 1:]


def test_a_matrix_is_a_png_whose_missing_cells_are_nothing():
    values = np.array([[0.0, 0.5, 1.0], [np.nan, 1.0, 0.25]], np.float32)
    colours, transparency, levels = decode(png(to_levels(values, False), palette(False)))
    np.testing.assert_array_equal(levels, [[0, 32, 63], [64, 63, 16]])
    assert colours.shape == (LEVELS + 1, 3)
    assert list(transparency) == [255] * LEVELS + [0]
    assert to_levels(np.array([[-1.0, 0.0, 4.0]]), True).tolist() == [[24, 32, 63]]


def test_the_truth_fills_the_lower_triangle():
    import base64

    zeros, ones = np.zeros((3, 3), np.float32), np.ones((3, 3), np.float32)
    ones[0, 0] = 0  # so that there is a range
    drawn = heatmap(Heatmap("h", zeros, truth=ones))
    image = base64.b64decode(re.search(r"base64,([^\"]+)", drawn)[1])
    np.testing.assert_array_equal(decode(image)[2], np.tri(3, k=-1) * 63)


def test_what_emerges_goes_from_blind_on_the_left_to_sharp_on_the_right():
    (run,) = small_content().emergence
    drawn = emergence(run)
    (line,) = re.findall(r'aria-label="q8: .*?<path d="([^"]*)" class="line"', drawn)
    places = [tuple(map(float, place.split())) for place in re.split("[ML]", line)[1:]]
    assert len(places) == 3
    assert places == sorted(places)  # as ECE falls with the steps
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)  # up on a screen
    blind = dataclasses.replace(
        run, moments=[dataclasses.replace(each, ece=math.nan) for each in run.moments]
    )
    assert "q8 over step" in emergence(blind)
