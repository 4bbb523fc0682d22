"""Embedding speed of the engine against the libraries people use now, on this machine.

    python tests/benchmarks/bench_engine.py
    python tests/benchmarks/bench_engine.py --preset esm2_t30_150M --rounds 5 --json engine.json
    python tests/benchmarks/bench_engine.py --quick

Every peer gets the same random weights and the same real proteins of natural lengths (20 to 1,022),
and a process of its own. The processes take turns, one at work at a time, so that whatever else the
machine does hits all of them alike; ratios are medians over the rounds. The bound is the time of
the model's linear layers as bare matrix products, without attention, norms or anything else; a
second one adds torch's own attention kernel.

esm-cpp is installed into a virtual environment of its own (--esm-cpp names another Python that has
it; --esm-cpp "" leaves it out). Where it cannot be installed it is left out; the report says so.

Needs the extra `dev`: pip install -c constraints.txt -e '.[dev]'
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from importlib.resources import files
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
from machine import CORES

from raptide.alphabet import decode_sequences
from raptide.data.fasta import read_fasta
from raptide.errors import ConfigError, RaptideError
from raptide.model.config import PRESETS, ModelSettings

HERE = Path(__file__).parent
SHORTEST, LONGEST = 20, 1022
PACKAGES = ("raptide", "torch", "transformers", "fair-esm", "numpy")
ESM_CPP = "esm-cpp==0.2.1"
QUICK = {"preset": "esm2_t6_8M", "sequences": 16, "rounds": 1}
RATIOS = {
    "gemm_bound_fraction": ("matrix products bf16", "raptide"),
    "gemm_and_attention_bound_fraction": ("products and attention bf16", "raptide"),
    "gemm_bound_fraction_fp32": ("matrix products fp32", "raptide fp32"),
    "vs_transformers_bf16_sorted": ("transformers bf16 sorted", "raptide"),
    "vs_transformers_fp32_sorted": ("transformers fp32 sorted", "raptide"),
    "vs_fair_esm_sorted": ("fair-esm sorted", "raptide"),
    "vs_fair_esm_file_order": ("fair-esm file order", "raptide"),
    "vs_esm_cpp_fp32": ("esm-cpp fp32", "raptide"),
    "vs_esm_cpp_int8": ("esm-cpp int8", "raptide"),
    "lanes": ("raptide without lanes", "raptide"),
    "lone_after_lanes": ("raptide one by one without lanes", "raptide one by one"),
}
"""By the name of a ratio: a peer, and what its seconds are divided by."""

ROOM_GB = 3.0
"""For models of up to 150 M parameters, and for esm-cpp."""


class Peer:
    """A library at work in another process."""

    def __init__(self, name: str, python: str, folder: Path, threads: int) -> None:
        self.name = name
        self.answers = folder / f"{name.replace(' ', '-')}.npy"
        script = HERE / "engine_peers.py"
        # The second one is esm-cpp's.
        env = {"OMP_NUM_THREADS": str(threads), "ESM_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [python, script, name, folder / "model", folder / "sequences.json", self.answers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | env | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )

    def ready(self) -> dict[str, Any]:
        """Wait until it has loaded everything; what it says then."""
        return self._next_line()

    def run(self) -> float:
        """Seconds of one pass."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._next_line()["seconds"]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _next_line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RaptideError(
            f"The peer {self.name} ended with code {self._process.wait()}; run "
            f"{' '.join(map(str, self._process.args))} to see why."
        )


def parse() -> argparse.Namespace:
    parser = by_hand.script_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="esm2_t12_35M")
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=CORES)
    parser.add_argument("--esm-cpp", metavar="PYTHON", help="a Python that has esm-cpp")
    return by_hand.parse(parser, QUICK)


def main() -> None:
    args = parse()
    by_hand.need_packages("transformers", "esm", "pyhmmer")
    by_hand.need_room(ROOM_GB)
    if args.esm_cpp:
        need_esm_cpp(args.esm_cpp)
    with (
        by_hand.Report("bench_engine", args, PACKAGES, print_report, ratios) as report,
        tempfile.TemporaryDirectory() as scratch,
    ):
        folder = Path(scratch)
        sequences = write_inputs(folder, args.preset, args.sequences)
        report |= {
            "preset": args.preset,
            "sequences": len(sequences),
            "residues": sum(map(len, sequences)),
            "threads": args.threads,
        }
        esm_cpp = install_esm_cpp(folder, report) if args.esm_cpp is None else args.esm_cpp
        measure(folder, args, esm_cpp, report)


def need_esm_cpp(python: str) -> None:
    """Refuse a Python that is none, or lacks esm-cpp."""
    look = "from importlib.util import find_spec; raise SystemExit(find_spec('esm_cpp') is None)"
    program = shutil.which(python)
    if program is None or subprocess.run([program, "-c", look], check=False).returncode != 0:
        raise ConfigError(
            f"--esm-cpp must be a Python that has esm-cpp, and {python} is none; install it with: "
            f"{python} -m pip install {ESM_CPP}"
        )


def write_inputs(folder: Path, preset: str, count: int) -> list[str]:
    """Random weights as a bundle, and proteins of a real proteome in a fixed random order."""
    import torch

    from raptide.model.contacts import ContactHead
    from raptide.model.formats.detect import write_weights
    from raptide.model.formats.weights import Weights
    from raptide.model.transformer import Esm

    settings = ModelSettings.model_validate({"preset": preset})
    head = ContactHead(torch.zeros(1, settings.layers * settings.heads), torch.zeros(1))
    weights = Weights.of(Esm(settings).initialise(1))
    write_weights(folder / "model", Weights(settings, weights.state, contact_head=head))
    proteome = files("pyhmmer") / "tests/data/seqs/938293.PRJEB85.HG003687.faa"
    proteins = []
    for batch in read_fasta(str(proteome), 1000):
        residues = np.frombuffer(batch.residues, np.uint8)
        proteins += decode_sequences(residues, np.asarray(batch.lengths))
    fitting = [p for p in proteins if SHORTEST <= len(p) <= LONGEST]
    chosen = np.random.default_rng(1).permutation(len(fitting))[:count]
    sequences = [fitting[i] for i in chosen]
    (folder / "sequences.json").write_text(json.dumps(sequences))
    return sequences


def install_esm_cpp(folder: Path, report: by_hand.Report) -> str:
    """A Python with esm-cpp, or an empty string where it cannot be installed."""
    venv.create(folder / "esm-cpp", with_pip=True)
    python = str(folder / "esm-cpp/bin/python")
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", ESM_CPP], capture_output=True, text=True
    )
    if done.returncode != 0:
        report.leave_out(ESM_CPP, f"not installed: {done.stderr.strip().splitlines()[-1]}")
        return ""
    return python


def measure(folder: Path, args: argparse.Namespace, esm_cpp: str, report: by_hand.Report) -> None:
    """All peers, round by round."""
    from engine_peers import PEERS

    names = [name for name in PEERS if esm_cpp or not name.startswith("esm-cpp")]
    peers: list[Peer] = []
    try:
        with report.part("seconds"):
            for name in names:
                python = esm_cpp if name.startswith("esm-cpp") else sys.executable
                peers.append(Peer(name, python, folder, args.threads))
            for peer in peers:
                peer.ready()
                print(f"{peer.name} is ready", flush=True)
            seconds = report["seconds"] = {name: [] for name in names}
            for number in range(args.rounds):
                for peer in peers:
                    seconds[peer.name].append(taken := peer.run())
                    print(f"round {number + 1}: {peer.name} {taken:.2f} s", flush=True)
        with report.part("lowest_cosine_with_transformers_fp32"):
            report["lowest_cosine_with_transformers_fp32"] = compare(peers)
    finally:
        for peer in peers:
            peer.stop()
    with report.part("memory_mb"):
        report["memory_mb"] = measure_memory(folder, args.threads)


def compare(peers: list[Peer]) -> dict[str, float]:
    """Lowest cosine of each peer's embeddings with those of transformers in fp32."""
    answers = {peer.name: np.load(peer.answers) for peer in peers if peer.answers.exists()}
    reference = answers["transformers fp32 sorted"]
    norms = {name: np.linalg.norm(array, axis=1) for name, array in answers.items()}
    own = norms["transformers fp32 sorted"]
    return {
        name: float(((array * reference).sum(1) / norms[name] / own).min())
        for name, array in answers.items()
    }


def measure_memory(folder: Path, threads: int) -> dict[str, float]:
    """What the engine adds to a process at the 4,096-token batches it uses by default."""
    from raptide.model.formats.detect import read_weights, write_weights
    from raptide.model.formats.weights import Weights
    from raptide.model.transformer import Esm

    half = read_weights(folder / "model")
    state = {name: tensor.bfloat16() for name, tensor in half.state.items()}
    (folder / "half").mkdir()
    write_weights(folder / "half/model", Weights(half.settings, state))
    tiny = Esm(ModelSettings(layers=1, width=32, heads=4)).initialise(1)
    write_weights(folder / "half/model-tiny", Weights.of(tiny))
    shutil.copy(folder / "sequences.json", folder / "half")
    peer = Peer("memory", sys.executable, folder / "half", threads)
    try:
        return peer.ready()
    finally:
        peer.stop()


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """Medians over the rounds of how many times faster raptide was; of what a report has."""
    seconds, memory = report.get("seconds", {}), report.get("memory_mb")
    found = {}
    for name, (peer, mine) in RATIOS.items():
        # The last round may have broken off.
        rounds = list(zip(seconds.get(peer, ()), seconds.get(mine, ()), strict=False))
        if rounds:
            found[name] = statistics.median(theirs / ours for theirs, ours in rounds)
    if memory is not None:
        added = memory["grown_mb"] - memory["output_mb"]
        found["peak_memory_less_output_vs_weights"] = added / memory["weights_mb"]
    return {name: round(value, 3) for name, value in found.items()}


def print_report(report: dict[str, Any]) -> None:
    machine = report["machine"]
    if "preset" in report:
        print(
            f"\n{report['preset']}, {report['sequences']} proteins, {report['residues']:,} "
            f"residues, {report['threads']} threads"
        )
    print(f"{machine['processor']} {machine['flags']}\n{machine['versions']}\n")
    speeds = {
        name: report["residues"] / statistics.median(taken)
        for name, taken in report.get("seconds", {}).items()
        if taken
    }
    for name, speed in sorted(speeds.items(), key=lambda item: -item[1]):
        cosine = report.get("lowest_cosine_with_transformers_fp32", {}).get(name)
        shown = f"{cosine:>10.6f}" if cosine is not None else " " * 10
        print(f"  {name:<34}{speed:>10,.0f} residues/s{shown}")
    print("\nLast column: lowest cosine with the embeddings of transformers fp32.\n")
    for name, value in report["ratios"].items():
        print(f"  {name:<38}{value:>8.2f}")


if __name__ == "__main__":
    by_hand.run_script(main)
