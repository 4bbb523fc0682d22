"""Look at every node of a cluster, and try it out, before it is trusted with a run.

    make doctor                                                        # this machine
    python jobs/check_cluster.py --address http://HEAD:8265 --storage /shared/runs
    python jobs/check_cluster.py --address http://HEAD:8265 --json > cluster.json

Checked are: equal versions of Python, Ray, torch, CUDA, the driver and NCCL; memory errors, Xids
and free memory of GPUs; room on disks and in /dev/shm, limits, clocks, ports between nodes; a
matrix product on each node, and sums on each, between neighbours and over all (gloo, or NCCL where
there are GPUs), in which slow nodes are named; a file that each node writes to --storage and the
next one reads; the login to W&B. Each finding says what to do. The exit code is 1 if any would stop
or spoil a run. What only GPUs can show was not exercised yet.

With --address the check is a job of that cluster (jobs/submit_job.py). Without it, it joins the
cluster that RAY_ADDRESS names, or starts a Ray of its own and looks at this machine.
--before-training is the short form; `cluster.check_first: true` in a recipe runs it before a run.
"""

from __future__ import annotations

import argparse
import io
import json
import sys

from commandline import job_parser, run_job
from raptide.cluster import local_cpus, ray_session
from raptide.errors import ClusterError
from raptide.operations.check import CheckOptions, Report, check_cluster
from raptide.operations.findings import LEAST_DISK_GB
from raptide.operations.following import JobOutput
from submit_job import submit_and_follow, submit_parser

MEASURES = {
    "product_tflops": ("matrix product", "TFLOP/s"),
    "on_node_gb_s": ("sum on the node", "GB/s"),
    "pairs_gb_s": ("sum over a pair", "GB/s"),
    "all_nodes_gb_s": ("sum over all", "GB/s"),
}


def main() -> None:
    parser = job_parser(__doc__, verbose=False)
    group = parser.add_argument_group("what is checked")
    group.add_argument("--address", metavar="URL", help="of the cluster's dashboard")
    group.add_argument("--storage", metavar="PATH|URI", help="where runs will keep checkpoints")
    group.add_argument(
        "--disk-gb",
        type=float,
        default=LEAST_DISK_GB,
        metavar="GB",
        help="that must be free on each node",
    )
    group.add_argument("--before-training", action="store_true", help="the short form")
    group = parser.add_argument_group("how it is told")
    group.add_argument("--json", action="store_true", help="print the whole report as JSON")
    args = parser.parse_args()
    if args.address is not None:
        sys.exit(_as_job(args))
    with ray_session(num_cpus=local_cpus()):
        report = check_cluster(
            CheckOptions(args.storage, args.disk_gb, args.before_training), say=_say
        )
    print(json.dumps(report.to_json()) if args.json else describe(report))
    sys.exit(1 if report.errors else 0)


def _as_job(args: argparse.Namespace) -> int:
    given = [f"--disk-gb={args.disk_gb:g}"]
    given += [f"--storage={args.storage}"] if args.storage else []
    given += ["--before-training"] if args.before_training else []
    given += ["--json"] if args.json else []
    options = ["--address", args.address, "--name", "check_cluster", "check_cluster", *given]
    log = io.StringIO()
    output = JobOutput(out=log) if args.json else JobOutput()
    code = submit_and_follow(submit_parser().parse_args(options), output)
    for line in log.getvalue().splitlines():
        # What else the job said was not for those who read JSON.
        print(line, file=sys.stdout if line.startswith('{"ok"') else sys.stderr)
    return code


def _say(doing: str) -> None:
    print(f"  {doing}", file=sys.stderr, flush=True)


def refuse_unfit(storage: str, disk_bytes: float) -> None:
    """The short form, before a run; Ray must be running. Warnings are printed.

    Args:
        storage: where its checkpoints go.
        disk_bytes: that each node needs for what passes through it.

    Raises:
        ClusterError: something would stop or spoil the run.
    """
    options = CheckOptions(storage, disk_bytes / 1e9, short=True)
    report = check_cluster(options, say=_say)
    for finding in report.findings:
        print(str(finding).replace("error: ", "Error: ", 1), file=sys.stderr)
    if report.errors:
        first = report.errors[0]
        more = f" ({len(report.errors) - 1} more above)" if len(report.errors) > 1 else ""
        raise ClusterError(
            f"The cluster is not fit to train on: {first.node}: {first.found}; {first.remedy}"
            f"{more}, or set cluster.check_first=false."
        )


def describe(report: Report) -> str:
    """The report for people."""
    lines = []
    for name, facts in report.nodes.items():
        versions = ", ".join(f"{key} {value}" for key, value in facts.versions.items())
        gpus = f"{len(facts.gpus)} x {facts.gpus[0].name}" if facts.gpus else "no GPU"
        free = facts.scratch.free / 1e9
        lines.append(f"{name}: {gpus}, {free:,.0f} GB free on disk\n    {versions}")
    for measure, values in report.measures.items():
        what, unit = MEASURES[measure]
        lines += [f"{what}: {value:.3g} {unit}  {name}" for name, value in values.items()]
    lines += [*report.notes, *map(str, report.findings)]
    errors, warnings = len(report.errors), len(report.findings) - len(report.errors)
    verdict = "Fit to train on" if not errors else "Not fit to train on"
    lines.append(f"{verdict}: {errors} errors, {warnings} warnings, in {report.seconds:.0f} s.")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main)
