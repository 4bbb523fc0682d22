"""What lies outside of the nodes: the storage that all share, and W&B."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import ray

from raptide.operations.findings import Finding
from raptide.operations.nodes import NodeFacts, has_wandb_key
from raptide.operations.places import TRIES, Place, answers
from raptide.storage import Storage, storage_of

LOGIN_S = 20


def try_storage(places: Sequence[Place], uri: str) -> Iterator[Finding]:
    """Every node writes a file, which the next one reads."""
    storage, folder = storage_of(uri, "--storage"), f"raptide-check-{uuid.uuid4().hex[:12]}"
    write = ray.remote(num_cpus=0, max_retries=TRIES)(_write)
    read = ray.remote(num_cpus=0, max_retries=TRIES)(_read)
    remedy = "mount it on every node under one path, and let the nodes' users or keys write to it"
    silent: list[Finding] = []
    steps = {
        "cannot write to it": (write, 0),
        "does not see what the node before it wrote": (read, 1),
    }
    for what, (task, shift) in steps.items():
        tasks = {
            place: task.options(scheduling_strategy=place.strategy).remote(
                storage, f"{folder}/{(number + shift) % len(places)}"
            )
            for number, place in enumerate(places)
        }
        for place, problem in answers(tasks, silent, f"its process for {uri} failed"):
            if problem:
                yield Finding("error", place.name, "storage", f"it {what}: {problem}", remedy)
    yield from silent
    storage.delete(folder)


def _write(storage: Storage, name: str) -> str:
    return _problem_of(partial(storage.write, name, lambda file: file.write(name.encode())))


def _read(storage: Storage, name: str) -> str:
    def read() -> None:
        if storage.read(name) != name.encode():
            raise OSError("it holds something else")

    return _problem_of(read)


def _problem_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:  # of any file system
        return str(error).splitlines()[0].split(";")[0]
    return ""


def try_wandb(nodes: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    """Rank 0 may be on any node: all have a key that works, or none has."""
    having = {name: facts.has_wandb_key for name, facts in nodes.items()}
    if not any(having.values()):
        return
    for name, has in having.items():
        if not has:
            yield Finding(
                *("warning", name, "wandb"),
                "it has no W&B key, and others have",
                "set WANDB_API_KEY on every node, or tracking.mode=offline in the recipe",
            )
    if has_wandb_key() and (why := _refused_login()) is not None:
        yield Finding(
            *("warning", "cluster", "wandb"),
            f"W&B does not take the key ({why})",
            "renew WANDB_API_KEY, open the way to api.wandb.ai, or set tracking.mode=offline",
        )


def _refused_login() -> str | None:
    """Why the key at hand does not log in, or None if it does."""
    import wandb  # seconds, which most checks do not need

    try:
        if wandb.Api(timeout=LOGIN_S).viewer is None:
            return "it belongs to nobody"
    except Exception as error:  # network, service and key, each with errors of its own
        return " ".join(str(error).split())[:150].rstrip(".")
    return None
