"""A run at a glance: training loss and held-out ECE over the steps, as a PNG in the run folder."""

from __future__ import annotations

import math
from pathlib import Path

from raptide.small_files import made_whole, read_lines
from raptide.training.watching.tracking import METRICS, STEP

PICTURE = "loss.png"

TRAINING, HELDOUT, UNIGRAM = "#9ec1d9", "#e07a5f", "#8d99ae"


def draw_run(folder: Path, unigram_ece: float) -> Path:
    """Draw `metrics.jsonl`; a step done twice counts by its last occurrence. Returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = list(read_lines(folder / METRICS))
    last = {line[STEP]: line for line in lines if "train/ece" in line}
    steps = {step: last[step] for step in sorted(last)}
    figure, axes = pyplot.subplots(figsize=(8, 4.5), constrained_layout=True)
    axes.plot(
        list(steps), [s["train/ece"] for s in steps.values()], color=TRAINING, label="training"
    )
    eces = {line["eval/step"]: line["eval/ece"] for line in lines if "eval/ece" in line}
    measured = {step: eces[step] for step in sorted(eces)}
    axes.plot(
        list(measured), list(measured.values()), color=HELDOUT, marker="o", ms=4, label="held out"
    )
    axes.axhline(unigram_ece, color=UNIGRAM, ls="--", lw=1, label=f"unigram {unigram_ece:.2f}")
    axes.set(xlabel="step", ylabel="ECE (exp of the mean loss)", xlim=(0, None))
    last_ece = list(measured.values())[-1] if measured else math.nan  # its line may be lost
    axes.set_title(f"{folder.name}: held-out ECE {last_ece:.3f}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    file = folder / PICTURE
    with made_whole(file) as new:
        figure.savefig(new, dpi=120, format="png")
    pyplot.close(figure)
    return file
