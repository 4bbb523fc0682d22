"""Axes of charts: round ticks, and where a value lies on the picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from raptide.evaluation.report.markup import Markup, join, tag

MOST_TICKS = 6


@dataclass(frozen=True)
class Axis:
    """A range of values on a stretch of pixels."""

    low: float
    high: float
    start: float
    """Where `low` lies; past `end` for an axis that runs backwards."""
    end: float
    log: bool = False
    """Whether `low` and `high` are powers of ten."""

    def at(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            return self._log_ticks()
        step = round_step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        """1, 2 and 5 of each power, or powers alone, so many that they have room."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for digits in ((1, 2, 5), (1,)):
            found = [m * 10.0**power for power in powers for m in digits]
            shown = [v for v in found if self.low <= math.log10(v) <= self.high]
            if len(shown) <= MOST_TICKS:
                return shown
        return shown[:: math.ceil(len(shown) / MOST_TICKS)]


def round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that a span has at most `MOST_TICKS` of them."""
    power = 10.0 ** math.floor(math.log10(span / MOST_TICKS))
    return next(power * m for m in (1, 2, 5, 10, 20) if span / (power * m) <= MOST_TICKS)


def axis_over(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    zero: bool = False,
    margin: float = 0.04,
    log: bool = False,
) -> Axis:
    """An axis on which all finite values lie; with `zero`, that lies on it as well; with `log`,
    all that are above 0."""
    finite = [v for v in values if math.isfinite(v)] + ([0.0] if zero else [])
    if log:
        finite = [math.log10(v) for v in finite if v > 0]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    room = (high - low) * margin
    below = 0.0 if zero and low >= 0 else room
    return Axis(low - below, high + (0.0 if zero and high <= 0 else room), start, end, log)


def tick_text(value: float) -> str:
    """As short as it can be."""
    if abs(value) >= 1e6:
        return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.6g}" if abs(value) >= 1e-9 else "0"


def frame(x: Axis, y: Axis, x_label: str, y_label: str, *, x_ticks: bool = True) -> Markup:
    """Grid, ticks and labels around the field of a chart."""
    left, right = sorted((x.start, x.end))
    bottom, top = max(y.start, y.end), min(y.start, y.end)
    parts: list[Markup] = []
    for value in y.ticks():
        at = f"{y.at(value):.1f}"
        parts += [
            tag("path", d=f"M{left:.1f} {at}H{right:.1f}", class_="grid"),
            text(left - 6, y.at(value) + 4, tick_text(value), "end"),
        ]
    for value in x.ticks() if x_ticks else ():
        parts += [
            tag("path", d=f"M{x.at(value):.1f} {bottom:.1f}v4", class_="axis"),
            text(x.at(value), bottom + 17, tick_text(value), "middle"),
        ]
    middle = (top + bottom) / 2
    return join(
        [
            *parts,
            tag("path", d=f"M{left:.1f} {bottom:.1f}H{right:.1f}", class_="axis"),
            text((left + right) / 2, bottom + 34, x_label, "middle") if x_ticks else "",
            text(12, middle, y_label, "middle", transform=f"rotate(-90 12 {middle:.1f})"),
        ]
    )


def text(
    x: float, y: float, words: str, anchor: str = "start", transform: str | None = None
) -> Markup:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, transform=transform)
