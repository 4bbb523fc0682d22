"""Matrices as pictures: a PNG with a palette inside an SVG that names rows and columns."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from raptide.evaluation.report.axes import Axis, text, tick_text
from raptide.evaluation.report.charts import figure, shortened, svg
from raptide.evaluation.report.markup import Markup, join, tag
from raptide.evaluation.report.words import number
from raptide.evaluation.results import Heatmap

LEVELS = 64
"""Shades of a picture; level 64 is what is drawn as nothing."""

MOST_CELLS = 160_000
"""Larger matrices are drawn by blocks."""

SHORT_SIDE = 400
"""A side up to this is never cut to blocks."""

SIDE = 300
SMALL = 200
NAME_PX = 13
"""Room for a name; cells of a matrix with fewer rows are larger, up to `SMALL` together."""

MOST_NAMES = 60
MARGIN = 34
LONGEST_SIDE = 1800
GRADIENT = 8


def heatmap(picture: Heatmap) -> Markup:
    """A matrix, with its scale below; with a truth, that fills the lower triangle."""
    values = np.asarray(picture.values, np.float32)
    levels = to_levels(values, picture.diverging)
    if picture.truth is not None:
        truth = to_levels(np.asarray(picture.truth, np.float32), picture.diverging)
        levels = np.where(np.tril(np.ones(levels.shape, bool), k=-1), truth, levels)
    rows, columns = values.shape
    height = _side(rows, picture.row_names, columns)
    width = _side(columns, picture.column_names, rows)
    left = MARGIN if picture.row_names is None else _room(picture.row_names)
    foot = 22 if picture.column_names is None else _room(picture.column_names)
    image = tag(
        "image",
        href=data_uri(png(levels, palette(picture.diverging))),
        x=f"{left:.0f}",
        y="4",
        width=width,
        height=height,
        preserveAspectRatio="none",
        class_="pixels",
    )
    down = Axis(0, rows, 4, 4 + height)
    across = Axis(0, columns, left, left + width)
    drawing = svg(
        _label(picture, values),
        image,
        _row_names(picture.row_names, down, left),
        _column_names(picture.column_names, across, 4 + height),
        width=left + width + 14,
        height=height + 4 + foot,
    )
    told = "Above the diagonal what was found, below it the truth."
    told = told if picture.truth is not None else ""
    return figure(picture.title, drawing, _scale(picture, values), note=told)


def to_levels(values: np.ndarray, diverging: bool) -> np.ndarray:
    """The shade of each cell, [rows, columns] uint8; `LEVELS` where there is no number."""
    finite = np.isfinite(values)
    low, high = _range(values, diverging)
    with np.errstate(invalid="ignore"):
        scaled = (values.astype(np.float64) - low) / ((high - low) or 1.0)
    shades = np.clip(np.nan_to_num(scaled) * LEVELS, 0, LEVELS - 1).astype(np.uint8)
    return _blocks(np.where(finite, shades, LEVELS).astype(np.uint8), diverging)


def _range(values: np.ndarray, diverging: bool) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    if diverging:
        most = float(np.abs(finite).max())
        return -most, most
    return float(finite.min()), float(finite.max())


def _blocks(levels: np.ndarray, diverging: bool) -> np.ndarray:
    """At most `MOST_CELLS`: a block's highest shade, or its first where 0 is the middle."""
    long = [axis for axis in (0, 1) if levels.shape[axis] > SHORT_SIDE]
    by = math.ceil((levels.size / MOST_CELLS) ** (1 / len(long))) if long else 1
    for axis in long:
        if by > 1:
            starts = np.arange(0, levels.shape[axis], by)
            seen = np.where(levels == LEVELS, -1, levels.astype(np.int16))
            highest = np.maximum.reduceat(seen, starts, axis=axis)
            highest = np.where(highest < 0, LEVELS, highest).astype(np.uint8)
            levels = np.take(levels, starts, axis) if diverging else highest
    return levels


def palette(diverging: bool) -> np.ndarray:
    """RGB of each level, [LEVELS, 3] uint8; both can be told apart by the colour-blind."""
    from matplotlib import colormaps

    colours = colormaps["RdBu_r" if diverging else "viridis"](np.linspace(0, 1, LEVELS))
    return np.round(colours[:, :3] * 255).astype(np.uint8)


def png(levels: np.ndarray, colours: np.ndarray) -> bytes:
    """A PNG with a palette, whose last entry is transparent (ISO/IEC 15948)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows, columns = levels.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), levels], axis=1)  # no line filter
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", colours.tobytes() + bytes(3)),
            chunk(b"tRNS", b"\xff" * len(colours) + b"\x00"),
            chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            chunk(b"IEND", b""),
        ]
    )


def data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def _side(cells: int, names: Sequence[str] | None, other: int) -> int:
    """Pixels of a side: room for its names, else as a square or as long as it needs to be."""
    if names is not None and cells <= MOST_NAMES:
        return max(NAME_PX, min(24, SMALL // cells)) * cells
    return SIDE if cells <= other else min(max(SIDE, 3 * cells), LONGEST_SIDE)


def _room(names: Sequence[str]) -> int:
    if len(names) > MOST_NAMES:
        return MARGIN
    return 12 + 7 * max(len(shortened(name)) for name in names)


def _ticks(names: Sequence[str] | None, axis: Axis) -> list[tuple[float, str]]:
    """Places of some rows or columns of many, and their names, or numbers from 1."""
    ticks = [int(tick) for tick in axis.ticks() if tick >= 1]
    called = [tick_text(tick) if names is None else shortened(names[tick - 1]) for tick in ticks]
    return list(zip((axis.at(tick - 0.5) for tick in ticks), called, strict=True))


def _row_names(names: Sequence[str] | None, axis: Axis, left: float) -> Markup:
    if names is None or len(names) > MOST_NAMES:
        return join(text(left - 5, y + 4, name, "end") for y, name in _ticks(names, axis))
    return join(
        text(left - 5, axis.at(i + 0.5) + 4, shortened(name), "end") for i, name in enumerate(names)
    )


def _column_names(names: Sequence[str] | None, axis: Axis, bottom: float) -> Markup:
    if names is None or len(names) > MOST_NAMES:
        return join(text(x, bottom + 15, name, "middle") for x, name in _ticks(names, axis))
    if all(len(name) == 1 for name in names):
        return join(
            text(axis.at(i + 0.5), bottom + 14, name, "middle") for i, name in enumerate(names)
        )
    return join(
        text(
            axis.at(i + 0.5) + 4,
            bottom + 8,
            shortened(name),
            "end",
            f"rotate(-90 {axis.at(i + 0.5) + 4:.1f} {bottom + 8:.1f})",
        )
        for i, name in enumerate(names)
    )


def _label(picture: Heatmap, values: np.ndarray) -> str:
    low, high = _range(values, picture.diverging)
    beside = ", beside the truth" if picture.truth is not None else ""
    return (
        f"{picture.title}: {values.shape[0]} by {values.shape[1]} cells from {number(low)} to "
        f"{number(high)}{beside}"
    )


def _scale(picture: Heatmap, values: np.ndarray) -> Markup:
    low, high = _range(values, picture.diverging)
    stops = palette(picture.diverging)[np.linspace(0, LEVELS - 1, GRADIENT).astype(int)]
    blocks = [
        tag("rect", x=i * 12, y=0, width=12, height=10, fill="#" + bytes(stop).hex())
        for i, stop in enumerate(stops)
    ]
    bar = tag("svg", *blocks, viewBox=f"0 0 {12 * GRADIENT} 10", aria_hidden="true", class_="scale")
    return tag("p", f"{number(low)} ", bar, f" {number(high)}", class_="small")
