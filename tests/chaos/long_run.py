"""A run of hours, and what its processes and folders hold meanwhile: pretrain_soak.py."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.fs
import ray
import yaml
from by_hand import Report
from checkout import ROOT
from moving_cluster import MovingCluster
from wild_run import chaos_recipe, last_step, metrics, proteome_corpus

from processes import free_port
from raptide import RaptideError

WARM_S = 900.0
"""What is young may grow: the run, and each process of it."""

LONG_S = 600.0
"""A process that was looked at for less, once it was old, has no slope."""

MOST_MB = 1.0
"""Growth in 1,000 steps."""

MORE_FILES = 30
"""In the run, each of whose starts leaves some, and in the bucket."""

SAMPLE_S = 10.0
FIRST_RESIZES = (0.2, 0.4, 0.6, 0.8)
"""Of the first quarter of an hour, or of a shorter run: a node comes, goes, comes, goes."""

AIMS = {"resizes": 4, "evaluations": 20, "benchmarks": 20}


def train_long(cluster: MovingCluster, scratch: Path, seconds: float, report: Report) -> None:
    corpus = proteome_corpus(scratch / "corpus")
    with bucket(scratch) as uri:
        recipe = long_recipe(str(corpus.path), uri, scratch)
        run, log = scratch / "run", (scratch / "log").open("w")
        command = [sys.executable, str(ROOT / "jobs/pretrain_model.py")]
        with report.part("training"):
            job = subprocess.Popen(
                [*command, "--config", str(recipe), "--output", str(run)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            memory = watch(cluster, job, run, uri, seconds, report)
            job.send_signal(signal.SIGTERM)
            report["exit_code"] = job.wait(300)
        report["log_end"] = (scratch / "log").read_text().splitlines()[-3:]
    lines = metrics(run)
    sizes = [line["system/workers"] for line in lines if "system/workers" in line]
    report |= {
        "steps": lines[-1]["trainer/global_step"],
        "resizes": sum(a != b for a, b in pairwise(sizes)),
        "evaluations": sum("eval/ece_masked" in line for line in lines),
        "benchmarks": sum(any(name.startswith("bench/") for name in line) for line in lines),
        "processes": memory.slopes(),
    }
    grown = [each for each in report["processes"] if each["mb_per_1000_steps"] > MOST_MB]
    first, last = report["files"]["early"], report["files"]["late"]
    more = {place: last[place] - first[place] for place in last}
    long = seconds > WARM_S + LONG_S
    report |= {
        "grown": grown,
        "too_young_to_tell": memory.young(),
        "more_files": more,
        "as_it_should_be": report["exit_code"] == 130
        and not grown
        and (not long or all(report[name] >= least for name, least in AIMS.items()))
        and (not long or bool(report["processes"]))
        and all(more[place] <= MORE_FILES for place in ("run", "bucket")),
    }


def long_recipe(corpus: str, uri: str, scratch: Path) -> Path:
    """Everything on; the file of a recipe without an end."""
    from raptide.data.corpus import Corpus

    tree = chaos_recipe(Corpus.open(corpus), 10_000_000, 2, (1, 3)).model_dump()
    tree["checkpoint"] |= {"every_steps": 200, "keep": 2, "keep_best": 2, "storage": uri}
    tree["checkpoint"]["bundle_every"] = 2
    tree["evaluation"] |= {"every_steps": 400, "asynchronous": True}
    tree["evaluation"]["benchmark"] = str(short_benchmark(scratch))
    tree["tracking"] |= {"mode": "offline", "log_every": 10, "audit": False}
    file = scratch / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def short_benchmark(scratch: Path) -> Path:
    """Structure and contacts of the chains that are shipped."""
    shipped = ROOT / "jobs/benchmarks/tiny"
    chains = {
        "train": str(shipped / "chains_train.parquet"),
        "test": {"chains": str(shipped / "chains_test.parquet")},
    }
    tasks = [{"kind": kind, **chains} for kind in ("secondary-structure", "contacts")]
    file = scratch / "benchmark.yaml"
    file.write_text(yaml.safe_dump({"name": "short", "tasks": tasks}))
    return file


@contextmanager
def bucket(scratch: Path) -> Iterator[str]:
    """The URI of a folder in a bucket, in a process of its own whose memory is not looked at."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    with (scratch / "moto.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            filesystem, _ = pyarrow.fs.FileSystem.from_uri(
                f"s3://soak?{options}&allow_bucket_creation=true"
            )
            await_server(filesystem)
            yield f"s3://soak/runs?{options}"
        finally:
            server.kill()
            server.wait()


def await_server(filesystem: pyarrow.fs.FileSystem) -> None:
    for _ in range(60):
        try:
            filesystem.create_dir("soak")
            return
        except OSError:
            time.sleep(1.0)
    raise RaptideError("The local S3 server did not start in a minute; see that moto runs here.")


def watch(
    cluster: MovingCluster,
    job: subprocess.Popen[bytes],
    run: Path,
    uri: str,
    seconds: float,
    report: Report,
) -> Memory:
    """Let time pass: nodes come and go, memory and files are looked at."""
    warm = min(WARM_S, seconds / 2)
    changes = [warm * part for part in FIRST_RESIZES]
    changes += [warm + (seconds - warm) * part for part in (0.5, 0.55)]
    memory, next_sample = Memory(), 0.0
    files: dict[str, Any] = {}
    while last_step(run) == 0 and job.poll() is None:
        time.sleep(0.5)
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        if job.poll() is not None:
            raise RaptideError(f"The run ended with {job.returncode} after {now:.0f} s.")
        if changes and now >= changes[0]:
            changes.pop(0)
            cluster.remove_node() if cluster.size > 2 else cluster.add_node()
            print(f"{now:.0f} s, step {last_step(run)}: {cluster.size} nodes", flush=True)
        if now >= next_sample:
            next_sample = now + SAMPLE_S
            memory.look(now, last_step(run), warm)
            if now >= warm:
                files.setdefault("early", count_files(run, uri))
        time.sleep(0.5)
    report["files"] = files | {"late": count_files(run, uri)}
    return memory


class Memory:
    """Private memory (USS) of this script's descendants by the steps that were made."""

    def __init__(self) -> None:
        self._samples: dict[tuple[int, float], list[tuple[float, int, float]]] = defaultdict(list)
        """When, at which step, and how many MB, of processes that were old enough."""
        self._names: dict[tuple[int, float], str] = {}
        self._first: dict[tuple[int, float], float] = {}

    def look(self, now: float, step: int, warm: float) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                name, key = shown_name(process), (process.pid, process.create_time())
                held_mb = process.memory_full_info().uss / 1e6
            except (psutil.Error, IndexError):  # it is just ending
                continue
            if name is None:
                continue
            self._names[key] = name
            first = self._first.setdefault(key, now)
            if now >= first + warm:
                self._samples[key].append((now, step, held_mb))

    def young(self) -> list[str]:
        """Names of processes that were looked at for too short a time, of each kind once."""
        kept = {key for key in self._samples if self._seconds(key) >= LONG_S}
        return sorted({self._names[key] for key in self._samples.keys() - kept})

    def _seconds(self, key: tuple[int, float]) -> float:
        return self._samples[key][-1][0] - self._samples[key][0][0]

    def slopes(self) -> list[dict[str, Any]]:
        """Of each process that was looked at for long, least squares and their lower end.

        Neighbouring samples are no independent ones, so the interval comes from means of tenths.
        """
        found = []
        for key, samples in self._samples.items():
            if self._seconds(key) < LONG_S:
                continue
            _, steps, held = np.array(samples, float).T
            slope = np.polyfit(steps, held, 1)[0]
            tenths = [part.mean() for part in np.array_split(held - slope * steps, 10)]
            centres = [part.mean() for part in np.array_split(steps, 10)]
            error = np.std(tenths, ddof=2) / (np.std(centres) * np.sqrt(len(centres)))
            found.append(
                {
                    "process": self._names[key],
                    "minutes": round(self._seconds(key) / 60),
                    "steps": int(steps[-1] - steps[0]),
                    "mb": [round(held[: len(held) // 10 + 1].mean(), 1), round(held[-1], 1)],
                    "mb_per_1000_steps": round(1000 * slope, 3),
                    "mb_per_1000_steps_at_least": round(1000 * (slope - 2 * error), 3),
                }
            )
        return sorted(found, key=lambda each: -each["mb_per_1000_steps"])


def shown_name(process: psutil.Process) -> str | None:
    """What a process does; None for the S3 server, which keeps what it is given in memory."""
    command = process.cmdline()
    if "moto.server" in command:
        return None
    if command[0].startswith("ray::"):
        return command[0].split("(")[0]
    script = next((part for part in command[1:] if part.endswith(".py")), command[0])
    return Path(script).name


def count_files(run: Path, uri: str) -> dict[str, int]:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
    stored = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    return {
        "run": sum(each.is_file() for each in run.rglob("*")),
        "bucket": sum(each.is_file for each in stored),
        "session": sum(each.is_file() for each in session.rglob("*")),
    }
