"""An endpoint on a cluster of three nodes grows under load and shrinks after it.

    python tests/chaos/serve_scale.py --json scale.json
    python tests/chaos/serve_scale.py --quick

The nodes are Ray's own on this machine (`ray.cluster_utils.Cluster`), with room for a replica each.
Prints every change in the number of replicas, how the tokens were shared among them, and what each
weighs: their weights are mapped from one file, so a second replica adds little (fp32, 35 M shape).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import checkout  # noqa: F401
from by_hand import Report, need_room, parse, print_report, run_script, script_parser

PACKAGES = ("raptide", "ray", "torch", "httpx")
QUICK = {"seconds": 10.0}
ROOM_GB = 1.0


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="with all replicas at work")
    args = parse(parser, QUICK)
    need_room(ROOM_GB)
    with (
        Report("serve_scale", args, PACKAGES, print_report) as report,
        tempfile.TemporaryDirectory() as folder,
    ):
        from growing import scale

        scale(Path(folder), args, report)


if __name__ == "__main__":
    run_script(main)
