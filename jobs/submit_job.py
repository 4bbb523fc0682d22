"""Run any job on a Ray cluster, and watch it as if it ran here.

    python jobs/submit_job.py --address http://HEAD:8265 pretrain_model \\
        --config jobs/recipes/demo.yaml --output /shared/runs/mine --start-or-resume
    python jobs/submit_job.py --name nightly --detach evaluate_model --model /shared/runs/mine …
    python jobs/submit_job.py list
    python jobs/submit_job.py status|logs|stop NAME

This checkout goes along, so that nodes need its pinned environment alone; paths of data, runs and
outputs are those of the cluster, absolute. Where --address is not given, RAY_API_SERVER_ADDRESS or
RAY_ADDRESS says where, else http://127.0.0.1:8265 is asked.

A job has a name (its own and a hash of its arguments, unless --name says another) and attempts
NAME-1, NAME-2, …, of which one is live at most: submitting a live name follows it. The exit code is
the job's. Where the cluster stops answering it is asked again until it does. --retries N starts
the next attempt of a job whose process or node was killed, as pretraining with --start-or-resume
bears; a job that fails by itself is not tried again. Ctrl-C asks whether to leave the job alone or
to stop it; without a terminal it is left alone.

`stop` gives a job the --stop-wait seconds that it was submitted with: pretraining ends its step and
saves a checkpoint, bulk jobs leave what they have done.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from commandline import run_job
from raptide.errors import ConfigError
from raptide.operations.following import JobOutput, Place, follow
from raptide.operations.shipping import STOP_WAIT_S, default_name, pack
from raptide.operations.submission import (
    INTERRUPTED,
    Job,
    answered,
    attempts,
    connect,
    find_job,
    submit,
)
from raptide.version import code_version

CHECKOUT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = submit_parser()
    args = parser.parse_args()
    if args.job not in COMMANDS:
        sys.exit(submit_and_follow(args))
    # What follows a command may be options of this script.
    rest = argparse.ArgumentParser(prog=f"{parser.prog} {args.job}")
    rest.add_argument("--address", default=args.address)
    if args.job != "list":
        rest.add_argument("name")
    if args.job == "stop":
        rest.add_argument("--detach", action="store_true", help="do not wait for its end")
    sys.exit(COMMANDS[args.job](rest.parse_args(args.arguments)))


def submit_parser() -> argparse.ArgumentParser:
    """What can be said of a job that is submitted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", metavar="URL", help="of the cluster's dashboard")
    parser.add_argument("--name", help="what to find the job by")
    parser.add_argument("--detach", action="store_true", help="submit it and end")
    parser.add_argument(
        "--retries", type=int, default=0, help="attempts after one whose process was killed"
    )
    parser.add_argument(
        "--stop-wait",
        type=int,
        default=STOP_WAIT_S,
        metavar="S",
        help=f"seconds that the job has to end when it is stopped (default: {STOP_WAIT_S})",
    )
    parser.add_argument("--python", default="python", help="what the nodes call theirs")
    parser.add_argument("job", help="a script of jobs/ without .py, serve, or a command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="the job's own")
    return parser


def submit_and_follow(args: argparse.Namespace, output: JobOutput | None = None) -> int:
    """The exit code of the job, or 0 where nobody waits for it.

    Args:
        args: of `submit_parser`.
        output: takes what the job says, instead of stdout and stderr.
    """
    name = args.name or default_name(args.job, args.arguments)
    shipment = pack(
        CHECKOUT,
        args.job,
        args.arguments,
        code_version=code_version(),
        python=args.python,
        stop_wait_s=args.stop_wait,
    )
    server = connect(args.address)
    after: int | None = None
    for tries_left in range(args.retries, -1, -1):
        job, ours = submit(server, name, shipment, after=after)
        _tell(job, ours, shipment.command)
        if args.detach:
            return 0
        ended = watch(server, job, output or JobOutput())
        if ended is None:
            return INTERRUPTED
        if not (ended.lost and tries_left):
            return ended.code
        after = ended.attempt
        print(f"{ended.id} was killed; starting the next attempt.", file=sys.stderr, flush=True)
    raise AssertionError("the last attempt returns")


def _tell(job: Job, ours: bool, command: str) -> None:
    if ours:
        sentence = f"Submitted {job.id}."
    else:
        sentence = f"{job.id} is {job.status.lower()} already; following it."
        if job.command != command:
            sentence += (
                f" Warning: it does something else ({job.command}); give another --name to run "
                "this beside it."
            )
    print(sentence, file=sys.stderr, flush=True)


def watch(
    server: Any, job: Job, output: JobOutput, ask: Callable[[Job], str] | None = None
) -> Job | None:
    """Follow a job to its end; None where it goes on without us.

    Args:
        ask: what Ctrl-C is to mean: detach, stop or follow.
    """
    output.place = Place()
    asked_to_stop = False
    while True:
        try:
            ended = follow(server, job, output)
            break
        except KeyboardInterrupt:
            output.close()
            choice = "detach" if asked_to_stop else (ask or _ask)(job)
            if choice == "detach":
                print(
                    f"{job.id} goes on; submitting it again follows it, `status {job.name}` tells "
                    f"of it, `stop {job.name}` ends it.",
                    file=sys.stderr,
                )
                return None
            if choice == "stop":
                asked_to_stop = True
                _stop(server, job)
    output.close()
    if (sentence := _how_it_ended(ended)) is not None:
        print(sentence, file=sys.stderr)
    return ended


def _how_it_ended(job: Job) -> str | None:
    """None where the job has said it itself."""
    if job.status == "STOPPED":
        return f"{job.id} was stopped."
    if job.exit_code is None and job.status == "FAILED":
        reason = " ".join(job.message.split())[:300].rstrip(".")
        return f"error: {job.id} ended without an exit code ({reason})."
    if job.lost:
        return f"error: {job.id} was killed (exit code {job.exit_code})."
    return None


def _ask(job: Job) -> str:
    """What Ctrl-C is to mean; without a terminal the job is left alone."""
    if not sys.stdin.isatty():
        return "detach"
    print(f"\n{job.id} goes on. [d]etach, [s]top it, or Enter to go on following? ", end="")
    try:
        answer = input().strip().lower()
    except (KeyboardInterrupt, EOFError, OSError):  # OSError: the terminal is gone
        return "detach"
    return {"d": "detach", "s": "stop"}.get(answer[:1], "follow")


def _stop(server: Any, job: Job) -> None:
    with answered():
        server.stop_job(job.id)
    print(f"Stopping {job.id}: it has until it has saved.", file=sys.stderr, flush=True)


def show_list(args: argparse.Namespace) -> int:
    jobs = attempts(connect(args.address))
    width = max((len(job.id) for job in jobs), default=0)
    for job in jobs:
        print(f"{job.id:{width}}  {job.status:9}  {_times(job)}  {job.command}")
    return 0


def show_status(args: argparse.Namespace) -> int:
    """Prints it; the exit code is the job's, or 0 where it has not ended."""
    job = find_job(connect(args.address), args.name)
    code = "" if job.exit_code is None else f", exit code {job.exit_code}"
    print(f"{job.id}: {job.status}{code}\n  {_times(job)}\n  {job.command}")
    if not job.live and (sentence := _how_it_ended(job)) is not None:
        print(f"  {sentence}")
    return 0 if job.live else job.code


def show_logs(args: argparse.Namespace) -> int:
    server = connect(args.address)
    job = find_job(server, args.name)
    with answered():
        text = server.get_job_logs(job.id)
    output = JobOutput()
    output.feed(text)
    output.close()
    return 0


def stop(args: argparse.Namespace) -> int:
    """0 once it has ended, or, with --detach, once it was asked to."""
    server = connect(args.address)
    job = find_job(server, args.name)
    if not job.live:
        raise ConfigError(f"{job.id} cannot be stopped: it is {job.status.lower()} already.")
    _stop(server, job)
    if not args.detach and watch(server, job, JobOutput()) is None:
        return INTERRUPTED
    return 0


def _times(job: Job) -> str:
    began = datetime.fromtimestamp(job.started_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    seconds = int((job.ended_s or time.time()) - job.started_s)
    return f"{began}, {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} h"


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": show_list,
    "status": show_status,
    "logs": show_logs,
    "stop": stop,
}

if __name__ == "__main__":
    run_job(main)
