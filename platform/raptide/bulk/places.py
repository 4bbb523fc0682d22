"""Where engines go: how many there is room for, and what each may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import ray

from raptide.bulk.work import Precision
from raptide.config import Settings
from raptide.errors import ConfigError

LEAST_MEMORY = 1 << 30
"""Bytes that an engine may take in any case; else its share of what Ray counts as a node's."""


class BulkSettings(Settings):
    """How a job runs; but for `threads` and `dedup`, nothing of this changes a number."""

    workers: int | None = None
    """Engines; by default one for each GPU of the cluster, or for each share of `threads` CPUs."""

    threads: int = 1
    """Of one engine on CPUs. Sums are split among them, which shows in a number's last digits."""

    timeout_s: float = 3600.0
    """Seconds that some 65,000 tokens, or one longer record, may take at most."""

    memory_gb: float | None = None
    """Of one engine's process; by default its share of the node."""

    dedup: bool = False
    """Whether a first pass finds sequences that are equal across units, to compute them once."""

    replace: bool = False
    """Whether another job's output gives way."""


def choose_precision(asked: Literal["auto", "fp32", "bf16"]) -> Precision:
    """What engines compute in: as asked, or what is faster where they will run."""
    if asked != "auto":
        return asked

    def faster() -> Precision:
        import torch

        from raptide.model.device import multiplies_bf16_faster

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return "bf16" if multiplies_bf16_faster(device) else "fp32"

    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    return ray.get(ray.remote(num_cpus=1 - gpus, num_gpus=gpus)(faster).remote())


@dataclass(frozen=True)
class Places:
    """What engines there is room for."""

    workers: int
    cpus: float
    gpus: float
    """That one engine takes."""
    memory_bytes: int
    """That one engine may take."""


def plan_workers(settings: BulkSettings) -> Places:
    """One engine for each GPU, or for each share of a node's CPUs.

    Raises:
        ConfigError: more engines are asked for than there is room for.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = 1.0 if sum(node.get("GPU", 0) for node in nodes) else 0.0
    unit, need = ("GPU", 1.0) if gpus else ("CPU", float(settings.threads))
    room = [int(node.get(unit, 0) // need) for node in nodes]
    asked = settings.workers
    if asked is not None and not 1 <= asked <= max(sum(room), 1):
        raise ConfigError(
            f"--workers {asked} was given, but there is room for 1 to {max(sum(room), 1)} engines "
            f"of {need:g} {unit}s each; give another number."
        )
    workers = asked or max(sum(room), 1)
    memory = settings.memory_gb and int(settings.memory_gb * 1e9)
    shares = [
        node["memory"] / min(places, workers)
        for node, places in zip(nodes, room, strict=True)
        if places and "memory" in node
    ]
    share = int(min(shares, default=LEAST_MEMORY))
    return Places(workers, 0.0 if gpus else need, gpus, memory or max(share, LEAST_MEMORY))
