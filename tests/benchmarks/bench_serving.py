"""The endpoint against the bare engine and against other embedding servers, on this machine.

    python tests/benchmarks/bench_serving.py
    python tests/benchmarks/bench_serving.py --parts engine latency --rounds 5 --json serving.json
    python tests/benchmarks/bench_serving.py --parts soak
    python tests/benchmarks/bench_serving.py --quick

Random weights of one ESM-2 shape, the same real proteins of natural lengths (20 to 1,022) for all,
one protein a request, base64. Load comes from this process (raptide.load), never from the server's.

The endpoint has a replica a core, as docs/serving.md advises on CPUs, unless said otherwise.

- engine: residues/s of the endpoint with 32 clients in a closed loop, and of `Engine.embed` on the
  same list in a process of its own with every core, in turn; then the same with one replica with
  every core. What is still in the queue when a window ends does not count. Beside it the CPU time
  of proxy, gateway and engine for a request.
- peers: the same load on a plain FastAPI server (plain_server.py: a forward each, in threads or one
  at a time) and on infinity-emb, a batching embedding server, in an environment of its own; in
  turn, with the same weights. They compute in fp32, raptide in what it chooses by itself. infinity
  is left out where it cannot be installed, and of quick runs without --infinity.
- latency: one client, one protein after the other, by HTTP and by the bare engine in turn, each
  twice, of which the second counts; one replica with every core. The difference is what serving
  adds, through Serve's default proxy and, where haproxy is installed, through its HAProxy mode;
  beside it what a request took outside the replica's computing.
- levels: latency against load, closed and open loop, as a table and a picture (--picture).
- soak (only if asked for): 256 clients for five minutes; errors, and the memory of every process.

Parts can be run one by one with the same --json file, which keeps those that are not run. All of
them but soak take about three quarters of an hour, with --quick a few minutes.

Needs the extra `dev`: pip install -c constraints.txt -e '.[dev]'
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import by_hand
from machine import CORES

from raptide.model.config import PRESETS

PACKAGES = ("raptide", "ray", "torch", "transformers", "fastapi", "uvicorn", "aiohttp", "numpy")
PARTS = ("engine", "peers", "latency", "levels")
QUICK = {
    "preset": "esm2_t6_8M",
    "sequences": 16,
    "rounds": 1,
    "seconds": 5.0,
    "soak_seconds": 30.0,
}
ROOM_GB, INFINITY_GB = 2.0, 8.0
"""For weights and logs; for infinity-emb with a torch of its own."""


def parse() -> argparse.Namespace:
    parser = by_hand.script_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "soak"), default=PARTS)
    parser.add_argument("--preset", choices=PRESETS, default="esm2_t12_35M")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=40.0, help="a window of load")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--soak-seconds", type=float, default=300.0)
    parser.add_argument("--infinity", type=Path, metavar="VENV", help="kept there between runs")
    parser.add_argument("--picture", type=Path, default=Path("load.png"), metavar="PNG")
    return by_hand.parse(parser, QUICK)


def main() -> None:
    args = parse()
    check(args)
    with (
        by_hand.Report("bench_serving", args, PACKAGES, print_report, adds=True) as report,
        tempfile.TemporaryDirectory(prefix="bench-serving-") as scratch,
    ):
        from serving_parts import measure

        measure(Path(scratch), args, report)


def check(args: argparse.Namespace) -> None:
    by_hand.need_packages("pyhmmer")
    by_hand.need_room(ROOM_GB)
    if "levels" in args.parts:
        by_hand.need_place(args.picture, "--picture")
    if "peers" not in args.parts:
        return
    by_hand.need_packages("transformers")
    if args.infinity is not None:
        by_hand.need_environment(args.infinity, "--infinity")
    elif not args.quick:
        by_hand.need_room(INFINITY_GB)


def print_report(report: dict[str, Any]) -> None:
    machine = report["machine"]
    if "preset" in report:
        print(
            f"\n{report['preset']}, {report['sequences']} proteins, {report['residues']:,} "
            f"residues, {report['clients']} clients, {CORES} cores"
        )
    print(f"{machine['processor']} {machine['flags']}\n{machine['versions']}\n")
    for name, value in report.get("ratios", {}).items():
        print(f"  {name:<36}" + ("      none" if value is None else f"{value:>10.3f}"))
    if "soak" in report:
        soak = report["soak"]
        print(f"\nSoak: {soak['requests']:,} requests, errors {soak['errors'] or 'none'}")


if __name__ == "__main__":
    by_hand.run_script(main)
