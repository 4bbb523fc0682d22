"""A whole bulk job against the bare engine and against what people run now, on this machine.

    python tests/benchmarks/bench_bulk.py --json bulk.json
    python tests/benchmarks/bench_bulk.py --quick

Rates: the same random weights and the same real proteins of natural lengths for each, whole runs in
turn, start-up apart (Ray, workers, models), medians over the rounds; the job and the engine in the
precision they choose by themselves, the others in theirs, fp32. `vs_engine` is the rate of the
whole job over the faster of two bare engines: one with all cores, and one a core. The template is
Anyscale's for protein embeddings (Ray Data, transformers, four buckets by length); fair-esm is its
scripts/extract.py. These two, which are slow, get the first proteins only.

Memory: the largest growth of any process of the job from few short proteins to many. Resuming: a
job killed three times (kill -9 of the driver) and given again, over one that was not, start-ups
apart; files of both are compared.

Needs the extra `dev`: pip install -c constraints.txt -e '.[dev]'
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from importlib.resources import files
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import psutil
from machine import CORES

from raptide.alphabet import decode_sequences
from raptide.data.fasta import read_fasta
from raptide.errors import RaptideError
from raptide.model.config import PRESETS, ModelSettings

HERE = Path(__file__).parent
PACKAGES = ("raptide", "torch", "ray", "transformers", "fair-esm", "pyarrow")
QUICK = {
    "preset": "esm2_t6_8M",
    "sequences": 150,
    "peer_sequences": 40,
    "rounds": 1,
    "few": 2000,
    "many": 20_000,
}
KILLS = 3
SHORT = 30
"""Residues of the many proteins that memory is measured with."""
ROOM_GB = 3.0
LOOK_S = 0.2


def parse() -> argparse.Namespace:
    parser = by_hand.script_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="esm2_t12_35M")
    parser.add_argument("--sequences", type=int, default=400)
    parser.add_argument("--peer-sequences", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--few", type=int, default=20_000)
    parser.add_argument("--many", type=int, default=400_000)
    return by_hand.parse(parser, QUICK)


def main() -> None:
    args = parse()
    by_hand.need_packages("transformers", "esm", "pyhmmer")
    by_hand.need_room(ROOM_GB)
    with (
        by_hand.Report("bench_bulk", args, PACKAGES, print_report, ratios) as report,
        tempfile.TemporaryDirectory() as scratch,
    ):
        folder = Path(scratch)
        report |= {"preset": args.preset, "sequences": args.sequences, "engines": CORES}
        report["residues"] = write_inputs(folder, args)
        with report.part("seconds"):
            measure_rates(folder, args.rounds, report)
        with report.part("resuming"):
            report["resuming"] = measure_resuming(folder)
        with report.part("memory_mb"):
            report["memory_mb"] = measure_memory(folder, args)


def write_inputs(folder: Path, args: argparse.Namespace) -> dict[str, int]:
    """Random weights, and real proteins in a fixed random order; residues of each file."""
    from raptide.model.formats.detect import write_weights
    from raptide.model.formats.weights import Weights
    from raptide.model.transformer import Esm

    for name, shape in (("model", {"preset": args.preset}), ("tiny", TINY)):
        settings = ModelSettings.model_validate(shape)
        write_weights(folder / name, Weights.of(Esm(settings).initialise(1)))
    proteome = files("pyhmmer") / "tests/data/seqs/938293.PRJEB85.HG003687.faa"
    proteins = []
    for batch in read_fasta(str(proteome), 1000):
        residues = np.frombuffer(batch.residues, np.uint8)
        proteins += decode_sequences(residues, np.asarray(batch.lengths))
    fitting = [p for p in proteins if 20 <= len(p) <= 1022]
    chosen = np.random.default_rng(1).permutation(len(fitting))[: args.sequences]
    counts = {"proteins": args.sequences, "peers": args.peer_sequences}
    for name, count in counts.items():
        records = [f">p{number}\n{fitting[i]}\n" for number, i in enumerate(chosen[:count])]
        (folder / f"{name}.fasta").write_text("".join(records))
    return {n: sum(len(fitting[i]) for i in chosen[:count]) for n, count in counts.items()}


TINY = {"layers": 1, "width": 32, "heads": 4}


class Peer:
    """A way to embed, at work in another process."""

    def __init__(self, name: str, *arguments: object) -> None:
        self.name = name
        command = [sys.executable, HERE / "bulk_peers.py", name, *arguments]
        self.process = subprocess.Popen(
            [str(each) for each in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def next(self, *keys: str) -> dict[str, Any]:
        """The next line that says something of these."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{") and (said := json.loads(line)).keys() & set(keys):
                return said
        raise RaptideError(f"The peer {self.name} ended with {self.process.wait()}.")

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for each in (*root.children(recursive=True), root):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        self.process.wait()


def measure_rates(folder: Path, rounds: int, report: by_hand.Report) -> None:
    """Whole runs in turn, each in new processes but for the bare engines."""
    seconds: dict[str, list[float]] = {}
    report["seconds"], report["startup_s"] = seconds, []
    for number in range(rounds):
        for name, run in RUNS.items():
            taken, startup = run(folder, f"{name.replace(' ', '-')}-{number}")
            seconds.setdefault(name, []).append(taken)
            if startup is not None:
                report["startup_s"].append(startup)
            print(f"round {number + 1}: {name} {taken:.1f} s", flush=True)


def run_engines(folder: Path, count: int) -> tuple[float, None]:
    """Bare engines side by side, each with its share of records and cores."""
    places = (folder / "model", folder / "proteins.fasta")
    peers = [Peer("engine", *places, f"{number}/{count}", CORES) for number in range(count)]
    try:
        for peer in peers:
            peer.next("ready")
        for peer in peers:
            peer.go()
        return max(peer.next("seconds")["seconds"] for peer in peers), None
    finally:
        for peer in peers:
            peer.stop()


def run_peer(
    folder: Path, name: str, output: str, fasta: str = "proteins"
) -> tuple[float, float | None]:
    peer = Peer(name, folder / "model", folder / f"{fasta}.fasta", folder / output, CORES)
    try:
        said = peer.next("seconds")
        return said["seconds"], said.get("startup_s")
    finally:
        peer.stop()


PEERS = ("template", "fair-esm")

RUNS = {
    "raptide": lambda folder, output: run_peer(folder, "raptide", output),
    "one engine": lambda folder, output: run_engines(folder, 1),
    "an engine a core": lambda folder, output: run_engines(folder, CORES),
    "template": lambda folder, output: run_peer(folder, "template", output, "peers"),
    "fair-esm": lambda folder, output: run_peer(folder, "fair-esm", output, "peers"),
}


def measure_resuming(folder: Path) -> dict[str, Any]:
    """Seconds of a job that is killed KILLS times, and of one that is not; both from the first
    engine's start on."""
    uninterrupted, _ = run_peer(folder, "raptide", "whole")
    spent = 0.0
    for number in range(KILLS):
        spent += run_and_kill(folder, (number + 1) / (KILLS + 1))
    last, _ = run_peer(folder, "raptide", "killed")
    return {
        "kills": KILLS,
        "uninterrupted_s": uninterrupted,
        "killed_s": spent + last,
        "files_equal": digests(folder / "whole") == digests(folder / "killed"),
    }


def run_and_kill(folder: Path, share: float) -> float:
    """Kill a job when it has done this share; its seconds since the first engine's start."""
    peer = Peer("raptide", folder / "model", folder / "proteins.fasta", folder / "killed", CORES)
    residues, first = 0.0, None
    try:
        while True:
            said = peer.next("done")
            if first is None:
                first = said["done"]
            elif said["done"] >= share * said["total"]:
                residues = said["done"] - first
                return residues / said["rate"]
    finally:
        peer.stop()


def digests(output: Path) -> dict[str, str]:
    found = sorted((output / "parts").iterdir())
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in found}


def measure_memory(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Largest memory of each kind of process, MB, with few proteins and with many."""
    found: dict[str, Any] = {}
    for name, count in (("few", args.few), ("many", args.many)):
        fasta = folder / f"{name}.fasta"
        rng = np.random.default_rng(1)
        letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
        with fasta.open("w") as file:
            for number in range(count):
                protein = rng.choice(letters, SHORT).tobytes().decode()
                file.write(f">A0A{number:07d}\n{protein}\n")
        peer = Peer("raptide", folder / "tiny", fasta, folder / f"memory-{name}", CORES)
        with watching(peer.process.pid) as largest:
            peer.next("seconds")
        peer.stop()
        found[name] = {kind: round(most / 1e6) for kind, most in sorted(largest.items())}
    shared = found["few"].keys() & found["many"].keys()
    found["growth"] = max(found["many"][kind] - found["few"][kind] for kind in shared)
    return found


@contextlib.contextmanager
def watching(pid: int) -> Any:
    """The largest memory of a process and of all below it, by kind, without what they share."""
    largest: dict[str, int] = {}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(pid)
                for each in (root, *root.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                        memory = each.memory_info()
                        kind = kind_of(each)
                        own = memory.rss - memory.shared
                        largest[kind] = max(largest.get(kind, 0), own)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield largest
    finally:
        ended.set()
        thread.join()


def kind_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    for mark, kind in KINDS.items():
        if mark in line:
            return kind
    return process.name()


KINDS = {
    "bulk_peers": "driver",
    "raptide.bulk.child": "engine",
    "UnitWorker": "worker",
    "ray::": "task",
    "gcs_server": "gcs",
    "raylet/raylet": "raylet",
    "default_worker": "task",
}


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """What follows from the parts there are; medians over the rounds."""
    found = {}
    seconds = {name: taken for name, taken in report.get("seconds", {}).items() if taken}
    residues = report.get("residues", {})
    share = residues["proteins"] / residues["peers"] if residues else 1.0
    mine = seconds.get("raptide", [])
    engines = [seconds[name] for name in ("one engine", "an engine a core") if name in seconds]
    peers = {
        "vs_engine": [min(pair) for pair in zip(*engines, strict=False)] if engines else [],
        "vs_ray_template": [share * each for each in seconds.get("template", [])],
        "vs_fair_esm_extract": [share * each for each in seconds.get("fair-esm", [])],
    }
    for name, theirs in peers.items():
        if pairs := list(zip(theirs, mine, strict=False)):
            found[name] = statistics.median(their / my for their, my in pairs)
    if startup := report.get("startup_s"):
        found["startup_s"] = statistics.median(startup)
    if memory := report.get("memory_mb"):
        found["memory_growth_mb"] = memory["growth"]
    if resuming := report.get("resuming"):
        found["resume_overhead"] = resuming["killed_s"] / resuming["uninterrupted_s"]
    return found


def print_report(report: dict[str, Any]) -> None:
    """The figures there are."""
    for name, taken in report.get("seconds", {}).items():
        residues = report["residues"]["peers" if name in PEERS else "proteins"]
        middle = statistics.median(taken)
        print(f"{name:18}{middle:8.1f} s  {residues / middle:10,.0f} residues/s")
    for kind, most in report.get("memory_mb", {}).get("many", {}).items():
        print(f"{kind:18}{report['memory_mb']['few'].get(kind, 0):8} MB to {most} MB")
    if resuming := report.get("resuming"):
        print(f"killed {resuming['kills']} times, files equal: {resuming['files_equal']}")
    for name, value in report.get("ratios", {}).items():
        print(f"{name:24}{value:8.2f}")


if __name__ == "__main__":
    by_hand.run_script(main)
