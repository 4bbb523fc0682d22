"""Train a tiny model for hours with everything on, and see what grows.

    python tests/chaos/pretrain_soak.py
    python tests/chaos/pretrain_soak.py --minutes 480 --json soak.json
    python tests/chaos/pretrain_soak.py --quick

Checkpoints in a bucket (a local S3 server), the best of them kept, held-out ECE and a benchmark
beside the training, W&B offline; nodes come and go in the first quarter of an hour and halfway
through the rest. From its sixteenth minute on the private memory of every process is compared with
the steps that were made: more than 1 MB in 1,000 steps is growth (the slope's interval is beside);
files in the run, in the bucket and in Ray's session (whose logs are Ray's) are counted. At the end
the run is told to stop, and must save. Ends with 1 if anything grew or the run did not end as it
should. --quick shows that everything goes on, and is too short to show growth.

Needs the extra `demo`, whose proteins it trains on: pip install -c constraints.txt -e '.[dev]'
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import checkout  # noqa: F401
from by_hand import Report, need_packages, need_room, parse, print_report, run_script, script_parser

PACKAGES = ("raptide", "ray", "torch", "deepspeed", "wandb")
QUICK = {"minutes": 4.0}
ROOM_GB = 2.0

# Hours beside other work: a node that is slow for seconds is not dead, nor is a group that starts.
# The nodes have the bucket's keys from here, too.
os.environ |= {
    "AWS_ACCESS_KEY_ID": "soak",
    "AWS_SECRET_ACCESS_KEY": "soak",
    "RAY_health_check_failure_threshold": "15",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=90.0, help="of training")
    args = parse(parser, QUICK)
    need_packages("pyhmmer", "moto")
    need_room(ROOM_GB)
    with Report("pretrain_soak", args, PACKAGES, print_report) as report:
        from long_run import train_long
        from moving_cluster import moving_cluster

        # Sockets' paths are short.
        with (
            tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as folder,
            moving_cluster(nodes=2) as cluster,
        ):
            train_long(cluster, Path(folder), 60 * args.minutes, report)
    return 0 if report["as_it_should_be"] else 1


if __name__ == "__main__":
    run_script(main)
