"""Every ZeRO stage, trained at one number of workers and resumed at another.

    python tests/chaos/zero_sizes.py
    python tests/chaos/zero_sizes.py --stages 3 --json zero.json

For each stage, runs of 1 and of 2 workers are saved in mid-epoch; copies of them go on with 1, 2, 3
and 4. Each must show the losses, step by step, of a run that never stopped nor changed its size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from pretrain_chaos import chaos_recipe, greatest_difference, metrics, proteome_corpus, run_recipe

from raptide.cluster import ray_session

STEPS, SAVED_AT = 20, 10
AFTER = {1: (2,), 2: (1, 3, 4)}
"""Numbers of workers that go on, by the number that came before."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2, 3), default=(1, 2, 3))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ray_session(num_cpus=6):
        found = compare(Path(scratch), args.stages)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if all(each["loss_max_abs_diff"] < 1e-4 for each in found) else 1)


def compare(scratch: Path, stages: list[int]) -> list[dict[str, Any]]:
    corpus = proteome_corpus(scratch / "corpus")
    whole = scratch / "whole"
    run_recipe(chaos_recipe(corpus, STEPS, stages[0], (2, 2), anywhere=True), whole)
    found = []
    for stage in stages:
        for before, sizes in AFTER.items():
            half = scratch / f"stage-{stage}-{before}"
            run_recipe(chaos_recipe(corpus, SAVED_AT, stage, (before, before), anywhere=True), half)
            for size in sizes:
                run = half.with_name(f"{half.name}-{size}")
                shutil.copytree(half, run)
                recipe = chaos_recipe(corpus, STEPS, stage, (size, size), anywhere=True)
                run_recipe(recipe, run, resume=True)
                assert metrics(run)[-1]["system/workers"] == size
                difference = greatest_difference(whole, run)
                found.append(
                    {
                        "zero_stage": stage,
                        "workers": [before, size],
                        "loss_max_abs_diff": difference,
                    }
                )
                print(
                    f"ZeRO {stage}, {before} -> {size} workers: {difference:.1e} nats", flush=True
                )
    return found


if __name__ == "__main__":
    main()
