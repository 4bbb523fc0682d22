"""A bulk job on three nodes to which everything happens."""

from __future__ import annotations

import gzip
import hashlib
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from by_hand import ROOT, Report
from ray.cluster_utils import Cluster

from raptide.errors import RaptideError

ENGINE, WORKER = "raptide.bulk.child", "MapBatches(UnitWorker)"
KINDS = ("engine", "worker", "driver", "ctrl-c", "node")
SHAPE = {"layers": 4, "width": 192, "heads": 6}
LETTERS = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
LONGEST_S = 300.0


def kill_everything(folder: Path, args: Namespace, report: Report) -> None:
    """Run the job untouched, and killed; what differs goes into the report."""
    rng = np.random.default_rng(args.seed)
    names = make_inputs(folder, args.proteins, rng)
    with report.part("untouched"):
        run = start(folder, "untouched", None)
        if run.wait(LONGEST_S):
            raise RaptideError(f"The untouched job ended with {run.returncode}.")
        report["untouched"] = {"rows": len(rows_of(folder / "untouched"))}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        with report.part("kills"):
            report["kills"] = harass(folder, args.kills, cluster, nodes, rng, report)
    finally:
        cluster.shutdown()
    with report.part("rows_equal"):
        compare(folder, names, report)


def make_inputs(folder: Path, count: int, rng: np.random.Generator) -> list[str]:
    """A model, and proteins in one plain and one compressed file; their names."""
    from raptide.model.config import ModelSettings
    from raptide.model.formats.detect import write_weights
    from raptide.model.formats.weights import Weights
    from raptide.model.transformer import Esm

    write_weights(folder / "model", Weights.of(Esm(ModelSettings(**SHAPE)).initialise(1)))
    names: list[str] = []
    for part in ("plain.fasta", "packed.fasta.gz"):
        records = []
        for number in range(count // 2):
            names.append(f"{part[:2]}{number}")
            letters = rng.choice(LETTERS, int(rng.integers(30, 600))).tobytes().decode()
            records.append(f">{names[-1]}\n{letters}\n")
        text = "".join(records).encode()
        (folder / part).write_bytes(gzip.compress(text) if part.endswith("gz") else text)
    return names


def start(folder: Path, output: str, address: str | None) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, ROOT / "jobs/embed_proteins.py", "--model", folder / "model"),
        *("--input", folder / "plain.fasta", folder / "packed.fasta.gz"),
        *("--output", folder / output, "--precision", "fp32", "--workers", "2"),
    ]
    env = {**os.environ, "RAY_ADDRESS": address or "local"}
    with (folder / f"{output}.log").open("ab") as log:
        return subprocess.Popen([str(each) for each in command], stdout=log, stderr=log, env=env)


def harass(
    folder: Path,
    kills: int,
    cluster: Cluster,
    nodes: list[Any],
    rng: np.random.Generator,
    report: Report,
) -> int:
    """Let things happen until there were so many kills and the job is through; how many."""
    done: Counter[str] = Counter()
    run = start(folder, "killed", cluster.address)
    plan = [KINDS[i % len(KINDS)] for i in range(kills)]
    rng.shuffle(plan)
    began = time.monotonic()
    while time.monotonic() - began < kills * LONGEST_S:
        if plan and run.poll() is None and ready(folder):
            time.sleep(float(rng.uniform(0.2, 4.0)))
            if kill(plan[0], run, cluster, nodes):
                print(f"{time.monotonic() - began:.0f} s: {plan[0]}", flush=True)
                done[plan.pop(0)] += 1
        code = run.poll()
        if code is not None:
            if not plan and code == 0:
                break
            if code == 0:  # more is to be killed than there was work: some of it anew
                forget_some(folder / "killed", rng)
            report["runs"] = report.get("runs", 1) + 1
            run = start(folder, "killed", cluster.address)
        time.sleep(0.2)
    report["by_kind"] = dict(done)
    if run.poll() != 0:
        run.kill()
        raise RaptideError("The killed job did not come to its end; look at its log.")
    return done.total()


def ready(folder: Path) -> bool:
    """Whether engines are at work."""
    return any(ENGINE in line for _, line in below())


def below() -> list[tuple[psutil.Process, str]]:
    """All processes of this script, with their command lines."""
    found = []
    for each in psutil.Process().children(recursive=True):
        try:
            found.append((each, " ".join(each.cmdline())))
        except psutil.Error:
            continue
    return found


def kill(kind: str, run: subprocess.Popen[bytes], cluster: Cluster, nodes: list[Any]) -> bool:
    """Whether it could be done."""
    if kind in ("driver", "ctrl-c"):
        run.send_signal(signal.SIGKILL if kind == "driver" else signal.SIGINT)
        run.wait(LONGEST_S)
        return True
    if kind == "node":
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
        nodes.append(cluster.add_node(num_cpus=1))
        return True
    mark = ENGINE if kind == "engine" else WORKER
    found = [each for each, line in below() if mark in line]
    if not found:
        return False
    try:
        found[0].kill()
    except psutil.NoSuchProcess:
        return False
    return True


def forget_some(output: Path, rng: np.random.Generator) -> None:
    """Take away half of the parts, as if the job had not come to them."""
    parts = sorted((output / "parts").iterdir())
    for index in rng.permutation(len(parts))[: len(parts) // 2]:
        parts[index].unlink()


def rows_of(output: Path) -> list[str]:
    return pq.read_table(output / "parts", columns=["id"])["id"].to_pylist()


def digests(output: Path) -> dict[str, str]:
    parts = sorted((output / "parts").iterdir())
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in parts}


def compare(folder: Path, names: list[str], report: Report) -> None:
    found = rows_of(folder / "killed")
    report["rows_equal"] = digests(folder / "untouched") == digests(folder / "killed")
    report["duplicates"] = len(found) - len(set(found))
    report["lost"] = len(set(names) - set(found))
    report["in_order"] = found == names
