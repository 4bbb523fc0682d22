"""Thousands of requests made from the endpoint's own OpenAPI document, good and bad ones.

    python tests/chaos/serve_schema.py
    python tests/chaos/serve_schema.py --quick

Starts a Ray and an endpoint of its own on the loopback and runs schemathesis against it: no answer
may be a 5xx (but for 504, where a random deadline was too short), and none may break the document
(status, headers, content type, schema). What the document cannot say (that A42G fits the sequence,
that a model has layer 7) may be refused, so `positive_data_acceptance` is left out. Ends with 1 if
anything is found, or if too few requests were made.

Needs the extra `dev`: pip install -c constraints.txt -e '.[dev]'
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
from by_hand import Report, need_packages, need_room, parse, run_script, script_parser

from processes import free_port

PACKAGES = ("raptide", "ray", "fastapi", "schemathesis")
QUICK = {"examples": 30}
LEAST_CASES = 5
"""For each example asked for, over all operations."""

ROOM_GB = 1.0

SETTINGS = Path(__file__).with_name("schemathesis.toml")


def run(url: str, examples: int, *options: str, timeout_s: float | None = None) -> tuple[int, str]:
    """Schemathesis's exit code and report."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(SETTINGS)),
        *("run", f"{url}/openapi.json"),
        *("--max-examples", str(examples), "--phases", "examples,coverage,fuzzing"),
        *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),
        *("--seed", "1", "--suppress-health-check", "all", "--request-timeout", "60"),
        *("--warnings", "off", "--no-color", "--continue-on-failure", *options),
    ]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def cases(report: str) -> int:
    """How many requests a report says were made."""
    found = re.search(r"([\d,]+) generated", report)
    return int(found[1].replace(",", "")) if found else 0


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--examples", type=int, default=400, help="random ones for each operation")
    args = parse(parser, QUICK)
    need_packages("schemathesis")
    need_room(ROOM_GB)
    with (
        Report("serve_schema", args, PACKAGES, print_report) as report,
        tempfile.TemporaryDirectory() as temporary,
        report.part("requests"),
    ):
        code, text = ask(Path(temporary), args.examples)
        report |= {"examples": args.examples, "cases": cases(text), "code": code, "text": text}
    return int(code != 0 or report["cases"] < LEAST_CASES * args.examples)


def ask(folder: Path, examples: int) -> tuple[int, str]:
    """Schemathesis's exit code and report on an endpoint of its own."""
    from endpoints import make_bundle
    from ray import serve as ray_serve

    from raptide.cluster import ray_session
    from serve.app import build

    with ray_session(num_cpus=4):
        port = free_port()
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        ray_serve.run(build({"model": str(make_bundle(folder, seed=1))}))
        found = run(f"http://127.0.0.1:{port}", examples, "--workers", "2")
        ray_serve.shutdown()
    return found


def print_report(report: dict[str, Any]) -> None:
    if "text" in report:
        least = LEAST_CASES * report["examples"]
        print(f"{report['text']}\n{report['cases']} cases were made; {least} are asked for.")


if __name__ == "__main__":
    run_script(main)
