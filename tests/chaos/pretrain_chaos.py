"""Kill workers and nodes of a pretraining run at random while its size changes; lose nothing.

    python tests/chaos/pretrain_chaos.py
    python tests/chaos/pretrain_chaos.py --events 20 --zero-stage 3 --seed 5 --json chaos.json
    python tests/chaos/pretrain_chaos.py --quick

A run on one worker that nothing happens to is compared with one on one to four workers, to which
happen, at random steps: SIGKILL of a worker, death of a node, a node that is added, a node that is
announced to go away, a storage that is gone for seconds. All the while what its processes open,
read and write in corpus and checkpoints fails at random (stumble.c), and W&B cannot be reached at
any start: `faults` counts all of these. Both must train on the same rows in the same order and show
the same losses, and 30 faults must have happened. Everything runs on this machine, on nodes that
Ray's `cluster_utils` starts. Ends with 1 if they do not. Seventeen events take about 25 minutes on
two cores, --quick a few.

Needs the extra `demo`, whose proteins it trains on: pip install -c constraints.txt -e '.[dev]'
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import checkout  # noqa: F401
from by_hand import Report, need_packages, need_room, parse, print_report, run_script, script_parser

PACKAGES = ("raptide", "ray", "torch", "deepspeed")
QUICK = {"events": 3, "steps": 140}
ROOM_GB = 1.0

LEAST_FAULTS = 30
"""Fewer show nothing."""

UNREACHABLE = {
    "WANDB_BASE_URL": "http://127.0.0.1:9",
    "WANDB_API_KEY": "0" * 40,
    "WANDB_INIT_TIMEOUT": "3",
}
"""A W&B that nobody answers for."""


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--events", type=int, default=17, help="things that happen to the run")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--stumbles",
        type=int,
        default=20,
        help="of 1,000 calls to the file system, so many fail; 0 leaves out W&B and outages, too",
    )
    args = parse(parser, QUICK)
    need_packages("pyhmmer")
    need_room(ROOM_GB)
    with Report("pretrain_chaos", args, PACKAGES, print_report) as report:
        from moving_cluster import moving_cluster
        from stumbling import stumbling
        from wild_run import CORPUS, STORAGE, wreak_havoc

        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stumbles = None
            if args.stumbles:
                os.environ |= UNREACHABLE
                folders = [scratch / CORPUS, scratch / STORAGE]
                stumbles = stack.enter_context(stumbling(scratch, folders, args.stumbles))
            wreak_havoc(stack.enter_context(moving_cluster(2)), scratch, args, report, stumbles)
    enough = not args.stumbles or report["faults"] >= LEAST_FAULTS
    same = report["audit_equal"] and report["loss_max_abs_diff"] < 1e-4
    return 0 if same and enough else 1


if __name__ == "__main__":
    run_script(main)
