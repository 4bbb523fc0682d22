"""Kill everything of a bulk job, over and over; nothing may be lost, doubled, or other than it was.

    python tests/chaos/bulk_chaos.py --json bulk.json
    python tests/chaos/bulk_chaos.py --kills 20 --seed 5
    python tests/chaos/bulk_chaos.py --quick

jobs/embed_proteins.py embeds plain and compressed files on a cluster of three nodes, on this
machine, by Ray's `cluster_utils`. At random times one of these happens: SIGKILL of an engine's
process, of the worker above it, of the job itself, Ctrl-C to the job, death of a node (another one
takes its place). A job that is dead is given again. In the end the files are compared with those of
a job that nothing happened to: byte for byte, and the records one by one. Ends with 1 if they
differ. Ten kills take some five minutes on two cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import checkout  # noqa: F401
from by_hand import Report, need_room, parse, print_report, run_script, script_parser

PACKAGES = ("raptide", "ray", "torch", "pyarrow")
QUICK = {"kills": 5, "proteins": 1500}
ROOM_GB = 1.0


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--proteins", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=7)
    args = parse(parser, QUICK)
    need_room(ROOM_GB)
    with Report("bulk_chaos", args, PACKAGES, print_report) as report:
        from killed_bulk import kill_everything

        with tempfile.TemporaryDirectory() as scratch:
            kill_everything(Path(scratch), args, report)
    sound = report["rows_equal"] and not report["duplicates"] and not report["lost"]
    return 0 if sound else 1


if __name__ == "__main__":
    run_script(main)
