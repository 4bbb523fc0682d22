"""What is wrong with a cluster's nodes, out of what they tell: rules, without Ray."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from raptide.operations.gpus import FATAL_XIDS
from raptide.operations.nodes import NodeFacts

SLOW = 0.7
"""Share of the others' median below which a node is slow."""

LEAST_DISK_GB = 20.0
LEAST_DISK_SHARE = 0.05
"""Ray writes no objects to a file system that has less of it left."""

LEAST_FREE_MEMORY = 0.9
"""Share of a GPU's memory that is free where nobody else uses it."""

LEAST_OPEN_FILES = 65_536
MOST_SKEW_S = 2.0

GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    level: Literal["error", "warning"]
    """An error would stop or spoil a run; a warning may slow it down."""

    node: str
    """Its name, or "cluster"."""

    check: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.level}: {self.node}: {self.found}; {self.remedy}."


def judge_versions(nodes: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    """Every node must have what most have; only where GPUs are is there a driver to compare."""
    names = sorted({name for facts in nodes.values() for name in facts.versions})
    for name in names:
        have = {node: facts.versions.get(name) for node, facts in nodes.items()}
        if name in ("driver", "nccl"):
            have = {node: value for node, value in have.items() if value is not None}
        usual = Counter(have.values()).most_common(1)[0][0]
        for node, value in have.items():
            if value != usual:
                yield Finding(
                    *("error", node, "versions"),
                    f"{name} is {value}, and {usual} on the others",
                    "start it from the same image (constraints.txt holds the versions)",
                )


def judge_node(
    node: str, facts: NodeFacts, *, disk_gb: float = LEAST_DISK_GB, store_bytes: float = 0.0
) -> Iterator[Finding]:
    """
    Args:
        disk_gb: that must be free where checkpoints pass and where Ray keeps its files.
        store_bytes: of the node's object store, which lies in /dev/shm.
    """
    yield from _judge_room(node, facts, disk_gb, store_bytes)
    yield from _judge_gpus(node, facts)
    if facts.open_files < LEAST_OPEN_FILES:
        yield Finding(
            *("warning", node, "ulimits"),
            f"a process may open {facts.open_files:,} files",
            f"raise it before Ray starts: ulimit -n {LEAST_OPEN_FILES}",
        )
    if facts.gpus and facts.locked_bytes != -1:
        yield Finding(
            *("warning", node, "ulimits"),
            f"a process may lock {facts.locked_bytes / GB:.1f} GB of memory, which InfiniBand "
            "needs for NCCL",
            "start the container with --ulimit memlock=-1",
        )
    for place in facts.unreachable:
        yield Finding(
            *("error", node, "ports"),
            f"{place} cannot be reached from it",
            "let all ports pass between the cluster's nodes, and none from outside",
        )


def _judge_room(
    node: str, facts: NodeFacts, disk_gb: float, store_bytes: float
) -> Iterator[Finding]:
    places = {"checkpoints pass": facts.scratch, "Ray keeps its files": facts.ray_files}
    for what, room in places.items():
        if room.free < disk_gb * GB or room.free < LEAST_DISK_SHARE * room.total:
            yield Finding(
                *("error", node, "disk"),
                f"{room.path}, where {what}, has {room.free / GB:.1f} GB free of "
                f"{room.total / GB:.1f} GB",
                f"make room for {max(disk_gb, LEAST_DISK_SHARE * room.total / GB):.0f} GB, or "
                "start the node with TMPDIR and --temp-dir on a larger disk",
            )
    if facts.shm.total < store_bytes:
        yield Finding(
            *("error", node, "shm"),
            f"/dev/shm has {facts.shm.total / GB:.1f} GB, and Ray's object store wants "
            f"{store_bytes / GB:.1f} GB of it, so objects go to disk",
            f"start the container with --shm-size={store_bytes / GB + 1:.0f}g",
        )


def _judge_gpus(node: str, facts: NodeFacts) -> Iterator[Finding]:
    for gpu in facts.gpus:
        if gpu.free_mib < LEAST_FREE_MEMORY * gpu.total_mib:
            yield Finding(
                *("warning", node, "gpu memory"),
                f"GPU {gpu.index} has {gpu.free_mib:,} of {gpu.total_mib:,} MiB free",
                "end what uses it (nvidia-smi names the processes)",
            )
        if gpu.uncorrected_ecc:
            yield Finding(
                *("error", node, "gpu ecc"),
                f"GPU {gpu.index} has {gpu.uncorrected_ecc} uncorrected memory errors",
                "reset it (nvidia-smi --gpu-reset), and have it replaced if they come again",
            )
    for place, number in facts.xids or []:
        fatal = number in FATAL_XIDS
        yield Finding(
            *("error" if fatal else "warning", node, "gpu xid"),
            f"the kernel's log has Xid {number} of the GPU at {place}",
            "drain the node and reset the GPU or the machine"
            if fatal
            else "look whether the program that was on it then is the reason",
        )
    if facts.xids is None:
        yield Finding(
            *("warning", node, "gpu xid"),
            "the kernel's log may not be read, so Xid errors are not known",
            "allow dmesg (kernel.dmesg_restrict=0), or watch them with DCGM",
        )
    for complaint in facts.dcgm:
        yield Finding(
            *("error", node, "gpu health"),
            f"DCGM says: {complaint}",
            "run dcgmi diag -r 2 on it, and drain it until that passes",
        )


def judge_clocks(skews_s: Mapping[str, float]) -> Iterator[Finding]:
    """
    Args:
        skews_s: how far each node's clock is ahead of the driver's, in seconds.
    """
    for node, skew in skews_s.items():
        if abs(skew) > MOST_SKEW_S:
            yield Finding(
                *("warning", node, "clock"),
                f"its clock is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}",
                "let chrony or systemd-timesyncd run on it",
            )


def judge_speeds(
    speeds: Mapping[str, float], kinds: Mapping[str, str], what: str, unit: str, remedy: str
) -> Iterator[Finding]:
    """A node that is much slower than the median of the others of its kind.

    Args:
        speeds: of each node, more is better.
        kinds: of each node: others are another kind of machine, and may differ.
    """
    for node, speed in speeds.items():
        others = [
            value
            for other, value in speeds.items()
            if other != node and kinds[other] == kinds[node]
        ]
        if others and speed < SLOW * statistics.median(others):
            yield Finding(
                *("error", node, what),
                f"its {what} makes {speed:.3g} {unit}, and {statistics.median(others):.3g} on the "
                "others: all would wait for it",
                remedy,
            )
