"""Lines, bars and points as SVG. Colours are the page's variables, so both themes have their own.

What colours tell apart, dashes, marks, hatching or names tell apart too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from raptide.evaluation.report.axes import Axis, axis_over, frame, text
from raptide.evaluation.report.markup import (
    NOTHING,
    Markup,
    cell,
    folded,
    heads,
    join,
    row_head,
    table,
    tag,
)
from raptide.evaluation.report.words import count, number
from raptide.evaluation.results import Points

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 44
SLANTED = 76
"""Room for long names below bars."""

COLOURS = 8
"""How many the page has, `--c0` to `--c7`."""

MARKS = (
    "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "m-2.7-2.7h5.4v5.4h-5.4z",
    "m-3.4 2.6h6.8l-3.4-6z",
    "m0-3.8l3.8 3.8-3.8 3.8-3.8-3.8z",
    "m-3.4-2.6h6.8l-3.4 6z",
)
"""Circle, square, triangle, diamond, triangle on its tip; around the point before them."""

DASHES = ("6 3", "2 3", "9 3 2 3", "1 2")
MOST_POINTS = 1500
MOST_NAMES = 40
LONGEST_NAME = 20


@dataclass(frozen=True)
class Series:
    """One line, or the bars of one colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    """NaN where there is nothing."""
    style: int = 0
    """Colour and mark; of a subject the same in the whole report."""
    baseline: bool = False
    """Dashed lines, hatched bars."""
    joined: bool = True
    """Whether a line goes through the points."""
    marked: bool = True
    """Whether they have marks."""
    spread: Sequence[tuple[float, float]] = ()
    """Interval of each y: a bar through a mark, or a band around a line without."""

    @property
    def colour(self) -> str:
        return f"var(--c{self.style % COLOURS})"

    @property
    def dash(self) -> str | None:
        return DASHES[self.style % len(DASHES)] if self.baseline else None

    @property
    def mark(self) -> str:
        return MARKS[self.style % len(MARKS)]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    reverse_x: bool = False,
    log_x: bool = False,
    note: str = "",
) -> Markup:
    """Lines over one axis, with a legend and the numbers as a table."""
    ends = (LEFT, WIDTH - RIGHT)
    x = axis_over([v for s in series for v in s.x], *(ends[::-1] if reverse_x else ends), log=log_x)
    heights = [v for s in series for v in (*s.y, *(end for ends in s.spread for end in ends))]
    y = axis_over(heights, HEIGHT - BOTTOM, TOP)
    lines = join([*(_spread(s, x, y) for s in series), *(_line(s, x, y) for s in series)])
    label = f"{title}: {y_label} over {x_label}, lines of {', '.join(s.name for s in series)}"
    drawing = svg(label, frame(x, y, x_label, y_label), lines)
    below = (legend(series, bars=False), numbers(title, x_label, series))
    return figure(title, drawing, *below, note=note)


def _line(series: Series, x: Axis, y: Axis) -> Markup:
    path, marks, pen = "", "", "M"
    for a, b in zip(series.x, series.y, strict=True):
        if not (math.isfinite(a) and math.isfinite(b)):
            pen = "M"  # a gap
            continue
        path += f"{pen}{x.at(a):.1f} {y.at(b):.1f}"
        marks += f"M{x.at(a):.1f} {y.at(b):.1f}{series.mark}"
        pen = "L"
    if series.joined:
        stroke = {"stroke": series.colour, "stroke_dasharray": series.dash}
        line = tag("path", d=path or "M0 0", class_="line", **stroke)
    else:
        line = NOTHING
    dots = (
        tag("path", d=marks or "M0 0", fill=series.colour)
        if series.marked and len(series.x) <= 40
        else NOTHING
    )
    return join([line, dots])


def _spread(series: Series, x: Axis, y: Axis) -> Markup:
    if not series.spread:
        return NOTHING
    places = [x.at(value) for value in series.x]
    low, high = ([y.at(ends[i]) for ends in series.spread] for i in (0, 1))
    if series.marked:
        bars = zip(places, low, high, strict=True)
        path = "".join(f"M{at:.1f} {a:.1f}V{b:.1f}" for at, a, b in bars)
        return tag("path", d=path, class_="line", stroke=series.colour, stroke_opacity="0.5")
    around = [*zip(places, low, strict=True), *reversed(list(zip(places, high, strict=True)))]
    path = "M" + "L".join(f"{at:.1f} {height:.1f}" for at, height in around) + "z"
    return tag("path", d=path, fill=series.colour, fill_opacity="0.12")


def bar_chart(
    title: str, x_label: str, y_label: str, names: Sequence[str], series: Sequence[Series]
) -> Markup:
    """Bars in groups; `Series.x` is not looked at. Wider than the others where there are many."""
    group = max(len(series) * 7 + 8, 26.0)
    right = max(WIDTH - RIGHT, LEFT + group * len(names))
    slanted = any(len(name) * 7 > (right - LEFT) / len(names) for name in names)
    bottom, height = HEIGHT - BOTTOM, HEIGHT + (SLANTED if slanted else 0)
    y = axis_over([v for s in series for v in s.y], bottom, TOP, zero=True)
    x = Axis(0, len(names), LEFT, right)
    bars = [
        _bar(each, x, y, i, j, len(series))
        for i, each in enumerate(series)
        for j in range(len(names))
    ]
    labels = [_bar_name(name, x.at(j + 0.5), bottom, slanted) for j, name in enumerate(names)]
    label = f"{title}: {y_label} by {x_label}, bars of {', '.join(s.name for s in series)}"
    foot = text((LEFT + right) / 2, height - 6, x_label, "middle")
    drawing = svg(
        label,
        frame(x, y, x_label, y_label, x_ticks=False),
        *bars,
        *labels,
        foot,
        width=right + RIGHT,
        height=height,
    )
    return figure(title, drawing, legend(series, bars=True), numbers(title, x_label, series, names))


def _bar(series: Series, x: Axis, y: Axis, index: int, place: int, of: int) -> Markup:
    value = series.y[place]
    if not math.isfinite(value):
        return NOTHING
    width = (x.at(1) - x.at(0)) * 0.84 / of
    left = x.at(place) + (x.at(1) - x.at(0)) * 0.08 + index * width
    top, bottom = sorted((y.at(value), y.at(min(max(0.0, y.low), y.high))))
    return tag(
        "rect",
        x=f"{left:.1f}",
        y=f"{top:.1f}",
        width=f"{max(width - 1, 1):.1f}",
        height=f"{max(bottom - top, 0.5):.1f}",
        fill=series.colour,
        stroke=series.colour,
        fill_opacity="0.25" if series.baseline else None,
        stroke_dasharray="3 2" if series.baseline else None,
    )


def _bar_name(name: str, x: float, bottom: float, slanted: bool) -> Markup:
    short = shortened(name)
    if not slanted:
        return text(x, bottom + 17, short, "middle")
    return text(x, bottom + 14, short[:14], "end", f"rotate(-55 {x:.1f} {bottom + 14:.1f})")


def scatter(points: Points) -> Markup:
    """Points in groups; beyond some, every so-manieth is drawn, and small groups become one."""
    stride = max(1, math.ceil(len(points.xy) / MOST_POINTS))
    chosen = range(0, len(points.xy), stride)
    sizes = Counter(points.groups)
    by_size = sorted(sizes, key=lambda name: (-sizes[name], name))
    shown = by_size[: COLOURS - 1] if len(by_size) > COLOURS else by_size
    series = [
        Series(name, *_columns(points, [i for i in chosen if points.groups[i] == name]), style=s)
        for s, name in enumerate(shown)
    ]
    rest = [i for i in chosen if points.groups[i] not in set(shown)]
    x = axis_over([float(v) for v in points.xy[:, 0]], 16, WIDTH - RIGHT, margin=0.07)
    y = axis_over([float(v) for v in points.xy[:, 1]], HEIGHT - 10, TOP, margin=0.07)
    others = Series(count(len(sizes) - len(shown), "smaller group"), *_columns(points, rest), 7)
    layers = ([others] if rest else []) + series
    dots = [_dots(each, x, y, faint=each is others) for each in layers]
    box = tag("rect", x=16, y=TOP, width=WIDTH - RIGHT - 16, height=HEIGHT - TOP - 10, class_="box")
    label = (
        f"{points.title}: {count(len(points.xy), 'point')} in groups {', '.join(shown[:COLOURS])}"
    )
    few = f"{len(chosen):,} of {len(points.xy):,} points are drawn." if stride > 1 else ""
    names = _names(points, x, y)
    drawing = svg(label, box, *dots, names)
    return figure(points.title, drawing, legend([*series, *([others] if rest else [])]), note=few)


def _columns(points: Points, chosen: Sequence[int]) -> tuple[list[float], list[float]]:
    return [float(points.xy[i, 0]) for i in chosen], [float(points.xy[i, 1]) for i in chosen]


def _dots(series: Series, x: Axis, y: Axis, *, faint: bool) -> Markup:
    path = "".join(
        f"M{x.at(a):.1f} {y.at(b):.1f}{series.mark}"
        for a, b in zip(series.x, series.y, strict=True)
        if math.isfinite(a) and math.isfinite(b)
    )
    return tag(
        "path", d=path or "M0 0", fill=series.colour, fill_opacity="0.3" if faint else "0.85"
    )


def _names(points: Points, x: Axis, y: Axis) -> Markup:
    if points.labels is None or len(points.labels) > MOST_NAMES:
        return NOTHING
    return join(
        text(x.at(float(a)) + 5, y.at(float(b)) - 4, shortened(name))
        for (a, b), name in zip(points.xy, points.labels, strict=True)
        if math.isfinite(a) and math.isfinite(b)
    )


def svg(label: str, *children: object, width: float = WIDTH, height: float = HEIGHT) -> Markup:
    """A drawing; one wider than the usual keeps its size and scrolls."""
    wide = width > WIDTH
    return tag(
        "div",
        tag(
            "svg",
            *children,
            viewBox=f"0 0 {width:.0f} {height:.0f}",
            role="img",
            aria_label=label,
            style=f"{'' if wide else 'max-'}width:{width:.0f}px",
        ),
        class_="drawing wide" if wide else "drawing",
        **({"tabindex": "0", "role": "region", "aria_label": label} if wide else {}),
    )


def figure(title: str, drawing: Markup, *beneath: Markup, note: str = "") -> Markup:
    words = tag("p", note, class_="small") if note else NOTHING
    return tag("figure", tag("figcaption", title), drawing, *beneath, words)


def legend(series: Sequence[Series], bars: bool | None = None) -> Markup:
    """Names beside what they look like: `bars`, lines, or (None) marks alone."""
    items = []
    box, class_ = ("8 0 12 12", "swatch mark") if bars is None else ("0 0 28 12", "swatch")
    for each in series:
        if bars:
            look = _bar_swatch(each)
        else:
            line = tag(
                "path", d="M1 6H27", class_="line", stroke=each.colour, stroke_dasharray=each.dash
            )
            mark = tag("path", d=f"M14 6{each.mark}", fill=each.colour)
            look = join([line if bars is not None else NOTHING, mark])
        swatch = tag("svg", look, viewBox=box, aria_hidden="true", class_=class_)
        items.append(tag("li", swatch, each.name))
    return tag("ul", *items, class_="legend")


def _bar_swatch(series: Series) -> Markup:
    return tag(
        "rect",
        x=8,
        y=1,
        width=12,
        height=10,
        fill=series.colour,
        stroke=series.colour,
        fill_opacity="0.25" if series.baseline else None,
        stroke_dasharray="3 2" if series.baseline else None,
    )


def numbers(
    title: str, x_label: str, series: Sequence[Series], names: Sequence[str] | None = None
) -> Markup:
    """What a chart shows, as a table that is folded away."""
    longest = max(series, key=lambda each: len(each.x), default=None)
    if longest is None or (names is None and any(list(s.x) != list(longest.x) for s in series)):
        return NOTHING
    places = names if names is not None else [f"{v:,.6g}" for v in longest.x]
    body = [
        [row_head(place), *(cell(number(each.y[i])) for each in series)]
        for i, place in enumerate(places[:MOST_POINTS])
    ]
    head = heads(x_label, *(each.name for each in series))
    return folded("The numbers", table(f"{title}, as numbers", [head], body))


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
