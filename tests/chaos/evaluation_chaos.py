"""Kill an evaluation with SIGKILL at random moments and give it again: its rows must stay the same.

    python tests/chaos/evaluation_chaos.py --json evaluation.json
    python tests/chaos/evaluation_chaos.py --model runs/demo --kills 8 --seed 5
    python tests/chaos/evaluation_chaos.py --quick

jobs/evaluate_model.py asks a model, and all baselines, the tasks of a benchmark (by default the
tiny one, of a small model with random weights), once untouched and once killed over and over with
everything that it has started. In the end results.parquet of both must hold the same rows but for
`seconds`, and no scratch may be left. Ends with 1 if they differ. On two cores it takes some ten
minutes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import checkout  # noqa: F401
from by_hand import ROOT, Report, need_room, parse, print_report, run_script, script_parser

PACKAGES = ("raptide", "ray", "torch", "pyarrow")
QUICK = {"kills": 3, "tasks": ["perplexity", "homology", "space"]}
ROOM_GB = 1.0
LONGEST_S = 3600.0
SHAPE = {"layers": 2, "width": 64, "heads": 4}


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--model", type=Path, help="default: a small one with random weights")
    parser.add_argument("--benchmark", type=Path, default=ROOT / "jobs/benchmarks/tiny.yaml")
    parser.add_argument("--tasks", nargs="+", help="default: all")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=7)
    args = parse(parser, QUICK)
    need_room(ROOM_GB)
    with (
        Report("evaluation_chaos", args, PACKAGES, print_report) as report,
        tempfile.TemporaryDirectory() as scratch,
    ):
        run_and_kill(Path(scratch), args, report)
    return 0 if report["rows_equal"] and not report["left_behind"] else 1


def run_and_kill(folder: Path, args: Namespace, report: Report) -> None:
    import numpy as np

    rng = np.random.default_rng(args.seed)
    model = args.model or make_model(folder / "model")
    with report.part("untouched"):
        began = time.monotonic()
        assert start(folder, "untouched", model, args).wait(LONGEST_S) == 0
        whole_s = time.monotonic() - began
        report["untouched_s"] = round(whole_s, 1)
    with report.part("kills"):
        report["kills_at_s"] = []
        for _ in range(args.kills):
            run = start(folder, "killed", model, args)
            wait_s = float(rng.uniform(0.15, 0.7)) * whole_s
            try:
                run.wait(wait_s)
                break  # it was through before
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
                report["kills_at_s"] = [*report["kills_at_s"], round(wait_s, 1)]
        report["kills"] = len(report["kills_at_s"])
        assert start(folder, "killed", model, args).wait(LONGEST_S) == 0
    with report.part("rows_equal"):
        compare(folder, report)


def make_model(folder: Path) -> Path:
    from raptide.model.config import ModelSettings
    from raptide.model.formats.detect import write_weights
    from raptide.model.formats.weights import Weights
    from raptide.model.transformer import Esm

    write_weights(folder, Weights.of(Esm(ModelSettings(**SHAPE)).initialise(1)))
    return folder


def start(folder: Path, output: str, model: Path, args: Namespace) -> subprocess.Popen[bytes]:
    """In a process group of its own, so that all of it can be killed at once."""
    command = [
        *(sys.executable, ROOT / "jobs/evaluate_model.py", "--model", model),
        *("--benchmark", args.benchmark, "--output", folder / output),
        *(["--tasks", *args.tasks] if args.tasks else []),
    ]
    with (folder / f"{output}.log").open("ab") as log:
        texts = [str(each) for each in command]
        return subprocess.Popen(texts, stdout=log, stderr=log, start_new_session=True)


def compare(folder: Path, report: Report) -> None:
    import pyarrow.parquet as pq

    one, other = (
        pq.read_table(folder / name / "results.parquet").drop(["seconds"]).to_pylist()
        for name in ("untouched", "killed")
    )
    # NaN, which an interval may be, equals nothing; its text does.
    report["rows_equal"] = list(map(repr, one)) == list(map(repr, other))
    report["rows"] = len(one)
    cache = folder / "killed/cache"
    report["left_behind"] = sorted(path.name for path in cache.glob("read-*"))


if __name__ == "__main__":
    run_script(main)
