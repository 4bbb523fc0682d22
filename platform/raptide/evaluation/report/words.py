"""Numbers and verdicts in words, the same on the page and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raptide.evaluation.report.content import Comparison, Place, ReportContent, Row, place_of

DASH = "–"
"""For what is no number."""


def has(value: Any) -> bool:
    """Whether there is a number at all."""
    return value is not None and not math.isnan(value)


def decimals(value: float) -> int:
    """So many that about three digits say something."""
    return 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1


def number(value: Any, places: int | None = None) -> str:
    if not has(value):
        return DASH
    return f"{value:,.{decimals(value) if places is None else places}f}"


def interval(row: Any) -> str:
    """`0.398 to 0.426` of a row, or nothing where there is no interval."""
    if not (has(row["low"]) and has(row["high"])):
        return ""
    places = decimals(row["value"]) if has(row["value"]) else 3
    return f"{number(row['low'], places)} to {number(row['high'], places)}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def count(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def direction(higher_is_better: bool) -> str:
    return "higher is better" if higher_is_better else "lower is better"


@dataclass(frozen=True)
class MainLine:
    """A main metric of a task on a data set: all subjects side by side."""

    place: Place
    higher_is_better: bool
    models: dict[str, Row]
    baselines: dict[str, Row]

    def best_baseline(self) -> Row | None:
        rows = [row for row in self.baselines.values() if has(row["value"])]
        sign = 1 if self.higher_is_better else -1
        return max(rows, key=lambda row: sign * row["value"], default=None)

    def unbeaten(self, model: str) -> list[Row]:
        """Baselines whose interval the model's does not lie above, the best first.

        A baseline without an interval counts by its value, a model without one beats nothing.
        """
        sign = 1 if self.higher_is_better else -1
        edges = ("low", "high") if self.higher_is_better else ("high", "low")
        edge = self.models[model][edges[0]]

        def beaten(row: Row) -> bool:
            limit = row[edges[1]] if has(row[edges[1]]) else row["value"]
            return has(edge) and sign * edge > sign * limit

        rows = [row for row in self.baselines.values() if has(row["value"]) and not beaten(row)]
        return sorted(rows, key=lambda row: -sign * row["value"])


def main_lines(content: ReportContent) -> list[MainLine]:
    """One for each task and data set, in the order of the tasks."""
    lines: dict[Place, MainLine] = {}
    for row in content.rows:
        if row["role"] != "main":
            continue
        line = lines.setdefault(
            place_of(row), MainLine(place_of(row), row["higher_is_better"], {}, {})
        )
        (line.baselines if row["baseline"] else line.models)[row["model"]] = row
    order = [task.name for task in content.tasks]
    return sorted(
        lines.values(), key=lambda line: order.index(line.place[0]) if line.place[0] in order else 0
    )


def standing(line: MainLine, model: str) -> str:
    """In a few words how a model stands to the baselines; nothing without baselines or a value."""
    if not line.baselines or not has(line.models[model]["value"]):
        return ""
    unbeaten = [row["model"] for row in line.unbeaten(model)]
    return f"does not beat {listed(unbeaten)}" if unbeaten else "beats every baseline"


def plain_statement(content: ReportContent, line: MainLine, model: str) -> str:
    """The same as a sentence with its numbers."""
    row = line.models[model]
    unbeaten = line.unbeaten(model)
    where = f"{line.place[0]} ({line.place[1]}, {line.place[2]})"
    if not line.baselines or not has(row["value"]):
        return ""
    own = with_interval(row)
    if not unbeaten:
        best = line.best_baseline()
        against = f", the best being {best['model']} at {with_interval(best)}" if best else ""
        return f"{where}: {model} at {own} beats every baseline{against}."
    others = listed([f"{each['model']} at {with_interval(each)}" for each in unbeaten])
    text = f"{where}: {model} at {own} does not beat {others}."
    better = [
        each["model"]
        for each in unbeaten
        if _paired_verdict(content.comparisons, line.place, model, each["model"]) == "better"
    ]
    if better:
        text += f" Drawn in pairs, it is better than {listed(better)}."
    return text


def with_interval(row: Row) -> str:
    between = interval(row)
    return number(row["value"]) + (f" ({between})" if between else "")


OPPOSITE = {"better": "worse", "worse": "better"}


def _paired_verdict(comparisons: list[Comparison], place: Place, a: str, b: str) -> str:
    for each in comparisons:
        if each.place == place and each.paired:
            if (each.a, each.b) == (a, b):
                return each.verdict
            if (each.a, each.b) == (b, a):
                return OPPOSITE.get(each.verdict, each.verdict)
    return ""


def within_noise(comparison: Comparison, noise: float | None) -> bool:
    """Whether a measured difference is one that seeds alone make."""
    measured = comparison.verdict in OPPOSITE and has(comparison.difference)
    return measured and has(noise) and abs(comparison.difference) <= (noise or 0.0)


def verdict(comparison: Comparison, noise: float | None) -> str:
    """The verdict, with what seeds alone do."""
    if comparison.verdict not in OPPOSITE or not has(noise):
        return comparison.verdict
    if within_noise(comparison, noise):
        return f"{comparison.verdict}, but seeds alone differ as much"
    return f"{comparison.verdict}, and more than seeds alone"
