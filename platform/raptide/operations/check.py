"""Every node of the cluster that this process has joined, looked at and tried out."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from raptide.operations.exercises import Exerciser
from raptide.operations.findings import (
    LEAST_DISK_GB,
    Finding,
    judge_clocks,
    judge_node,
    judge_speeds,
    judge_versions,
)
from raptide.operations.nodes import NodeFacts, clock, node_facts
from raptide.operations.outside import try_storage, try_wandb
from raptide.operations.places import ANSWER_S, TRIES, Place, alive_places, answers, reason_of

NEIGHBOURS = 4
"""Nodes whose ports each one tries to reach, besides the head's: all pairs would be too many."""

SUMMED_MB = {"CPU": 16, "GPU": 256}
PRODUCT_S, SHORT_PRODUCT_S = 1.5, 0.4

COMPUTE_REMEDY = (
    "look what else runs there, at its clocks and its cooling (nvidia-smi -q -d PERFORMANCE), or "
    "take it out"
)
NETWORK_REMEDY = (
    "look at its card and its cable (ibstat, ethtool), and at NCCL_SOCKET_IFNAME or "
    "GLOO_SOCKET_IFNAME where it has several"
)


@dataclass(frozen=True)
class CheckOptions:
    """What is checked."""

    storage: str | None = None
    """A folder or URI that every node writes to and reads from; None leaves that out."""

    disk_gb: float = LEAST_DISK_GB
    short: bool = False
    """As before training: shorter products, and one sum over all nodes instead of many."""


@dataclass
class Report:
    """What was found."""

    nodes: dict[str, NodeFacts] = field(default_factory=dict)
    measures: dict[str, dict[str, float]] = field(default_factory=dict)
    """By what was measured and node, or names of several."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    def to_json(self) -> dict[str, Any]:
        return {"ok": not self.errors, **asdict(self)}


def check_cluster(options: CheckOptions, say: Callable[[str], None] = lambda _: None) -> Report:
    """Look at every node that is alive. Ray must be running.

    Args:
        say: told what is being done.
    """
    started, report = time.monotonic(), Report()
    places = alive_places()
    say(f"looking at {len(places)} nodes")
    answered = _look(places, report)
    report.nodes = {place.name: facts for place, facts in answered.items()}
    report.findings += judge_versions(report.nodes)
    for place, facts in answered.items():
        report.findings += judge_node(
            place.name, facts, disk_gb=options.disk_gb, store_bytes=place.store_bytes
        )
    report.findings += judge_clocks(_skews(answered))
    _try_out(answered, options, report, say)
    if options.storage is not None:
        say(f"writing to {options.storage}")
        report.findings += try_storage(list(answered), options.storage)
    report.findings += try_wandb(report.nodes)
    if not any(facts.has_wandb_key for facts in report.nodes.values()):
        report.notes.append("No node has a W&B key: runs are kept offline (wandb sync).")
    report.seconds = time.monotonic() - started
    return report


def _look(places: Sequence[Place], report: Report) -> dict[Place, NodeFacts]:
    """The facts of each node that answers."""
    look = ray.remote(num_cpus=0, max_retries=TRIES)(node_facts)
    folder = ray._private.worker._global_node.get_session_dir_path()
    tasks = {
        place: look.options(scheduling_strategy=place.strategy).remote(
            folder, _ports_to_reach(places, number)
        )
        for number, place in enumerate(places)
    }
    return dict(answers(tasks, report.findings, "it does not answer"))


def _ports_to_reach(places: Sequence[Place], number: int) -> list[tuple[str, int]]:
    following = [places[(number + n) % len(places)] for n in range(1, NEIGHBOURS + 1)]
    others = dict.fromkeys(place for place in (places[0], *following) if place != places[number])
    return [(place.address, port) for place in others for port in place.ports]


def _skews(places: Iterable[Place]) -> dict[str, float]:
    """How far each clock is ahead of this process's, in seconds, with the way there taken off."""
    ask = ray.remote(num_cpus=0, max_retries=TRIES)(clock)
    skews = {}
    for place in places:
        before = time.time()
        try:
            task = ask.options(scheduling_strategy=place.strategy).remote()
            there = ray.get(task, timeout=ANSWER_S)
        except (RayError, GetTimeoutError):
            continue
        after = time.time()
        outside = max(before - there, there - after, 0.0)
        skews[place.name] = outside if there > after else -outside
    return skews


def _try_out(
    answered: Mapping[Place, NodeFacts],
    options: CheckOptions,
    report: Report,
    say: Callable[[str], None],
) -> None:
    """Products on each node that can train, and sums over several of them."""
    kind = "GPU" if any(place.gpus for place in answered) else "CPU"
    trying = [place for place in answered if (place.gpus if kind == "GPU" else place.cpus)]
    if not trying:
        return
    say(f"matrix products on {len(trying)} nodes")
    actors = {place: _exercisers(place, kind, options) for place in trying}
    seconds = SHORT_PRODUCT_S if options.short else PRODUCT_S
    products: dict[str, float] = {}
    for turn in _turns(trying):
        tasks = {place: actors[place][0].product.remote(seconds) for place in turn}
        for place, speed in answers(tasks, report.findings, "it could not be tried out"):
            products[place.name] = speed
    report.measures["product_tflops"] = products
    kinds = {place.name: place.kind(answered[place]) for place in trying}
    report.findings += judge_speeds(products, kinds, "matrix product", "TFLOP/s", COMPUTE_REMEDY)
    able = {place: actors[place] for place in trying if place.name in products}
    _sum_up(able, kinds, SUMMED_MB[kind], options, report, say)
    for each in actors.values():
        for actor in each:
            ray.kill(actor)


def _exercisers(place: Place, kind: str, options: CheckOptions) -> list[Any]:
    """One for each GPU of a node; on CPUs two, which share them."""
    count = place.gpus if kind == "GPU" else 2
    make = ray.remote(Exerciser).options(
        num_cpus=0,
        num_gpus=1 if kind == "GPU" else 0,
        scheduling_strategy=place.strategy,
    )
    return [make.remote(max(1, place.cpus)) for _ in range(1 if options.short else count)]


def _turns(places: Sequence[Place]) -> Iterator[list[Place]]:
    """All nodes at once, but for those that share a machine."""
    sharing: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        sharing[place.host].append(place)
    for number in range(max(map(len, sharing.values()))):
        yield [group[number] for group in sharing.values() if number < len(group)]


def _sum_up(
    actors: Mapping[Place, list[Any]],
    kinds: Mapping[str, str],
    megabytes: int,
    options: CheckOptions,
    report: Report,
    say: Callable[[str], None],
) -> None:
    places = list(actors)
    if len(places) > 1:
        say(f"a sum over {len(places)} nodes")
        everyone = {place.name: actors[place][0] for place in places}
        _sum_over(everyone, megabytes, report, "all_nodes_gb_s")
    if options.short:
        return
    for place in places:
        if len(actors[place]) > 1:
            names = {f"{place.name}#{n}": actor for n, actor in enumerate(actors[place])}
            speed = _sum_over(names, megabytes, report, None)
            if speed is not None:
                report.measures.setdefault("on_node_gb_s", {})[place.name] = speed
    on_node = report.measures.get("on_node_gb_s", {})
    report.findings += judge_speeds(on_node, kinds, "sum on the node", "GB/s", NETWORK_REMEDY)
    if len(places) > 2:  # two nodes are the pair of all
        say("sums between pairs of nodes")
        best: dict[str, float] = defaultdict(float)
        for one, other in zip(places, [*places[1:], places[0]], strict=True):
            pair = {each.name: actors[each][0] for each in (one, other)}
            speed = _sum_over(pair, megabytes, report, "pairs_gb_s")
            for each in (one, other):
                best[each.name] = max(best[each.name], speed or 0.0)
        # A node is as fast as the better of its two pairs: a slow neighbour is not held against it.
        report.findings += judge_speeds(best, kinds, "sum with neighbours", "GB/s", NETWORK_REMEDY)


def _sum_over(
    actors: Mapping[str, Any], megabytes: int, report: Report, measure: str | None
) -> float | None:
    """GB/s of a sum over some processes, noted in the report; None where it came to nothing."""
    members = " - ".join(actors)
    try:
        first = next(iter(actors.values()))
        place = ray.get(first.meeting_point.remote(), timeout=ANSWER_S)
        tasks = [
            actor.all_reduce.remote(place, rank, len(actors), megabytes)
            for rank, actor in enumerate(actors.values())
        ]
        speed = min(ray.get(tasks, timeout=ANSWER_S))
    except (RayError, GetTimeoutError) as error:
        report.findings.append(
            Finding(
                *("error", members, "all-reduce"),
                f"a sum over them failed ({reason_of(error)})",
                f"let all ports pass between them; else {NETWORK_REMEDY}",
            )
        )
        return None
    if measure is not None:
        report.measures.setdefault(measure, {})[members] = speed
    return speed
