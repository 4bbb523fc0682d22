"""The page of a study: curves with their laws, what emerges, and every number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from raptide.evaluation.report.charts import Series, line_chart
from raptide.evaluation.report.markup import (
    NOTHING,
    Markup,
    bullets,
    cell,
    heads,
    join,
    pairs,
    row_head,
    small,
    table,
    tag,
)
from raptide.evaluation.report.page import document
from raptide.evaluation.report.words import count, interval, number
from raptide.scaling.laws import Cell, Curves, PowerLaw, grouped
from raptide.scaling.measuring import Point
from raptide.scaling.table import row_of
from raptide.storage import Storage

PAGE = "study.html"
CURVE_POINTS = 30

HOW = (
    "All models and n-grams are asked for the same residues of the same held-out proteins: 15% of "
    "them, chosen by a hash. ECE is exp of the mean -log p (Rives et al., PNAS 2021), here of the "
    "residues that a transformer is shown as <mask>; an LSTM and n-grams are blind to them anyway. "
    "Laws are fitted to the cross entropy, L(x) = a x^-b, by least squares in logarithms; their "
    "intervals come of a bootstrap over proteins, to which is added what seeds do, where there are "
    "several; bars and bands are 95% intervals. Compute is 3 forward passes of all tokens seen, "
    "each crop taken for a full one."
)


def write_page(
    folder: Path,
    name: str,
    points: Sequence[Point],
    curves: Curves,
    facts: Mapping[str, str],
    missing: Sequence[str] = (),
) -> Path:
    """Write the page, whole or not at all.

    Args:
        facts: command, versions and the like, by name.
        missing: names of runs that did not come to their end.
    """
    data = render(name, points, curves, facts, missing).encode("utf-8", "backslashreplace")
    Storage.of(folder).write(PAGE, lambda stream: stream.write(data))
    return folder / PAGE


def render(
    name: str,
    points: Sequence[Point],
    curves: Curves,
    facts: Mapping[str, str],
    missing: Sequence[str] = (),
) -> str:
    """The page as HTML."""
    sections = [
        ("curves", "How the ECE falls", _curves(curves, points)),
        ("emergence", "What emerges with it", _figures(_emergence(points))),
        ("noise", "What seeds do", _noise(curves)),
        ("table", "Every model and n-gram", _table(points)),
        ("how", "How this was measured", join([tag("p", HOW), pairs(facts)])),
    ]
    shown = [part for part in sections if part[2]]
    body = [tag("section", tag("h2", title), made, id=key) for key, title, made in shown]
    grams = sum(point.kind == "n-gram" for point in points)
    lead = f"{count(len(points) - grams, 'trained model')} and {count(grams, 'n-gram')}."
    lacks = f"Without {', '.join(missing)}, which did not come to an end." if missing else ""
    header = join(
        [
            tag("h1", f"Scaling study: {name}"),
            tag("p", lead),
            tag("p", lacks, class_="bad") if lacks else NOTHING,
        ]
    )
    return document(f"Scaling study: {name}", header, [part[:2] for part in shown], body)


def _curves(curves: Curves, points: Sequence[Point]) -> Markup:
    """Over parameters, data and compute; LSTMs are lines of their own."""
    found, fitted = curves.cells, curves.laws
    if not found:
        return NOTHING
    by_data = grouped(found, lambda each: f"{each.data}{_suffix(each.kind)}")
    by_model = grouped(found, lambda each: each.model)
    by_kind = grouped(found, lambda each: each.kind)
    grams = _best_grams(points)
    charts = [
        _chart("ECE by parameters", "parameters", by_data, fitted),
        _chart("ECE by data", "data", by_model, fitted, grams),
        _chart("ECE by compute", "compute", by_kind, fitted),
    ]
    gains = bullets([trend.sentence() for trend in curves.trends])
    sentences = bullets([f"{name}: {law.sentence()}" for name, law in fitted.items()])
    return join([_figures(charts), gains, sentences])


def _figures(charts: Iterable[Markup]) -> Markup:
    drawn = list(charts)
    return tag("div", *drawn, class_="figures") if drawn else NOTHING


def _suffix(kind: str) -> str:
    return ", LSTM" if kind == "lstm" else ""


AXES = {
    "parameters": ("parameters", "parameters"),
    "data": ("tokens of the data", "epoch_tokens"),
    "compute": ("operations of the training", "flops"),
}
"""What is drawn over, by the first word of its laws: in words, and as a fact of a point."""


def _chart(
    title: str,
    over: str,
    groups: Mapping[str, Sequence[Cell]],
    fitted: Mapping[str, PowerLaw],
    more: Sequence[Series] = (),
) -> Markup:
    """Points of each group in its colour, and the law through them, or through the best, dashed."""
    label, by = AXES[over]
    series = []
    for style, (name, some) in enumerate(groups.items()):
        ordered = sorted(some, key=lambda each: each.x[by])
        x = [each.x[by] for each in ordered]
        law = fitted.get(f"{over} {name}")
        ece = [math.exp(each.nats) for each in ordered]
        ends = [each.ece_interval for each in ordered]
        line = law is None and over != "compute"
        series.append(Series(name, x, ece, style, joined=line, spread=ends))
        if law is not None:
            series.append(_law(f"{name}, x^{-law.exponent:.4f}", law, x, style))
    if over in fitted:
        law = fitted[over]
        x = [each.x[by] for some in groups.values() for each in some]
        series.append(_law(f"best, x^{-law.exponent:.4f}", law, x, len(groups)))
    return line_chart(title, label, "ECE on <mask>", [*series, *more], log_x=True)


def _law(name: str, law: PowerLaw, x: Sequence[float], style: int) -> Series:
    low, high = math.log(min(x)), math.log(max(x))
    steps = [math.exp(low + (high - low) * i / CURVE_POINTS) for i in range(CURVE_POINTS + 1)]
    ece = [law.ece(each) for each in steps]
    band = [law.ece_interval(each) for each in steps]
    return Series(name, steps, ece, style, baseline=True, marked=False, spread=band)


def _best_grams(points: Sequence[Point]) -> list[Series]:
    """The best n-gram of each of the data, as one line."""
    best: dict[float, float] = {}
    for point in points:
        tokens, ece = point.facts.get("epoch_tokens"), point.ece_masked
        if point.kind == "n-gram" and tokens and ece is not None:
            best[tokens] = min(best.get(tokens, math.inf), ece.value)
    ordered = sorted(best)
    return [Series("best n-gram", ordered, [best[x] for x in ordered], 7)] if best else []


def _emergence(points: Sequence[Point]) -> Iterator[Markup]:
    """Each main metric of the benchmark against the ECE, better models further right."""
    names = dict.fromkeys(name for point in points for name in point.bench)
    for name in names:
        groups: dict[str, list[tuple[float, float]]] = {}
        for point in points:
            if name in point.bench and point.ece_masked is not None:
                pair = (point.ece_masked.value, point.bench[name].value)
                group = f"{point.facts['data']}{_suffix(point.kind)}"
                groups.setdefault(group, []).append(pair)
        series = [
            Series(group, [x for x, _ in pairs], [y for _, y in pairs], style, joined=False)
            for style, (group, pairs) in enumerate(groups.items())
        ]
        yield line_chart(f"{name} against ECE", "ECE on <mask>", name, series, reverse_x=True)


def _noise(curves: Curves) -> Markup:
    repeated = [each for each in curves.cells if len(each.seeds) > 1]
    if not repeated:
        return NOTHING
    lines = [
        f"{each.model} on {each.data}: ECE "
        f"{', '.join(number(math.exp(nats)) for nats in each.seeds)} with "
        f"{len(each.seeds)} seeds of weights and order."
        for each in repeated
    ]
    rule = (
        f"One seed's standard deviation is {curves.deviation:.4f} nats, "
        f"{100 * curves.deviation:.2f}% of an ECE; "
        "a difference of less than twice that counts as none."
    )
    return join([bullets(lines), tag("p", rule)])


def _table(points: Sequence[Point]) -> Markup:
    metrics = list(dict.fromkeys(name for point in points for name in point.bench))
    head = heads("name", "parameters", "epochs", "tokens", "ECE on <mask>", "ECE", *metrics)
    body = []
    for point in sorted(points, key=lambda each: each.ece_masked.value if each.ece_masked else 99):
        row = row_of(point)
        numbers = [_measured(row, name) for name in ("ece_masked", "ece", *metrics)]
        whole = [cell(number(row[name], 0)) for name in ("parameters", "tokens")]
        body.append(
            [row_head(row["name"]), whole[0], cell(number(row["epochs"], 1)), whole[1], *numbers]
        )
    return table("All subjects, the best first, with 95% intervals", [head], body)


def _measured(row: Mapping[str, float], name: str) -> Markup:
    value = {"value": row.get(name), "low": row.get(f"{name}_low"), "high": row.get(f"{name}_high")}
    return cell(number(value["value"]), small(interval(value)))
