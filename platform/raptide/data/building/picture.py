"""A corpus at a glance: lengths and residue composition, as a PNG beside the manifest."""

from __future__ import annotations

from pathlib import Path

from raptide.alphabet import STANDARD
from raptide.data.corpus import LENGTH_BIN, Corpus

PICTURE = "corpus.png"

LONGEST_SHOWN = 2000
"""Residues up to which lengths are drawn; what is longer is summed up in the last bar."""

COLOURS = {"train": "#2a6f97", "heldout": "#e07a5f"}


def draw_corpus(corpus: Corpus) -> Path:
    """Draw the picture; returns its file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), constrained_layout=True)
    for split, colour in COLOURS.items():
        counts = corpus.manifest["counts"][split]
        if not counts:
            continue
        label = f"{split}: {counts['clusters']:,} clusters, {counts['sequences']:,} sequences"
        starts, shares = _lengths(corpus.manifest["length_histogram"][split])
        top.stairs(shares, [*starts, starts[-1] + LENGTH_BIN], color=colour, label=label, lw=1.8)
        letters = corpus.manifest["residue_counts"][split]
        total = sum(letters.values())
        offset = -0.2 if split == "train" else 0.2
        bottom.bar(
            [index + offset for index in range(len(STANDARD))],
            [100 * letters.get(letter, 0) / total for letter in STANDARD],
            width=0.4,
            color=colour,
            label=f"{split}: {total:,} residues",
        )
    top.set(xlabel=f"residues in a sequence (last: {LONGEST_SHOWN:,} and more)", ylabel="%")
    top.set_title("Lengths", loc="left")
    bottom.set_xticks(range(len(STANDARD)), list(STANDARD))
    bottom.set(ylabel="%", xlim=(-0.6, len(STANDARD) - 0.4))
    bottom.set_title("Residues", loc="left")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    figure.suptitle(f"Corpus {corpus.digest[:16]}", x=0.01, ha="left", fontweight="bold")
    file = corpus.path / PICTURE
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return file


def _lengths(histogram: dict[str, int]) -> tuple[list[int], list[float]]:
    """Start and percentage of each bin up to LONGEST_SHOWN."""
    starts = list(range(0, LONGEST_SHOWN + LENGTH_BIN, LENGTH_BIN))
    counts = [0] * len(starts)
    for start, count in histogram.items():
        counts[min(int(start), LONGEST_SHOWN) // LENGTH_BIN] += count
    return starts, [100 * count / sum(counts) for count in counts]
