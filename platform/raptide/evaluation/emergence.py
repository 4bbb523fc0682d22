"""What a run learned, and when: from the benchmark that it was asked as it went."""

from __future__ import annotations

import math
from pathlib import Path

from raptide.evaluation.report.content import Emergence, Moment
from raptide.small_files import read_lines
from raptide.training.watching.tracking import METRICS, STEP

EVALUATED, BENCH = "eval/step", "bench/"


def read_emergence(path: Path) -> Emergence | None:
    """The evaluated checkpoints of a run, in order; None where there are no two with a benchmark.

    Args:
        path: of a model; of a run, if it has any.
    """
    file = path / METRICS
    if not file.is_file():
        return None
    moments: dict[int, Moment] = {}
    tokens: dict[int, int] = {}
    for line in read_lines(file):
        if "progress/tokens" in line:
            tokens[line[STEP]] = line["progress/tokens"]
        found = {k.removeprefix(BENCH): v for k, v in line.items() if k.startswith(BENCH)}
        if found and EVALUATED in line:
            ece = line.get("eval/ece_masked", math.nan)
            moments[line[EVALUATED]] = Moment(int(line[EVALUATED]), 0, ece, found)
    whole = [
        Moment(step, tokens.get(step, 0), moment.ece, moment.metrics)
        for step, moment in sorted(moments.items())
    ]
    return Emergence(str(path), whole) if len(whole) > 1 else None
