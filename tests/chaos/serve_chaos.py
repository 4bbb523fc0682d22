"""Break an endpoint under load, and count what its clients notice.

    python tests/chaos/serve_chaos.py --json chaos.json
    python tests/chaos/serve_chaos.py --quick

Starts a Ray and an endpoint of its own on the loopback (about four minutes on two cores):

    kills       replicas are killed (SIGKILL), one after the other
    thread      the thread in which a replica computes ends: the replica is replaced
    rollouts    new checkpoints take over, one that takes 20 s to load among them; a damaged one and
                one of NaNs are refused
    starvation  a 1,022-residue protein among a flood of short ones
    gateway     the gateway is killed, then Serve's proxy, then its controller: what of that shows

Clients ask for 1, 3, 8 and 64 runs, as JSON, as Arrow and by gRPC, and `kinds` counts each.
`requests` and `failed` count kills, thread and rollouts, where nothing may fail; the last part is
counted for itself, as the requests inside a dying proxy do fail. `calls` and `failed_calls` are
those of both of Raptide's clients, of which none may fail or mix two checkpoints. Ends with 1 if
anything failed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import checkout  # noqa: F401
from by_hand import Report, need_room, parse, print_report, run_script, script_parser

PACKAGES = ("raptide", "ray", "torch", "httpx")
QUICK = {"kills": 2, "seconds": 5.0}
ROOM_GB = 1.0


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--kills", type=int, default=5, help="replicas to kill (default: 5)")
    parser.add_argument("--seconds", type=float, default=15.0, help="in which nothing is broken")
    parser.add_argument("--skip-rest", action="store_true", help="leave gateway and proxy alone")
    args = parse(parser, QUICK)
    need_room(ROOM_GB)
    with (
        Report("serve_chaos", args, PACKAGES, print_report) as report,
        tempfile.TemporaryDirectory() as temporary,
    ):
        from breakages import break_it

        break_it(Path(temporary), args, report)
    return int(bool(report["failed"] or report["failed_calls"] or not report["calls"]))


if __name__ == "__main__":
    run_script(main)
