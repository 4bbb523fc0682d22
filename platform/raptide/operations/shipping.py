"""What a submitted job takes along: this checkout, so that nodes need its pinned environment alone.

Ray keeps the copy on the cluster, under a hash of what is in it, and hands it to each node that
works for the job.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raptide.errors import ConfigError
from raptide.version import VERSION

PARTS = ("platform", "jobs", "serve", "pyproject.toml", "constraints.txt")
"""What of a checkout jobs need; whatever else lies in it stays at home."""

LEFT_OUT = ("__pycache__", "*.pyc", "*.egg-info", "jobs/benchmarks/development")

STOP_WAIT_S = 900
"""Seconds between SIGTERM and SIGKILL when a job is stopped; Ray gives it 3, which is too short to
end a step and to save a large model."""


@dataclass(frozen=True)
class Shipment:
    """A job as Ray's job server takes it."""

    command: str
    """As it was typed."""

    entrypoint: str
    runtime_env: dict[str, Any]


def pack(
    checkout: Path,
    job: str,
    arguments: Sequence[str],
    *,
    code_version: str,
    python: str = "python",
    stop_wait_s: int = STOP_WAIT_S,
) -> Shipment:
    """A job of this checkout and its arguments.

    Args:
        job: a script of jobs/ without its ending, or `serve` for a file of the endpoint's.
        python: what the nodes call theirs.

    Raises:
        ConfigError: there is no such job, or an argument names what would not come along.
    """
    script = _script(checkout, job)
    inside = [_as_there(checkout, argument) for argument in arguments]
    command = shlex.join([job, *arguments])
    # exec: signals reach the job itself, and its exit code comes back.
    start = shlex.join([python, *script, *inside])
    return Shipment(
        command=command,
        entrypoint=f'PYTHONPATH="$PWD/platform:$PWD:$PYTHONPATH" exec {start}',
        runtime_env={
            "working_dir": str(checkout),
            "excludes": _excludes(checkout),
            "env_vars": {
                "RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s),
                VERSION: code_version,
            },
        },
    )


def default_name(job: str, arguments: Sequence[str]) -> str:
    """The same for the same command, another for any other."""
    digest = hashlib.sha256("\0".join([job, *arguments]).encode()).hexdigest()
    return f"{job}-{digest[:6]}"


def job_names(checkout: Path) -> list[str]:
    """Scripts of the checkout that can be submitted."""
    scripts = sorted((checkout / "jobs").glob("*.py"))
    runnable = [path.stem for path in scripts if '__name__ == "__main__"' in path.read_text()]
    return [name for name in runnable if name != "submit_job"] + ["serve"]


def _script(checkout: Path, job: str) -> list[str]:
    known = job_names(checkout)
    if job not in known:
        raise ConfigError(f"There is no job {job!r} to submit; there are {', '.join(known)}.")
    return ["-m", "serve"] if job == "serve" else [f"jobs/{job}.py"]


def _excludes(checkout: Path) -> list[str]:
    """All at the top that jobs do not need: data in a checkout can be larger than any copy."""
    others = sorted(path.name for path in checkout.iterdir() if path.name not in PARTS)
    return [*(f"/{name}" for name in others), *LEFT_OUT]


def _as_there(checkout: Path, argument: str) -> str:
    """An argument as it reads where the job runs, which is at the top of the checkout.

    Paths of files that come along are turned into theirs there. Others that exist here would be
    missed there, and are refused, unless they are absolute: those may lie on a shared file system.
    """
    lead, separator, value = argument.rpartition("=")
    path = Path(value)
    looks_like_path = "/" in value or path.suffix in (".yaml", ".yml")
    if not value or path.is_absolute() or not looks_like_path or not path.exists():
        return argument
    place = path.resolve()
    if not any(place.is_relative_to(checkout / part) for part in PARTS):
        raise ConfigError(
            f"{argument} names a path of this machine that does not come along with a job; put it "
            f"where every node sees it and give its absolute path, or put a recipe into "
            f"{checkout / 'jobs/recipes'}."
        )
    return f"{lead}{separator}{place.relative_to(checkout)}"
