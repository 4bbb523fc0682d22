"""Every ZeRO stage, trained at one number of workers and resumed at another.

    python tests/chaos/zero_sizes.py
    python tests/chaos/zero_sizes.py --stages 3 --json zero.json
    python tests/chaos/zero_sizes.py --matrices muon --stages 0 2
    python tests/chaos/zero_sizes.py --quick

For each stage, runs on the first number of workers of each change are saved in mid-epoch, and
copies of them go on with the second. Each must show the losses, step by step, of a run that never
stopped nor changed its size, and have trained on the same rows; ends with 1 if any does not. Muon's
steps are made in bf16, which makes more of what sums in another order differ by.

Needs the extra `demo`, whose proteins it trains on: pip install -c constraints.txt -e '.[dev]'
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
from by_hand import Report, need_packages, need_room, parse, run_script, script_parser

PACKAGES = ("raptide", "ray", "torch", "deepspeed")
STEPS, SAVED_AT = 20, 10
WORKERS = (1, 2, 3, 4)
CLOSE = {"adamw": 1e-4, "muon": 3e-2}
"""Nats that losses may differ by."""
CHANGES = ("1:2", "2:1", "2:3", "2:4")
QUICK = {"changes": ("2:1", "2:3")}
ROOM_GB = 1.0


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--stages", type=int, nargs="+", choices=(0, 1, 2, 3), default=(1, 2, 3))
    parser.add_argument("--matrices", choices=CLOSE, default="adamw", help="what moves matrices")
    parser.add_argument(
        "--changes",
        nargs="+",
        choices=[f"{a}:{b}" for a in WORKERS for b in WORKERS],
        default=CHANGES,
        metavar="BEFORE:AFTER",
        help=f"numbers of workers up to {WORKERS[-1]} (default: {' '.join(CHANGES)})",
    )
    args = parse(parser, QUICK)
    need_packages("pyhmmer")
    need_room(ROOM_GB)
    with Report("zero_sizes", args, PACKAGES, print_report) as report:
        from raptide.cluster import ray_session

        with tempfile.TemporaryDirectory() as scratch, ray_session(num_cpus=max(WORKERS) + 2):
            compare(Path(scratch), args, report)
    close = CLOSE[args.matrices]
    good = [each["loss_max_abs_diff"] < close and each["audit_equal"] for each in report["sizes"]]
    return 0 if all(good) else 1


def compare(scratch: Path, args: argparse.Namespace, report: Report) -> None:
    from wild_run import chaos_recipe, proteome_corpus, run_recipe

    corpus = proteome_corpus(scratch / "corpus")
    whole = scratch / "whole"

    def run(folder: Path, stage: int, workers: int, steps: int, *, resume: bool = False) -> None:
        recipe = chaos_recipe(
            corpus, steps, stage, (workers, workers), anywhere=True, matrices=args.matrices
        )
        run_recipe(recipe, folder, resume=resume)

    with report.part("whole run"):
        run(whole, args.stages[0], 2, STEPS)
    changes = sorted(tuple(map(int, change.split(":"))) for change in args.changes)
    report["sizes"] = []
    for stage in args.stages:
        for before, sizes in groupby(changes, lambda change: change[0]):
            half = scratch / f"stage-{stage}-{before}"
            with report.part(f"ZeRO {stage} on {before} workers"):
                run(half, stage, before, SAVED_AT)
            for _, size in sizes:
                with report.part(f"ZeRO {stage}, {before} -> {size} workers"):
                    resumed = half.with_name(f"{half.name}-{size}")
                    shutil.copytree(half, resumed)
                    run(resumed, stage, size, STEPS, resume=True)
                    report["sizes"].append(difference(whole, resumed, stage, (before, size)))


def difference(whole: Path, resumed: Path, stage: int, workers: tuple[int, int]) -> dict[str, Any]:
    from wild_run import greatest_difference, metrics

    from raptide.training.watching.audit import audited_steps

    assert metrics(resumed)[-1]["system/workers"] == workers[1]
    nats = greatest_difference(whole, resumed)
    print(f"ZeRO {stage}, {workers[0]} -> {workers[1]} workers: {nats:.1e} nats", flush=True)
    return {
        "zero_stage": stage,
        "workers": list(workers),
        "loss_max_abs_diff": nats,
        "audit_equal": dict(audited_steps(resumed)) == dict(audited_steps(whole)),
    }


def print_report(report: dict[str, Any]) -> None:
    sizes = report.get("sizes", ())
    most = max((each["loss_max_abs_diff"] for each in sizes), default=None)
    print(f"{len(sizes)} changes of size; greatest difference in nats: {most}")


if __name__ == "__main__":
    run_script(main)
