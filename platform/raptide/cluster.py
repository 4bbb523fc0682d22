"""Start Ray here, or join the cluster that a job was submitted to."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Not ray.data, which `ray` loads when a session asks for it: a run's board needs none of it.
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raptide.errors import ConfigError

DATA_CPUS = 2
"""Logical CPUs that stay free for data tasks beside the training workers."""

CPUS_PER_CORE = 2
"""CPUs that training workers may take of each core of this machine: enough to try several workers
on few cores; more would only wait for each other."""


@contextmanager
def ray_session(*, num_cpus: int, verbose: bool = False) -> Iterator[None]:
    """Ray for the length of a job.

    With RAY_ADDRESS set (as `ray job submit` does) the job joins that cluster and ships this
    package to its workers. Otherwise a Ray of its own starts on this machine with `num_cpus`
    logical CPUs and is gone afterwards, whatever happens inside. Where this process has a Ray
    already, as in a notebook, that one is used and left running.

    Args:
        verbose: show what workers print, and Ray's own messages.
    """
    if ray.is_initialized():
        yield
        return
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.train"):
        logging.getLogger(name).setLevel(level)
    # Ray Data logs every failed task as an error; ours reach the user as one sentence instead.
    logging.getLogger("ray.data").setLevel(level if verbose else logging.CRITICAL)
    if not verbose:  # or Ray prints a traceback for each of the tasks that failed with the first
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    ray.data.DataContext.get_current().enable_progress_bars = verbose or sys.stderr.isatty()
    # Ray Train asks the dashboard, which a local Ray does not start, for its state every second.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION", "0")
    before = signal.getsignal(signal.SIGTERM)
    if not joins_cluster():
        # A poll takes one checkpoint's report off the queue; every two seconds is for many nodes.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    if joins_cluster():
        package = str(Path(__file__).parent)
        ray.init(runtime_env={"py_modules": [package]}, log_to_driver=verbose, logging_level=level)
    else:
        _refuse_long_paths()
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=verbose,
            logging_level=level,
        )
    if threading.current_thread() is threading.main_thread() and callable(before):
        signal.signal(signal.SIGTERM, before)  # Ray puts its own in place, which skips clean-up
    try:
        yield
    finally:
        ray.shutdown()


SOCKET = "ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
"""Where a Ray of its own puts its longest socket, below the temporary folder."""

SOCKET_BYTES = 107
"""Bytes that Linux allows in the path of a socket."""


def _refuse_long_paths() -> None:
    """Ray fails on them with a stack trace, seconds later."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    most = SOCKET_BYTES - len(SOCKET) - 1
    if len(os.fsencode(folder)) > most:
        raise ConfigError(
            f"Ray's sockets need a temporary folder of at most {most} bytes, but {folder} has "
            f"{len(os.fsencode(folder))}; set RAY_TMPDIR to a shorter one, such as /tmp."
        )


def joins_cluster() -> bool:
    """Whether jobs join a cluster, rather than start a Ray of their own."""
    return os.environ.get("RAY_ADDRESS", "local") != "local"


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Where an actor goes that should live as long as its maker: beside it."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def local_cpus() -> int:
    """Logical CPUs for a job of data tasks alone: one for each real one."""
    return max(2, os.cpu_count() or 2)


def training_cpus(asked: int | None) -> int:
    """Logical CPUs for a training job on this machine: what its workers ask for, as far as there
    are cores for it, or all there may be; and those of the data tasks."""
    most = CPUS_PER_CORE * (os.cpu_count() or 1)
    return (most if asked is None else min(asked, most)) + DATA_CPUS
