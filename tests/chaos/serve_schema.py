"""Thousands of requests made from the endpoint's own OpenAPI document, good and bad ones.

    python tests/chaos/serve_schema.py

Starts a Ray and an endpoint of its own on the loopback and runs schemathesis against it: no answer
may be a 5xx (but for 504, where a random deadline was too short), and none may break the document
(status, headers, content type, schema). What the document cannot say (that A42G fits the sequence,
that a model has layer 7) may be refused, so `positive_data_acceptance` is left out. Ends with 1 if
anything is found.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import checkout  # noqa: F401
from endpoints import make_bundle
from ray import serve as ray_serve

from processes import free_port, no_orphans
from raptide.cluster import ray_session
from serve.app import build

LEAST_CASES = 2000

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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=400, help="random ones for each operation")
    args = parser.parse_args()
    with no_orphans(), tempfile.TemporaryDirectory() as temporary, ray_session(num_cpus=4):
        port = free_port()
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        ray_serve.run(build({"model": str(make_bundle(Path(temporary), seed=1))}))
        code, report = run(f"http://127.0.0.1:{port}", args.examples, "--workers", "2")
        ray_serve.shutdown()
    print(report)
    if cases(report) < LEAST_CASES:
        print(f"Only {cases(report)} cases were made; {LEAST_CASES} are asked for.")
        return 1
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
