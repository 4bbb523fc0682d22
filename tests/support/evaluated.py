"""A small evaluation to report on: two models, three baselines, three tasks."""

from __future__ import annotations

import math

import numpy as np

from raptide.evaluation.report.content import (
    Comparison,
    Control,
    DatasetEntry,
    Emergence,
    Moment,
    Reference,
    ReportContent,
    Row,
    SubjectEntry,
    TaskEntry,
)
from raptide.evaluation.results import Figure, Heatmap, Lines, Points

TRAINED, OTHER = "runs/trained", "runs/other"
LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def number_row(
    model: str, task: str, metric: str, value: float, half: float = 0.01, **fields: object
) -> Row:
    """A row of results around a value, with an interval of twice `half`."""
    row: Row = {
        "model": model,
        "weights": "ab" * 32,
        "baseline": not model.startswith("runs/"),
        "task": task,
        "kind": task,
        "dataset": "test",
        "dataset_digest": "cd" * 32,
        "metric": metric,
        "value": value,
        "low": value - half,
        "high": value + half,
        "n": 500,
        "layer": -1,
        "seconds": 1.5,
        "version": "1",
        "role": "main",
        "higher_is_better": True,
    }
    return row | fields


def small_content(name: str = TRAINED) -> ReportContent:
    """Everything a report can hold, once; the trained model is called `name`."""
    lower = {"higher_is_better": False}
    rows = [
        number_row(name, "perplexity", "ece", 12.0, 0.5, **lower) | {"baseline": False},
        number_row(OTHER, "perplexity", "ece", 18.0, 0.5, **lower),
        number_row("uniform", "perplexity", "ece", 25.0, math.nan, **lower),
        number_row(name, "structure", "q8", 0.52, layer=3) | {"baseline": False},
        number_row(OTHER, "structure", "q8", 0.50),
        number_row("one-hot", "structure", "q8", 0.51),
        number_row(name, "structure", "q3", math.nan, math.nan, role="more") | {"baseline": False},
        number_row("one-hot", "structure", "control/q8", 0.2, role="control"),
        number_row("one-hot", "structure", "chance/q8", 0.2, math.nan, role="chance"),
        number_row(name, "variants", "spearman", 0.4) | {"baseline": False},
        number_row("blosum62", "variants", "spearman", 0.3),
    ]
    draws = np.random.default_rng(0)
    square = draws.random((30, 30), np.float32)
    square[3] = np.nan
    lines = Lines(
        "ECE by length", "residues", "ECE", [0, 1], {name: [12, math.nan]}, ["short", "long"]
    )
    curves = Lines("Precision", "pairs", "precision", [0.1, 1.0], {"long": [0.5, 0.2]})
    landscape = Heatmap("Landscape", square[:20], row_names=list(LETTERS), diverging=True)
    letters = Points("Letters", draws.random((20, 2), np.float32), ["a", "b"] * 10, list(LETTERS))
    chain = Heatmap("Chain", square, truth=(square > 0.5).astype(np.float32))

    def task(kind: str, metric: str, figures: dict[str, list[Figure]]) -> TaskEntry:
        notes = {name: ["3 chains are left out."], OTHER: ["3 chains are left out."]}
        data = [DatasetEntry("test", "cd" * 32, "test.parquet")]
        return TaskEntry(kind, kind, metric, "One way.\n\nOf two.", notes, figures, data)

    return ReportContent(
        benchmark="small",
        subjects=[
            SubjectEntry(name, "ab" * 32, False, {"step": 1200, "corpus_digest": "ef" * 32}),
            SubjectEntry(OTHER, "cd" * 32),
            *(SubjectEntry(each, "01" * 32, True) for each in ("uniform", "one-hot", "blosum62")),
        ],
        tasks=[
            task("perplexity", "ece", {name: [lines], "uniform": [lines]}),
            task("structure", "q8", {name: [curves, chain], OTHER: [curves]}),
            task("variants", "spearman", {name: [landscape, letters]}),
        ],
        rows=rows,
        comparisons=[
            Comparison("structure", "test", "q8", name, OTHER, 0.02, 0.01, 0.03, "better"),
            Comparison("structure", "test", "q8", name, "one-hot", 0.01, 0.001, 0.02, "better"),
        ],
        noise={("structure", "test", "q8"): 0.03},
        controls=[
            Control("structure", "one-hot", "q8 is 0.2 on shuffled labels.", True),
            Control("structure", name, "q8 is 0.4 on shuffled labels.", False),
        ],
        references=[Reference("structure", "test", "q8", "ESM-1b", 0.716, "Rives et al. 2021")],
        emergence=[
            Emergence(name, [Moment(s, s * 100, 25.0 - s, {"q8": s / 10}) for s in (1, 2, 3)])
        ],
        command="python jobs/evaluate_model.py",
        hardware="2 cores",
        versions={"raptide": "0.1.0"},
    )
