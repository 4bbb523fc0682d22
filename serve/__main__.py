"""Deploy a model or a configuration file and stay; SIGTERM and Ctrl-C drain before the end.

    python -m serve model=runs/demo
    python -m serve model=runs/demo replicas=2 dtype=bf16
    python -m serve serve/config.yaml

As `serve run`, for whatever stops processes by SIGTERM (systemd, Kubernetes): nothing new is taken,
what is being answered is finished, and then it ends. `serve run` drops what is being answered. Ray
is started, and ends with it, unless RAY_ADDRESS names a cluster.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from itertools import starmap
from pathlib import Path

import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    ServeDeploySchema,
)

from raptide.cluster import local_cpus, ray_session
from raptide.errors import ConfigError, RaptideError
from serve.drain import drain
from serve.environment import proxies

LOOK_EVERY_S = 1.0

TELL_EVERY_S = 15.0
"""How often it is said what a start waits for."""


def main() -> None:
    as_module = Path(sys.argv[0]).name == "__main__.py"
    name = "python -m serve" if as_module else sys.argv[0]
    parser = argparse.ArgumentParser(
        prog=name, description=(__doc__ or "").replace("python -m serve", name)
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "what", nargs="+", help="a file as serve/config.yaml, or settings of serve/settings.py"
    )
    what = parser.parse_args().what
    try:
        run(of_settings(what) if "=" in what[0] else read_config(Path(what[0])))
    except RaptideError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def of_settings(given: Sequence[str]) -> ServeDeploySchema:
    """What `serve run serve.app:build` would deploy of the same `name=value` arguments."""
    arguments = dict(each.split("=", 1) for each in given if "=" in each)
    if len(arguments) < len(given):
        wrong = next(each for each in given if "=" not in each)
        raise ConfigError(f"Settings have the form name=value, but {wrong!r} was given.")
    application = {"import_path": "serve.app:build", "route_prefix": "/", "args": arguments}
    return ServeDeploySchema.model_validate({"applications": [{"name": "raptide", **application}]})


def read_config(path: Path) -> ServeDeploySchema:
    """A configuration file in Serve's own schema.

    Raises:
        ConfigError: there is none, or it breaks the schema.
    """
    try:
        return ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{path} is no configuration of Ray Serve: {error}") from None


def run(config: ServeDeploySchema) -> None:
    """Deploy, stay until a signal comes, drain.

    Raises:
        ConfigError: an application does not start.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    names = [application.name for application in config.applications]
    for name, value in proxies(config).items():
        os.environ.setdefault(name, value)
    with ray_session(num_cpus=local_cpus()):
        serve.start(
            proxy_location=config.proxy_location,
            http_options=config.http_options.model_dump(),
            grpc_options=config.grpc_options.model_dump(),
            tracing_config=config.tracing_config,
        )
        try:
            _get_global_client().deploy_apps(config, _blocking=False)
            if _start(names, stop):
                options = config.http_options
                print(f"{', '.join(names)}: http://{options.host}:{options.port}", flush=True)
            stop.wait()
        finally:
            print("finishing what is being answered", flush=True)
            drain(names)


def _start(names: list[str], stop: threading.Event) -> bool:
    """Wait until all applications run, and say what for; False if a signal came first."""
    tell_at = time.monotonic() + TELL_EVERY_S
    while not stop.wait(LOOK_EVERY_S):
        found = {name: serve.status().applications.get(name) for name in names}
        for name, status in found.items():
            if status and status.status == ApplicationStatus.DEPLOY_FAILED:
                raise ConfigError(f"{name} does not start: {status.message}")
        if all(each and each.status == ApplicationStatus.RUNNING for each in found.values()):
            return True
        if time.monotonic() >= tell_at:
            for line in filter(None, starmap(missing, found.items())):
                print(line, flush=True)
            tell_at = time.monotonic() + TELL_EVERY_S
    return False


def missing(name: str, status: ApplicationStatusOverview | None) -> str:
    """What an application waits for, in a line; empty where it runs."""
    if status is None or not status.deployments:
        return f"{name}: being built"
    if status.status == ApplicationStatus.RUNNING:
        return ""
    parts = []
    for deployment, each in status.deployments.items():
        states = [f"{number} {state.lower()}" for state, number in each.replica_states.items()]
        part = f"{deployment} has {', '.join(states) or 'no replicas'}"
        parts.append(f"{part} ({each.message.strip()})" if each.message.strip() else part)
    return f"{name}: waiting; " + "; ".join(parts)


if __name__ == "__main__":
    main()
