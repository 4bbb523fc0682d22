"""Speed of the stream and of training steps, against what people use now, on this machine.

    python tests/benchmarks/bench_training.py
    python tests/benchmarks/bench_training.py --rounds 5 --json training.json
    python tests/benchmarks/bench_training.py --quick
    python tests/benchmarks/bench_training.py --parts feeder blocks ranks

- Preparation alone, one core: draw, crop, mask and pack blocks that are in memory, rows of 4,096
  tokens; reading and decompressing are not counted. Packing efficiency is that of these rows.
- The stream, all cores: from the Parquet shards to global batches, through Ray Data.
- The part of it that is one process at any size, the feeder: what it cuts and hands out, with its
  packed rows in memory, to 8, 128 and 1,024 readers that take batches of 2 M tokens. Few processes
  simulate them, with a call of its own for each; since they share the cores with the feeder, its
  own processor time says what it would do with a core for itself.
- Blocks: a corpus of 95,000 blocks and 27 M clusters, as far as its tables go, from the start to
  the first batch. Hashing its shards and counting its letters take what they are given: the one is
  not measured, the other by the block.
- Ranks: what 1,024 of them tell one actor, meet for in another, and leave behind as files.
- Training steps of one ESM-2 shape in fp32 on the same proteins, in unpadded tokens a second:
  raptide (jobs/pretrain_model.py with one worker: Ray Train, DeepSpeed, stream, W&B offline), a
  bare PyTorch loop over raptide's model and rows, and transformers' EsmForMaskedLM on padded
  batches of as many sequences, in file order and sorted by length. All have --threads threads,
  which leave Ray's own processes a core, as on a node that computes on GPUs. They take turns: one
  trains some steps while all processes of the others, Ray's too, stand still. A ratio is of all
  tokens over all seconds of the rounds; a first round, which does not count, warms up.
- A checkpoint of a 35 M model: how long training stands still for it, against how long one takes
  until it counts with no training beside it, which is the cost of a save that everything waits for.
- Resume: from the start of the command to the first step that is logged, at 1% and at 90% of an
  epoch, with a model so small that the time is Ray's, DeepSpeed's and the stream's.

Needs the extra `dev`: pip install -c constraints.txt -e '.[dev]'
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import by_hand
from machine import CORES

from raptide.model.config import PRESETS

PACKAGES = ("raptide", "ray", "torch", "deepspeed", "transformers", "numpy", "pyarrow")
PARTS = ("stream", "feeder", "blocks", "ranks", "steps", "checkpoint", "resume")
QUICK = {"proteins": 20_000, "run_proteins": 5_000, "rows": 2, "steps": 2, "rounds": 2}
ROOM_GB = 5.0
"""For corpora of a few hundred thousand proteins and checkpoints of 35 M parameters."""


def parse() -> argparse.Namespace:
    parser = by_hand.script_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="esm2_t6_8M")
    parser.add_argument("--proteins", type=int, default=100_000, help="that are streamed")
    parser.add_argument("--run-proteins", type=int, default=20_000, help="that are trained on")
    parser.add_argument("--rows", type=int, default=4, help="packed rows of 1,024 tokens in a step")
    parser.add_argument("--steps", type=int, default=3, help="steps of each peer in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, CORES - 1),
        help="that train, in each peer (default: all cores but one, %(default)s here)",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    return by_hand.parse(parser, QUICK)


def main() -> None:
    args = parse()
    if "steps" in args.parts:
        by_hand.need_packages("transformers")
    by_hand.need_room(ROOM_GB)
    with (
        by_hand.Report("bench_training", args, PACKAGES, print_report, adds=True) as report,
        tempfile.TemporaryDirectory() as scratch,
    ):
        from training_parts import measure

        measure(Path(scratch), args, report)


def print_report(report: dict[str, Any]) -> None:
    if "tokens_per_s" in report:
        print(f"\nTraining steps of {report['preset']}, unpadded tokens a second, every round")
        for name, rounds in report["tokens_per_s"].items():
            print(f"  {name:26}" + "".join(f"{speed:10,.0f}" for speed in rounds))
    if "checkpoint" in report:
        found = report["checkpoint"]
        stalls = ", ".join(f"{seconds:.2f}" for seconds in found["stall_s"])
        print(
            f"A checkpoint of {found['bytes'] / 1e9:.2f} GB: training stood still for {stalls} s; "
            f"alone it took {found['alone_s']:.2f} s"
        )
    if "feeder" in report:
        print_feeder(report["feeder"])
    for part in ("blocks", "ranks"):
        for name, value in report.get(part, {}).items():
            print(f"  {part}: {name:28} {value:16,.3f}")
    for place, seconds in report.get("resume_s", {}).items():
        print(f"Resume at {place} of an epoch: first step after {seconds:.1f} s")
    for name, ratio in report.get("ratios", {}).items():
        print(f"  {name:34} {ratio:16,.3f}")
    print(json.dumps(report["machine"]))


def print_feeder(found: dict[str, Any]) -> None:
    print(f"The feeder cuts {found['tokens_per_core_s']:,.0f} tokens/s with a core of its own.")
    for readers, each in found.items():
        if isinstance(each, dict):
            print(
                f"  {readers:>5} readers: {each['batches_per_s']:6.1f} batches/s, "
                f"{each['tokens_per_s']:,.0f} tokens/s, {each['bytes_per_s'] / 1e6:,.1f} MB/s in "
                f"{each['calls_per_s']:,.0f} calls/s; {each['batches_per_core_s']:.1f} batches/s "
                "with a core of its own"
            )


if __name__ == "__main__":
    by_hand.run_script(main)
