"""Mixed load on an endpoint for half an hour, under deaths and updates; its books against ours.

    python tests/chaos/serve_soak.py --minutes 30 --json soak.json
    python tests/chaos/serve_soak.py --quick

Starts a Ray and an endpoint of its own on the loopback: two replicas, HTTP, gRPC and keys. Clients
of each kind ask without end: a few sequences; 64 batches in one request; Arrow; gRPC; a table of
floats a residue; and those who hang up, allow too little time, or send what is refused. Meanwhile
replicas are killed and three checkpoints take over. At the end

    kinds    requests by kind and by what was answered, and how many failed that should not have
    memory   of gateway, replicas and proxy over time
    books    requests, errors and residues as Prometheus gets them, against what was counted here

Ends with 1 if anything failed or the books differ.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
from by_hand import Report, need_room, parse, run_script, script_parser

PACKAGES = ("raptide", "ray", "torch", "httpx", "grpcio")
QUICK = {"minutes": 2.0}
ROOM_GB = 1.0


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of load (default: 30)")
    args = parse(parser, QUICK)
    need_room(ROOM_GB)
    with (
        Report("serve_soak", args, PACKAGES, print_report) as report,
        tempfile.TemporaryDirectory() as temporary,
    ):
        from soak import soak

        soak(Path(temporary), args.minutes, report)
    return int(bool(report["failed"] or not report["books"]["equal"]))


def print_report(report: dict[str, Any]) -> None:
    for kind, counts in report.get("kinds", {}).items():
        told = ", ".join(f"{status} {count:,}" for status, count in counts.items())
        print(f"{kind:<12} {told}")
    if "failed" in report:
        print(f"failed: {report['failed']}, of {report['requests']:,} requests")
    for role, megabytes in report.get("memory", {}).get("growth", {}).items():
        early, late = megabytes["early_mb"], megabytes["late_mb"]
        print(f"memory of {role}: {early:,.0f} MB early, {late:,.0f} MB late")
    if books := report.get("books"):
        verdict = "equal" if books["equal"] else f"differ: {books['differences']}"
        print(f"books: {verdict}")


if __name__ == "__main__":
    run_script(main)
