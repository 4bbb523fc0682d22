"""What one node tells of itself; everything here runs on it, in a Ray task."""

from __future__ import annotations

import importlib.metadata
import netrc
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from raptide.operations.gpus import Gpu, read_dcgm, read_gpus, read_xids

CONNECT_S = 5.0

PACKAGES = ("ray", "torch", "deepspeed", "pyarrow", "numpy")
"""Those whose other versions would give other numbers, or none."""


@dataclass(frozen=True)
class Room:
    """A file system, in bytes."""

    path: str
    free: int
    total: int


@dataclass(frozen=True)
class NodeFacts:
    """One node."""

    host: str
    versions: dict[str, str]
    """Of Python, of packages, of what torch was built with, and of the driver."""

    gpus: list[Gpu]
    xids: list[tuple[str, int]] | None
    dcgm: list[str]
    shm: Room
    scratch: Room
    """Where checkpoints pass."""

    ray_files: Room
    """Where Ray keeps logs and spills objects."""

    open_files: int
    locked_bytes: int
    """Memory that a process may pin; -1 is no limit."""

    has_wandb_key: bool
    unreachable: list[str] = field(default_factory=list)
    """Of the ports that it was to reach, as HOST:PORT."""


def node_facts(ray_folder: str, ports: Sequence[tuple[str, int]]) -> NodeFacts:
    """
    Args:
        ray_folder: where Ray keeps its files.
        ports: of other nodes, to be reached from here.
    """
    gpus = read_gpus()
    return NodeFacts(
        host=socket.gethostname(),
        versions=_versions(gpus),
        gpus=gpus,
        xids=read_xids() if gpus else [],
        dcgm=read_dcgm() if gpus else [],
        shm=_room("/dev/shm"),
        scratch=_room(tempfile.gettempdir()),
        ray_files=_room(ray_folder),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        has_wandb_key=has_wandb_key(),
        unreachable=[f"{host}:{port}" for host, port in ports if not _reaches(host, port)],
    )


def clock() -> float:
    """This node's, Unix time in seconds."""
    return time.time()


def has_wandb_key() -> bool:
    """Whether a run on this node could log in."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    return False


def _versions(gpus: Sequence[Gpu]) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    versions["cuda"] = torch.version.cuda or "none"
    if torch.cuda.is_available():  # not exercised without a GPU
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if gpus:
        versions["driver"] = gpus[0].driver
    return versions


def _room(path: str) -> Room:
    place = next(each for each in (Path(path), *Path(path).parents) if each.exists())
    usage = shutil.disk_usage(place)
    return Room(path, usage.free, usage.total)


def _reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True
