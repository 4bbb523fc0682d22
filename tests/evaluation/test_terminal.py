"""The short table at the end of an evaluation."""

import dataclasses

from evaluated import OTHER, TRAINED, number_row, small_content

from raptide.evaluation.report.terminal import COLUMNS, MOST_LINES, describe


def test_models_stand_above_the_best_baseline_with_intervals():
    lines = describe(small_content()).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("structure test q8"))
    block = [
        line.split(maxsplit=3 if i == 0 else 0) for i, line in enumerate(lines[first : first + 3])
    ]
    assert block[0][3].split()[:2] == [TRAINED, "0.520"]
    assert lines[first].endswith("0.510 to 0.530")
    assert lines[first + 1].split() == [OTHER, "0.500", "0.490", "to", "0.510"]
    assert lines[first + 2].split()[:4] == ["best", "baseline:", "one-hot", "0.510"]


def test_what_is_not_beaten_and_what_differs_is_said():
    text = describe(small_content())
    assert "Every baseline is beaten in 3 of 5 main metrics of models." in text
    assert f"structure test q8: {TRAINED} does not beat one-hot" in text
    assert f"{TRAINED} against {OTHER}:" in text
    assert "better, within noise" in text
    assert f"{TRAINED} against one-hot" not in text
    assert f"Control not at chance: structure, {TRAINED}: q8 is 0.4 on shuffled labels." in text
    assert "1 of 2 controls came out at chance." in text


def test_next_steps_come_last():
    assert describe(small_content(), ["Report: here"]).endswith("\n\nReport: here")


def test_no_line_is_wider_than_a_terminal_whatever_names_are():
    long = "runs/" + "long name \n\x1b[31m" * 30
    content = small_content(long)
    rows = [row | {"dataset": "d" * 200} for row in content.rows]
    text = describe(dataclasses.replace(content, rows=rows))
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert "\x1b" not in text
    assert "…" in text


def test_lower_is_said_where_it_is_better_and_no_number_is_a_dash():
    content = small_content()
    nothing = number_row(TRAINED, "perplexity", "ece", float("nan"), higher_is_better=False)
    text = describe(dataclasses.replace(content, rows=[nothing]))
    (line,) = [line for line in text.splitlines() if line.startswith("perplexity")]
    assert "(lower)" in line
    assert line.endswith("–")
    assert "Every baseline" not in text


def test_many_comparisons_are_counted():
    content = small_content()
    many = dataclasses.replace(content, comparisons=content.comparisons[:1] * (MOST_LINES + 7))
    assert "7 more comparisons stand in the report." in describe(many)
