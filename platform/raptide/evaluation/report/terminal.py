"""The end of an evaluation in the terminal: a short table, verdicts, and what to do next."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from raptide.evaluation.report.content import Comparison, ReportContent, Row, distinguish, place_of
from raptide.evaluation.report.words import (
    MainLine,
    interval,
    main_lines,
    number,
    standing,
    within_noise,
)

COLUMNS = 100
WHAT, WHO, VALUE, BETWEEN = 38, 30, 9, 17
"""Widths; with two spaces between them, `COLUMNS`."""

MOST_LINES = 20
"""Of comparisons; all stand in the report."""


def describe(content: ReportContent, next_steps: Sequence[str] = ()) -> str:
    """Main metrics of models and the best baseline, and in words what is not beaten.

    Args:
        next_steps: lines for the end, such as where the report lies.
    """
    content = distinguish(content)
    lines = main_lines(content)
    table = [_columns("task, data set, metric", "model", "value", "95% interval")]
    for line in lines:
        table += _rows_of(line)
    parts = [table, _standings(lines), _comparisons(content), _controls(content)]
    return "\n\n".join("\n".join(part) for part in [*parts, list(next_steps)] if part)


def _rows_of(line: MainLine) -> list[str]:
    arrow = "" if line.higher_is_better else " (lower)"
    what = " ".join(line.place) + arrow
    shown: list[tuple[str, Row]] = list(line.models.items())
    best = line.best_baseline()
    if best is not None:
        shown.append((f"best baseline: {best['model']}", best))
    return [
        _columns(what if i == 0 else "", name, number(row["value"]), interval(row))
        for i, (name, row) in enumerate(shown)
    ]


def _columns(what: str, who: str, value: str, between: str) -> str:
    left = f"{_short(what, WHAT):<{WHAT}}  {_short(who, WHO):<{WHO}}"
    return f"{left}  {value:>{VALUE}}  {between:<{BETWEEN}}".rstrip()


def _short(text: str, width: int) -> str:
    """A text in a width, its middle left out where it is longer; what breaks lines is a space."""
    text = "".join(c if c.isprintable() else " " for c in text)
    if len(text) <= width:
        return text
    return text[: width // 2] + "…" + text[len(text) - (width - width // 2 - 1) :]


def _standings(lines: Sequence[MainLine]) -> list[str]:
    """What is not beaten, a line each, and in one line what is."""
    asked = [(line, model) for line in lines for model in line.models if standing(line, model)]
    lost = [(line, model) for line, model in asked if line.unbeaten(model)]
    won = len(asked) - len(lost)
    counted = f"Every baseline is beaten in {won} of {len(asked)} main metrics of models."
    said = [
        part
        for line, model in lost
        for part in _wrapped(f"{' '.join(line.place)}: {model} {standing(line, model)}")
    ]
    return [counted, *said] if asked else []


def _comparisons(content: ReportContent) -> list[str]:
    """Differences of models in main metrics, by pair."""
    main = {place_of(row) for row in content.rows if row["role"] == "main"}
    models = {model.name for model in content.models}
    said = [
        each for each in content.comparisons if each.place in main and {each.a, each.b} <= models
    ]
    if not said:
        return []
    lines = [_compared("difference", "verdict on the first", "", "95% interval", "noise floor")]
    pair = "", ""
    pairs = list(dict.fromkeys((each.a, each.b) for each in said))
    said.sort(key=lambda each: pairs.index((each.a, each.b)))
    for each in said[:MOST_LINES]:
        if (each.a, each.b) != pair:
            pair = each.a, each.b
            lines += _wrapped(f"{each.a} against {each.b}:")
        lines.append(_comparison(each, content.noise_of(each)))
    if len(said) > MOST_LINES:
        lines.append(f"{len(said) - MOST_LINES} more comparisons stand in the report.")
    return lines


def _comparison(each: Comparison, noise: float | None) -> str:
    between = interval({"value": each.difference, "low": each.low, "high": each.high})
    floor = "" if noise is None else number(noise)
    words = f"{each.verdict}, within noise" if within_noise(each, noise) else each.verdict
    what = f"  {' '.join(each.place)} {each.layers}".rstrip()
    return _compared(what, words, number(each.difference), between, floor)


def _compared(what: str, verdict: str, difference: str, between: str, floor: str) -> str:
    left = f"{_short(what, WHAT - 2):<{WHAT - 2}}  {verdict:<22}"
    return f"{left}{difference:>8}  {between:<18}{floor:>12}".rstrip()


def _controls(content: ReportContent) -> list[str]:
    failed = [each for each in content.controls if not each.at_chance]
    lines = [
        line
        for each in failed
        for line in _wrapped(f"Control not at chance: {each.task}, {each.subject}: {each.sentence}")
    ]
    fine = len(content.controls) - len(failed)
    return (
        [*lines, f"{fine} of {len(content.controls)} controls came out at chance."]
        if (content.controls)
        else []
    )


def _wrapped(text: str) -> list[str]:
    printable = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.wrap(printable, COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
