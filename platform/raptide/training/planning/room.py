"""Room for a run's workers: what a cluster has, what it may get, and what it lacks.

Nothing in Ray's public interface tells what an autoscaler may add, so the file that it was started
with is read where it runs, on the head node. Where another program scales the cluster (KubeRay's
operator, say), that is not known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import yaml

from raptide.cluster import DATA_CPUS, joins_cluster, training_cpus
from raptide.errors import ConfigError
from raptide.model.config import ModelSettings
from raptide.model.device import HEAD_STEP, WIDEST_HEAD, takes_heads
from raptide.training.planning.recipe import Recipe

AUTOSCALER_OPTION = "--autoscaling-config="
SHOWN = ("CPU", "GPU")


@dataclass(frozen=True)
class Nodes:
    """So many nodes with the same resources."""

    count: int
    resources: dict[str, float]
    """Of each of them."""

    def __str__(self) -> str:
        each = ", ".join(f"{self.resources.get(name, 0):.0f} {name}s" for name in SHOWN)
        return f"{self.count} node{'s' * (self.count > 1)} of {each}"


@dataclass(frozen=True)
class Room:
    """The nodes that are there, and those that may be there at most."""

    place: str
    now: tuple[Nodes, ...]
    most: tuple[Nodes, ...] | None
    """None where that is not known."""

    max_nodes: int = 1
    """Of all kinds in `most` together."""

    def fits_now(self, needs: dict[str, float]) -> int:
        """Workers that have room on the nodes that are there, beside the data tasks."""
        return _fitting(self.now, sum(nodes.count for nodes in self.now), needs)

    def fits_at_most(self, needs: dict[str, float]) -> int | None:
        """The same with every node that may come; None where that is not known."""
        if self.most is None:
            return None
        return max(self.fits_now(needs), _fitting(self.most, self.max_nodes, needs))

    @property
    def gpus(self) -> int:
        """GPUs there are or may be, as far as known."""
        kinds = (self.now, self.most or ())
        return int(max(sum(n.count * n.resources.get("GPU", 0) for n in kind) for kind in kinds))

    def __str__(self) -> str:
        if self.most is None:
            later = ", and what it may get is not known here"
        elif self.most == self.now:
            later = ""
        else:
            later = f", and may have at most {self.max_nodes} nodes: {_listed(self.most)}"
        return f"{self.place} has {_listed(self.now)}{later}"


def look_around() -> Room:
    """The room of the cluster that was joined, or of this machine's Ray, be it started or not."""
    if not ray.is_initialized():
        resources = {"CPU": training_cpus(None), "GPU": torch.cuda.device_count()}
        here = (Nodes(1, {name: float(each) for name, each in resources.items()}),)
        return Room("this machine", here, here)
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kinds = Counter(tuple(sorted(_of_kind(resources).items())) for resources in alive)
    now = tuple(Nodes(count, dict(kind)) for kind, count in kinds.items())
    if not joins_cluster():
        return Room("this machine", now, now, max_nodes=len(alive))
    on_head = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
    config = ray.get(ray.remote(autoscaler_config).options(**on_head).remote())
    if config is None:
        return Room("the cluster", now, None)
    return room_by_config(now, config)


def room_by_config(now: tuple[Nodes, ...], config: dict[str, Any]) -> Room:
    """The room of a cluster with an autoscaler's configuration, as in cluster.yaml."""
    limit = config["max_workers"]
    most = []
    for name, kind in config["available_node_types"].items():
        head = name == config["head_node_type"]
        count = min(kind.get("max_workers", 0 if head else limit), limit) + head
        resources = _of_kind(kind.get("resources", {}))
        if count and not resources:  # Ray finds out once such a node is there
            return Room("the cluster", now, None)
        if count:
            most.append(Nodes(count, resources))
    return Room("the cluster", now, tuple(most), max_nodes=limit + 1)


def autoscaler_config() -> dict[str, Any] | None:
    """The configuration of this cluster's autoscaler, if it runs on this node."""
    own = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    for process in psutil.process_iter(["cmdline"]):
        options = process.info["cmdline"] or []
        if own in options:
            for option in options:
                if option.startswith(AUTOSCALER_OPTION):
                    file = Path(option.removeprefix(AUTOSCALER_OPTION)).expanduser()
                    return yaml.safe_load(file.read_text())
    return None


def choose_device(recipe: Recipe, room: Room) -> str:
    """The device of a run, once it is sure that its fewest workers have room, or may get it.

    What may come to a cluster is waited for; where that is not known, anything may.

    Raises:
        ConfigError: there is too little room, `auto` cannot tell whether GPUs will come, or GPUs
            cannot take the model's heads.
    """
    cluster = recipe.cluster
    device = _device_for(recipe, room) if cluster.device == "auto" else cluster.device
    if device == "cuda":
        refuse_heads(recipe)
    most = room.fits_at_most(worker_needs(recipe, device))
    if most is not None and most < cluster.min_workers:
        raise ConfigError(
            f"cluster.workers is {cluster.min_workers} with "
            f"{_named(worker_needs(recipe, device))} each, but {room}: room for {most} beside "
            f"{DATA_CPUS} CPUs for data tasks; lower cluster.workers or cluster.cpus_per_worker, "
            "or take a larger cluster."
        )
    return device


def refuse_heads(recipe: Recipe) -> None:
    """Refuse what would train sequence by sequence on GPUs, many times slower.

    Raises:
        ConfigError: the attention kernel cannot take the model's heads.
    """
    model = recipe.model
    if not isinstance(model, ModelSettings):  # no heads
        return
    if recipe.training.precision != "fp32" and not takes_heads(model.head_width):
        raise ConfigError(
            f"model.heads: heads of {model.head_width} values (model.width {model.width} over "
            f"{model.heads} heads) cannot train on GPUs in {recipe.training.precision}, whose "
            f"attention kernel takes multiples of {HEAD_STEP} up to {WIDEST_HEAD}; choose another "
            "model.heads, or training.precision=fp32."
        )


def _device_for(recipe: Recipe, room: Room) -> str:
    """What `auto` stands for: never CPUs where there are, or might come, GPUs."""
    workers = recipe.cluster.min_workers
    if (room.fits_at_most({"GPU": 1}) or room.fits_now({"GPU": 1})) >= workers:
        return "cuda"
    if room.gpus or room.most is None:
        raise ConfigError(
            f"cluster.device is auto and cluster.workers {workers}, one GPU each, but {room}; set "
            "cluster.device=cuda to wait for GPUs, cluster.device=cpu to train without, or lower "
            "cluster.workers."
        )
    return "cpu"


def worker_needs(recipe: Recipe, device: str) -> dict[str, float]:
    """The Ray resources of one worker."""
    return {
        "CPU": float(recipe.cluster.cpus_per_worker),
        **({"GPU": 1.0} if device == "cuda" else {}),
        **recipe.cluster.worker_resources,
    }


def describe_room(recipe: Recipe, device: str, room: Room) -> str:
    """What a run finds on its cluster, for people."""
    needs, fewest = worker_needs(recipe, device), recipe.cluster.min_workers
    now, most = room.fits_now(needs), room.fits_at_most(needs)
    at_most = "an unknown number" if most is None else f"{most:,}"
    lacks = "nothing" if now >= fewest else f"room for {fewest - now:,} workers, to be waited for"
    return (
        f"  {'room':12} {room}\n"
        f"  {'':12} workers on {device} with {_named(needs)} each: {now:,} fit now, {at_most} at "
        f"most; lacks {lacks}"
    )


def _fitting(kinds: Iterable[Nodes], max_nodes: int, needs: dict[str, float]) -> int:
    """Workers that fit, with the roomiest nodes first."""
    workers, cpus = 0, -float(DATA_CPUS)
    rooms = [
        (int(min(n.resources.get(r, 0) // need for r, need in needs.items())), n) for n in kinds
    ]
    for room, nodes in sorted(rooms, key=lambda each: -each[0]):
        count = min(nodes.count, max_nodes)
        max_nodes -= count
        workers += room * count
        cpus += nodes.resources.get("CPU", 0) * count
    return max(0, min(workers, int(cpus // needs.get("CPU", 1))))


def _of_kind(resources: dict[str, float]) -> dict[str, float]:
    """Without what differs from node to node: addresses, memory."""
    passing = ("node:", "memory", "object_store_memory", "accelerator_type:")
    return {name: float(n) for name, n in resources.items() if not name.startswith(passing)}


def _listed(kinds: tuple[Nodes, ...]) -> str:
    return "; ".join(map(str, kinds)) or "no nodes"


def _named(needs: dict[str, float]) -> str:
    return ", ".join(f"{need:g} {name}" for name, need in needs.items())
