"""A run to which things happen, and one that is left alone: what pretrain_chaos.py compares."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import Future
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from by_hand import Report
from lone_worker import group_of_one, run_here
from moving_cluster import TRAINER, MovingCluster
from stumbling import Stumbles

from raptide import RaptideError
from raptide.config import parse_settings
from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.corpus import Corpus
from raptide.training.planning.recipe import Recipe
from raptide.training.trainer import RunResult, prepare_run, pretrain
from raptide.training.watching.audit import audited_steps

MOST_NODES = 4
KILLS = ("worker killed", "node killed", "node preempted")
EVENTS = (*KILLS, "node added", "storage gone")
CORPUS, STORAGE = "corpus", "storage"
"""Folders of a wild run, in which all stumbles."""

OUTAGE_S = 4.0
NOTICE_S = 8.0
END_BYTES = 20_000
"""Of the metrics, more than a line."""

PATIENCE_S = 300.0
"""Seconds without a new step after which the test gives up."""


def wreak_havoc(
    cluster: MovingCluster,
    scratch: Path,
    args: argparse.Namespace,
    report: Report,
    stumbles: Stumbles | None,
) -> None:
    corpus = proteome_corpus(scratch / "build")
    shutil.copytree(scratch / "build", scratch / CORPUS)
    with report.part("quiet run"), group_of_one(scratch):
        lonely = chaos_recipe(corpus, args.steps, args.zero_stage, (1, 1))
        quiet = run_here(lonely, scratch / "quiet")
    wild_corpus, storage = Corpus.open(str(scratch / CORPUS)), scratch / STORAGE
    recipe = chaos_recipe(wild_corpus, args.steps, args.zero_stage, (1, MOST_NODES))
    if stumbles is not None:
        recipe = recipe.model_copy(
            update={
                "checkpoint": recipe.checkpoint.model_copy(update={"storage": storage.as_uri()}),
                "tracking": recipe.tracking.model_copy(update={"mode": "online"}),
            }
        )
    began = time.monotonic()
    with report.part("wild run"):
        happened = report["events"] = Counter()
        wild = run_among_events(
            cluster, recipe, scratch / "wild", args.events, args.seed, happened, stumbles
        )
    sizes = [line["system/workers"] for line in metrics(wild.folder)]
    assert wild.audit is not None
    assert quiet.audit is not None
    failed = stumbles.counts() if stumbles is not None else Counter[str]()
    offline = (wild.folder / "wandb").glob("offline-run-*")
    failed["W&B out of reach"] = len(list(offline))
    report |= {
        "faults": sum(failed.values()),
        "faults_by_kind": failed,
        "kills": sum(happened[kind] for kind in KILLS),
        "resizes": sum(a != b for a, b in pairwise(sizes)),
        "audit_equal": dict(audited_steps(wild.folder)) == dict(audited_steps(quiet.folder)),
        "loss_max_abs_diff": greatest_difference(wild.folder, quiet.folder),
        "heldout_ece": [quiet.heldout_ece.all_chosen, wild.heldout_ece.all_chosen],
        "sizes": sorted(set(sizes)),
        "epochs": max(line["progress/epoch"] for line in metrics(wild.folder)) + 1,
        "restarts": wild.audit.attempts - 1,
        "redone_steps": wild.audit.redone_steps,
        "longest_redone": wild.audit.longest_redone,
        "checkpoint_every_steps": recipe.checkpoint.every_steps,
        "seconds": round(time.monotonic() - began),
    }


def proteome_corpus(folder: Path) -> Corpus:
    """2,100 real proteins that a test dependency ships."""
    fasta = Path(str(files("pyhmmer") / "tests/data/seqs/938293.PRJEB85.HG003687.faa"))
    return build_corpus([fasta], folder, BuildSettings(block_residues=32_768))


def chaos_recipe(
    corpus: Corpus,
    steps: int,
    zero_stage: int,
    workers: tuple[int, int],
    *,
    anywhere: bool = False,
    matrices: str = "adamw",
) -> Recipe:
    """A tiny model in fp32, whose steps say exactly what they trained on.

    Args:
        anywhere: workers need no node of their own.
    """
    tree = {
        "name": "chaos",
        "corpus": str(corpus.path),
        "stream": {"row_tokens": 512, "crop_tokens": 256, "batch_rows": 12, "seed": 3},
        "model": {"layers": 2, "width": 64, "heads": 4},
        "optimizer": {"lr": 1e-3, "warmup_steps": 10, "matrices": matrices},
        "training": {
            "steps": steps,
            "micro_batch_rows": 3,
            "precision": "fp32",
            "zero_stage": zero_stage,
            "zero3_keep_whole_below": 0,
        },
        "cluster": {
            "workers": list(workers),
            "device": "cpu",
            "worker_resources": {} if anywhere else {TRAINER: 1},
            "resize_check_s": 2,
            "max_failures": -1,
        },
        "checkpoint": {"every_steps": 5, "keep": 3},
        "evaluation": {"every_steps": 40, "blocks": 1},
        "tracking": {"log_every": 1, "audit": True, "mode": "disabled"},
    }
    return parse_settings(Recipe, tree, source="chaos")


def run_recipe(recipe: Recipe, folder: Path, *, resume: bool = False) -> RunResult:
    return pretrain(recipe, prepare_run(recipe, folder, resume=resume), folder)


def run_among_events(
    cluster: MovingCluster,
    recipe: Recipe,
    folder: Path,
    events: int,
    seed: int,
    happened: Counter[str],
    stumbles: Stumbles | None = None,
) -> RunResult:
    """Run to the end while one thing after the other happens, some random steps apart.

    Args:
        happened: counts them.
        stumbles: makes the storage go away; None, and it stays.
    """
    outcome: Future[RunResult] = Future()
    # Ray's cluster adds nodes in the main thread only. A script that fails does not wait for this.
    thread = threading.Thread(target=settle, args=(outcome, recipe, folder), daemon=True)
    thread.start()
    rng = random.Random(seed)
    for _ in range(events):
        await_step(folder, last_step(folder) + rng.randint(3, 15), outcome)
        happened[cause_something(cluster, rng, folder, outcome, stumbles)] += 1
        print(f"step {last_step(folder)}: {dict(happened)}, {cluster.size} nodes", flush=True)
    return outcome.result()


def settle(outcome: Future[RunResult], recipe: Recipe, folder: Path) -> None:
    try:
        outcome.set_result(run_recipe(recipe, folder))
    except BaseException as error:
        outcome.set_exception(error)


def cause_something(
    cluster: MovingCluster,
    rng: random.Random,
    folder: Path,
    outcome: Future[RunResult],
    stumbles: Stumbles | None,
) -> str:
    possible = ["worker killed", *(["storage gone"] if stumbles is not None else [])]
    if cluster.size > 1:
        possible += ["node killed", "node preempted"]
    if cluster.size < MOST_NODES:
        possible += ["node added", "node added"]
    event = rng.choice(possible)
    if event == "worker killed":
        while not cluster.kill_worker(rng.randrange(MOST_NODES)):
            time.sleep(0.1)  # they are just being started
    elif event == "storage gone":
        assert stumbles is not None
        stumbles.drop_out(OUTAGE_S)
    elif event == "node killed":
        cluster.remove_node(rng.randrange(cluster.size))
    elif event == "node preempted":
        node = cluster.announce_preemption(NOTICE_S, rng.randrange(cluster.size))
        time.sleep(NOTICE_S)
        cluster.end_node(node)
    else:
        cluster.add_node()
        await_size(folder, cluster.size, outcome)
    return event


def await_step(folder: Path, step: int, outcome: Future[RunResult]) -> None:
    """Until the run has got to a step."""
    seen, since = -1, time.monotonic()
    while (now := last_step(folder)) < step:
        if now != seen:
            seen, since = now, time.monotonic()
        if outcome.done():
            outcome.result()  # raises what ended it, if anything did
            raise RaptideError(f"The run ended at step {last_step(folder)}, before step {step}.")
        if time.monotonic() - since > PATIENCE_S:
            raise RaptideError(f"The run made no step after {seen} in {PATIENCE_S:.0f} s.")
        time.sleep(0.05)


def await_size(folder: Path, size: int, outcome: Future[RunResult]) -> None:
    """Until the run has taken in a new node, or has ended first."""
    since = time.monotonic()
    while not outcome.done() and time.monotonic() - since < PATIENCE_S:
        lines = metrics(folder)
        if lines and lines[-1]["system/workers"] == size:
            return
        time.sleep(0.2)


def metrics(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def last_step(folder: Path) -> int:
    """By the end of a file that is not read whole: a run of hours is asked often."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return 0
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - END_BYTES))
        lines = stream.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["trainer/global_step"] if lines else 0


def greatest_difference(one: Path, other: Path) -> float:
    """Between the losses of two runs, over all steps; each counts by its last occurrence."""
    curves = [
        {line["trainer/global_step"]: line["train/loss"] for line in metrics(folder)}
        for folder in (one, other)
    ]
    assert curves[0].keys() == curves[1].keys(), "the runs have logged other steps"
    return max(abs(curves[0][step] - curves[1][step]) for step in curves[0])
