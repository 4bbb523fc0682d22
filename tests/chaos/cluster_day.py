"""A platform team's day on a cluster: check it, train through deaths, stop, embed, serve.

    python tests/chaos/cluster_day.py
    python tests/chaos/cluster_day.py --parts doctor --json day.json
    python tests/chaos/cluster_day.py --quick

Three raylets of this machine, started by `ray start` with ports and a token of their own, driven by
jobs/submit_job.py and jobs/check_cluster.py alone. A pretraining run that nothing happens to is
compared with one whose node and whose driver are killed and with one that is stopped and submitted
again: all must train on the same rows. A second submit of a live name, and many at once, must
follow it. A node that stands still two thirds of the time must be named while a run trains. The
result embeds proteins and is served. Last, nodes join that lack disk, run another Ray (their
metadata says so) and stand still; the doctor must name each. Ends with 1 if anything was not as it
should be. --parts adds to the report of --json.

Needs the extra `demo`, whose proteins it trains on: pip install -c constraints.txt -e '.[dev]'
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import checkout  # noqa: F401
from by_hand import Report, need_packages, need_room, parse, print_report, run_script, script_parser

PACKAGES = ("raptide", "ray", "torch", "deepspeed")
PARTS = ("training", "stop", "slow", "uses", "doctor")
QUICK = {"steps": 40}
ROOM_GB = 2.0


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--steps", type=int, default=150, help="of each run")
    parser.add_argument(
        *("--parts",), nargs="+", choices=PARTS, default=list(PARTS), help="default: all"
    )
    args = parse(parser, QUICK)
    need_packages("pyhmmer")
    need_room(ROOM_GB)
    with Report("cluster_day", args, PACKAGES, print_report, adds=True) as report:
        from jobs_of_a_day import live_a_day

        # Sockets' paths are short, and every node sees the folder.
        with tempfile.TemporaryDirectory(prefix="day-", dir="/tmp") as folder:
            live_a_day(Path(folder), args, report)
    return 0 if all(report[part]["as_it_should_be"] for part in args.parts) else 1


if __name__ == "__main__":
    run_script(main)
