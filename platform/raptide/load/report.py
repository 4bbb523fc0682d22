"""Measured levels as figures, a table and a picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from raptide.load.levels import Measured

PERCENTILES = (50, 95, 99)

HEADER = f"{'load':>14}{'requests/s':>12}{'residues/s':>12}" + "".join(
    f"{f'p{p} ms':>10}" for p in PERCENTILES
)

COLOURS = {50: "#2a6f97", 95: "#e9a13b", 99: "#e07a5f"}


def summarise(measured: Measured) -> dict[str, Any]:
    """The figures of a level. Latency is that of the requests that were answered."""
    answered = [each for each in measured.outcomes if each.problem is None]
    seconds = measured.end_s - measured.begin_s
    latency_ms = np.array([1e3 * (each.end_s - each.due_s) for each in answered])
    # Of the open loop, some end after the window in which they were due.
    done = [each for each in answered if each.end_s < measured.end_s]
    return {
        "load": str(measured.level),
        "clients": measured.level.clients,
        "rate": measured.level.rate,
        "seconds": round(seconds, 3),
        "requests": len(measured.outcomes),
        "errors": dict(Counter(each.problem for each in measured.outcomes if each.problem)),
        "requests_per_s": round(len(done) / seconds, 3),
        "residues_per_s": round(sum(each.residues for each in done) / seconds, 1),
        "answer_mb": round(sum(each.answer_bytes for each in done) / 1e6, 3),
        "latency_ms": {
            f"p{p}": round(float(np.percentile(latency_ms, p)), 2) if len(answered) else None
            for p in PERCENTILES
        },
        "generator_cpu": round(measured.generator_cpu, 3),
    }


def table_line(level: dict[str, Any]) -> str:
    """A level under `HEADER`."""
    latency = "".join(
        f"{'-' if ms is None else format(ms, ',.1f'):>10}" for ms in level["latency_ms"].values()
    )
    errors = ", ".join(f"{count} × {what}" for what, count in level["errors"].items())
    return (
        f"{level['load']:>14}{level['requests_per_s']:>12,.1f}{level['residues_per_s']:>12,.0f}"
        f"{latency}  {errors}"
    ).rstrip()


def draw_load(levels: list[dict[str, Any]], title: str, file: Path) -> None:
    """Latency against load as a PNG, the closed and the open loop apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    loops = {
        "closed loop: clients at once": [each for each in levels if each["rate"] is None],
        "open loop: arrivals a second": [each for each in levels if each["rate"] is not None],
    }
    shown = {name: some for name, some in loops.items() if some}
    figure, grid = pyplot.subplots(
        1, len(shown), figsize=(6 * len(shown), 4.5), constrained_layout=True, squeeze=False
    )
    for axes, (name, some) in zip(grid[0], shown.items(), strict=True):
        closed = some[0]["rate"] is None
        load = [each["residues_per_s" if closed else "rate"] for each in some]
        for p, colour in COLOURS.items():
            latency = [each["latency_ms"][f"p{p}"] or np.nan for each in some]
            axes.plot(load, latency, color=colour, marker="o", ms=4, label=f"p{p}")
        for x, each in zip(load, some, strict=True):
            y = each["latency_ms"]["p50"]
            if closed and y is not None:
                axes.annotate(
                    each["clients"],
                    (x, y),
                    xytext=(0, -13),
                    textcoords="offset points",
                    fontsize=8,
                )
        unit = "residues answered a second" if closed else "requests arriving a second"
        axes.set(xlabel=unit, ylabel="ms", yscale="log", xlim=(0, None))
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_title(name, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
