"""Jobs on a cluster by name: submitted once, found again, stopped, and what came of them.

Ray's job server keeps them. A submission id is NAME-ATTEMPT; the server takes an id only once, so
of two that start the same attempt one does, and the other finds it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from raptide.errors import ClusterError, ConfigError
from raptide.operations.shipping import Shipment

REQUEST_S = 30.0
"""Seconds that one answer of the job server may take; Ray's own client would wait for ever."""

UPLOAD_S = 600.0

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

TALKATIVE = (
    "dashboard.modules.job.sdk",
    "dashboard.modules.dashboard_sdk",
    "_private.runtime_env.packaging",
    "_private.runtime_env.working_dir",
)
"""Ray's loggers that tell of every file and every connection."""

INTERRUPTED = 130
"""Exit code for a job that was stopped, as a shell has it for Ctrl-C."""


class JobServer(JobSubmissionClient):
    """Ray's client, with an end to every wait."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", UPLOAD_S if method == "PUT" else REQUEST_S)
        return super()._do_request(method, endpoint, **options)


@dataclass(frozen=True)
class Job:
    """One attempt of a named job, as the server tells of it."""

    name: str
    attempt: int
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""

    command: str
    exit_code: int | None = None
    """Of its process; None where it has not ended, or Ray could not see how."""

    message: str = ""
    error_type: str = ""
    started_s: float = 0.0
    """Unix time."""
    ended_s: float | None = None

    @property
    def id(self) -> str:
        return f"{self.name}-{self.attempt}"

    @property
    def live(self) -> bool:
        return self.status in (JobStatus.PENDING, JobStatus.RUNNING)

    @property
    def lost(self) -> bool:
        """Whether its process or its node was killed, rather than that it failed by itself."""
        if self.status != JobStatus.FAILED:
            return False
        if self.exit_code is None:
            return self.error_type.startswith("JOB_SUPERVISOR_ACTOR")
        return self.exit_code < 0 or self.exit_code == 128 + 9

    @property
    def code(self) -> int:
        """The exit code that who followed it ends with."""
        if self.status == JobStatus.SUCCEEDED:
            return 0
        if self.status == JobStatus.STOPPED:
            return INTERRUPTED
        if self.exit_code is None:
            return 1
        return self.exit_code if self.exit_code > 0 else 128 - self.exit_code


def connect(address: str | None) -> JobServer:
    """The job server at an address, or where RAY_API_SERVER_ADDRESS or RAY_ADDRESS point.

    With RAY_AUTH_MODE=token its requests carry the token of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
    ~/.ray/auth_token.

    Raises:
        ConfigError: nothing answers there, another Ray does, or the token is wrong or missing.
    """
    place = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    place = place or "http://127.0.0.1:8265"
    if address is not None:  # Ray lets its variables win over what it is given
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    for name in TALKATIVE:
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    try:
        server = JobServer(place)
    except AuthenticationError as error:
        raise ConfigError(_refused_token(place, error)) from None
    except (OSError, RuntimeError, ValueError) as error:  # requests' errors are OSErrors
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConfigError(
            f"--address must name the job server of a Ray cluster, and {place} does not answer as "
            f"one ({reason}); give the dashboard's address, http://HEAD:8265, or forward its port."
        ) from None
    _refuse_other_ray(server, place)
    return server


def _refused_token(place: str, error: Exception) -> str:
    said = str(error).split("\n")[0].rstrip(".")
    return (
        f"{place} wants a token ({said}); set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH to the cluster's."
    )


def _refuse_other_ray(server: Any, place: str) -> None:
    there = server._server_ray_version or ray.__version__
    if there.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise ConfigError(
            f"The cluster must run the Ray that constraints.txt pins, {ray.__version__}, and "
            f"{place} runs {there}; start it from an image with the same versions."
        )


@contextmanager
def answered() -> Iterator[None]:
    """Within the block, a server that is gone or refuses is a `ClusterError`."""
    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(_refused_token("the job server", error)) from None
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ClusterError(
            f"The job server did not do as it was asked ({reason}); look at the head's dashboard, "
            "and give the command again."
        ) from None


def attempts(server: Any, name: str | None = None) -> list[Job]:
    """Jobs of a name, or all that have one, oldest first."""
    with answered():
        details = server.list_jobs()
    jobs = [job for each in details if (job := _as_job(each)) is not None]
    chosen = [job for job in jobs if name in (None, job.name)]
    return sorted(chosen, key=lambda job: (job.started_s, job.attempt))


def job_of_id(server: Any, job_id: str) -> Job | None:
    """The job of a submission id as it is now; None where the server knows none.

    Raises:
        OSError, RuntimeError: the server does not answer.
    """
    try:
        return _as_job(server.get_job_info(job_id))
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise


def find_job(server: Any, name_or_id: str) -> Job:
    """By submission id, or the newest attempt of a name.

    Raises:
        ConfigError: there is none.
    """
    known = attempts(server)
    for job in known:
        if job.id == name_or_id:
            return job
    named = [job for job in known if job.name == name_or_id]
    if named:
        return max(named, key=lambda job: job.attempt)
    names = ", ".join(sorted({job.name for job in known})) or "none"
    raise ConfigError(
        f"The cluster knows no job {name_or_id!r}; it knows {names} (a head that starts anew "
        "forgets its jobs)."
    )


def submit(
    server: Any, name: str, shipment: Shipment, *, after: int | None = None
) -> tuple[Job, bool]:
    """Start a job, unless one of its name is live.

    Args:
        after: the attempt whose end is the reason; one that somebody else has started since then
            is taken instead, whatever has become of it.

    Returns the job to follow, and whether this call has started it.

    Raises:
        ConfigError: the name is no name.
        ClusterError: the server refuses.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"--name must be letters, digits, dots, dashes and underscores, and {name!r} is not; "
            "choose another."
        )
    before = attempts(server, name)
    others = [job for job in before if job.live or job.attempt > (after or job.attempt)]
    if others:
        return others[-1], False
    attempt = max((job.attempt for job in before), default=0) + 1
    job = Job(name, attempt, JobStatus.PENDING, shipment.command)
    try:
        server.submit_job(
            entrypoint=shipment.entrypoint,
            submission_id=job.id,
            runtime_env=shipment.runtime_env,
            metadata={"name": name, "attempt": str(attempt), "command": shipment.command},
        )
    except (OSError, RuntimeError) as error:
        with answered():
            if "already exists" not in str(error):
                # It may have got through where only the answer was lost.
                if (there := job_of_id(server, job.id)) is None:
                    raise
                return there, there.command == shipment.command
            return job_of_id(server, job.id) or job, False
    return job, True


def _as_job(details: Any) -> Job | None:
    """None for what was not submitted under a name with an attempt."""
    match = re.fullmatch(r"(.+)-(\d+)", details.submission_id or "")
    if match is None:
        return None
    ended = details.end_time
    return Job(
        name=match[1],
        attempt=int(match[2]),
        status=details.status,
        command=(details.metadata or {}).get("command", details.entrypoint),
        exit_code=details.driver_exit_code,
        message=details.message or "",
        error_type=details.error_type or "",
        started_s=(details.start_time or 0) / 1000,
        ended_s=ended / 1000 if ended else None,
    )
