"""The nodes that are alive, and what a task on each of them answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raptide.operations.findings import Finding
from raptide.operations.nodes import NodeFacts

ANSWER_S = 180.0
"""Seconds that a node may take to start a process and to answer."""

TRIES = 2
"""More, where a worker dies beside a task: Ray may end one just as it is given the task."""


@dataclass(frozen=True)
class Place:
    """A node as Ray knows it."""

    id: str
    host: str
    address: str
    ports: tuple[int, ...]
    cpus: int
    gpus: int
    store_bytes: float

    @property
    def name(self) -> str:
        return f"{self.address} ({self.host}, {self.id[:6]})"

    def kind(self, facts: NodeFacts) -> str:
        """What it is compared by."""
        return facts.gpus[0].name if facts.gpus else f"{self.cpus} CPUs"

    @property
    def strategy(self) -> NodeAffinitySchedulingStrategy:
        return NodeAffinitySchedulingStrategy(self.id, soft=False)


def alive_places() -> list[Place]:
    """The cluster's nodes, the head first."""
    places: list[Place] = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        has = node["Resources"]
        place = Place(
            id=node["NodeID"],
            host=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            ports=(node["NodeManagerPort"], node["ObjectManagerPort"]),
            cpus=int(has.get("CPU", 0)),
            gpus=int(has.get("GPU", 0)),
            store_bytes=has.get("object_store_memory", 0.0),
        )
        is_head = "node:__internal_head__" in has
        places.insert(0, place) if is_head else places.append(place)
    return places


def answers(
    tasks: Mapping[Place, Any], findings: list[Finding], what: str
) -> Iterator[tuple[Place, Any]]:
    """What each place's task returns; one that returns nothing is a finding."""
    until = time.monotonic() + ANSWER_S
    for place, task in tasks.items():
        try:
            yield place, ray.get(task, timeout=max(until - time.monotonic(), 0.1))
        except (RayError, GetTimeoutError) as error:
            findings.append(
                Finding(
                    *("error", place.name, "answer"),
                    f"{what} ({reason_of(error)})",
                    "look at Ray's logs there (session_latest/logs/raylet.err): another Python, "
                    "Ray or image than the head's is the usual reason",
                )
            )


def reason_of(error: Exception) -> str:
    if isinstance(error, GetTimeoutError):
        return f"within {ANSWER_S:.0f} s"
    lines = str(getattr(error, "cause", None) or error).strip().splitlines()
    return (lines[-1].strip() if lines else type(error).__name__)[:200].rstrip(".")
