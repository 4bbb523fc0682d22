"""A day in the life of an endpoint: deploy, load, scale, update, revoke a key, read metrics.

    python tests/chaos/serve_day.py
    python tests/chaos/serve_day.py --quick

Starts a Ray and an endpoint of its own on the loopback, does in minutes what a team does in a day,
and prints what happened. Ends with 1 if anything was not as it should be.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
from by_hand import Report, need_room, parse, run_script, script_parser

PACKAGES = ("raptide", "ray", "torch", "httpx")
QUICK = {"answers": 50}
ROOM_GB = 1.0


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--answers", type=int, default=200, help="under load by both replicas, before the update"
    )
    args = parse(parser, QUICK)
    need_room(ROOM_GB)
    with (
        Report("serve_day", args, PACKAGES, print_report) as report,
        tempfile.TemporaryDirectory() as temporary,
    ):
        from day import live

        live(Path(temporary), args, report)
    return int(bool(report["wrong"]))


def print_report(report: dict[str, Any]) -> None:
    wrong = len(report.get("wrong", ()))
    if wrong or "broke_off" in report:
        print(f"{wrong} things were not as they should be.")
    else:
        print("A good day.")


if __name__ == "__main__":
    run_script(main)
