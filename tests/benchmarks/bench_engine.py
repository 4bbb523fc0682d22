"""Embedding speed of the engine against the libraries people use now, on this machine.

    python tests/benchmarks/bench_engine.py
    python tests/benchmarks/bench_engine.py --preset esm2_t30_150M --rounds 5 --json engine.json

Every peer gets the same random weights and the same real proteins of natural lengths (20 to 1,022),
and a process of its own. The processes take turns, one at work at a time, so that whatever else the
machine does hits all of them alike; ratios are medians over the rounds. The bound is the time of
the model's linear layers as bare matrix products, without attention, norms or anything else; a
second one adds torch's own attention kernel.

esm-cpp is installed into a virtual environment of its own (--esm-cpp names another Python that has
it; --esm-cpp "" leaves it out).
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

import numpy as np
import torch
from machine import publish

from raptide.alphabet import decode_sequences
from raptide.data.fasta import read_fasta
from raptide.model.config import PRESETS, ModelSettings
from raptide.model.contacts import ContactHead
from raptide.model.formats.detect import read_weights, write_weights
from raptide.model.formats.weights import Weights
from raptide.model.transformer import Esm

HERE = Path(__file__).parent
SHORTEST, LONGEST = 20, 1022
PACKAGES = ("raptide", "torch", "transformers", "fair-esm", "numpy")
ESM_CPP = "esm-cpp==0.2.1"


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
        self.first = self._next_line()

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
        raise SystemExit(
            f"The peer {self.name} ended with code {self._process.wait()}; run "
            f"{' '.join(map(str, self._process.args))} to see why."
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="esm2_t12_35M")
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--esm-cpp", metavar="PYTHON", help="a Python that has esm-cpp")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sequences = write_inputs(folder, args.preset, args.sequences)
        esm_cpp = install_esm_cpp(folder) if args.esm_cpp is None else args.esm_cpp
        report = measure(folder, sequences, args.rounds, args.threads, esm_cpp)
    report["preset"] = args.preset
    publish(report, PACKAGES, print_report, args.json)


def write_inputs(folder: Path, preset: str, count: int) -> list[str]:
    """Random weights as a bundle, and proteins of a real proteome in a fixed random order."""
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


def install_esm_cpp(folder: Path) -> str:
    """A Python with esm-cpp, or an empty string where it cannot be installed."""
    venv.create(folder / "esm-cpp", with_pip=True)
    python = str(folder / "esm-cpp/bin/python")
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", ESM_CPP], capture_output=True, text=True
    )
    if done.returncode != 0:
        print(f"{ESM_CPP} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        return ""
    return python


def measure(
    folder: Path, sequences: list[str], rounds: int, threads: int, esm_cpp: str
) -> dict[str, Any]:
    from engine_peers import PEERS

    names = [name for name in PEERS if esm_cpp or not name.startswith("esm-cpp")]
    peers = []
    try:
        for name in names:
            python = esm_cpp if name.startswith("esm-cpp") else sys.executable
            peers.append(Peer(name, python, folder, threads))
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            for peer in peers:
                seconds[peer.name].append(peer.run())
                print(f"round {number + 1}: {peer.name} {seconds[peer.name][-1]:.2f} s", flush=True)
        cosines = compare(peers)
    finally:
        for peer in peers:
            peer.stop()
    residues = sum(map(len, sequences))
    memory = measure_memory(folder, threads)
    return {
        "sequences": len(sequences),
        "residues": residues,
        "threads": threads,
        "seconds": seconds,
        "residues_per_s": {n: residues / statistics.median(s) for n, s in seconds.items()},
        "lowest_cosine_with_transformers_fp32": cosines,
        "memory_mb": memory,
        "ratios": ratios(seconds, memory),
    }


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
    half = read_weights(folder / "model")
    state = {name: tensor.bfloat16() for name, tensor in half.state.items()}
    (folder / "half").mkdir()
    write_weights(folder / "half/model", Weights(half.settings, state))
    tiny = Esm(ModelSettings(layers=1, width=32, heads=4)).initialise(1)
    write_weights(folder / "half/model-tiny", Weights.of(tiny))
    shutil.copy(folder / "sequences.json", folder / "half")
    peer = Peer("memory", sys.executable, folder / "half", threads)
    peer.stop()
    return peer.first


def ratios(seconds: dict[str, list[float]], memory: dict[str, float]) -> dict[str, float]:
    """Medians over the rounds of how many times faster raptide was."""

    def against(peer: str, mine: str = "raptide") -> float:
        pairs = zip(seconds[peer], seconds[mine], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    found = {
        "gemm_bound_fraction": against("matrix products bf16"),
        "gemm_and_attention_bound_fraction": against("products and attention bf16"),
        "gemm_bound_fraction_fp32": against("matrix products fp32", "raptide fp32"),
        "vs_transformers_bf16_sorted": against("transformers bf16 sorted"),
        "vs_transformers_fp32_sorted": against("transformers fp32 sorted"),
        "vs_fair_esm_sorted": against("fair-esm sorted"),
        "vs_fair_esm_file_order": against("fair-esm file order"),
        "peak_memory_less_output_vs_weights": (memory["grown_mb"] - memory["output_mb"])
        / memory["weights_mb"],
    }
    for kind in ("fp32", "int8"):
        if f"esm-cpp {kind}" in seconds:
            found[f"vs_esm_cpp_{kind}"] = against(f"esm-cpp {kind}")
    return {name: round(value, 3) for name, value in found.items()}


def print_report(report: dict[str, Any]) -> None:
    machine = report["machine"]
    print(
        f"\n{report['preset']}, {report['sequences']} proteins, {report['residues']:,} residues, "
        f"{report['threads']} threads\n{machine['processor']} {machine['flags']}\n"
        f"{machine['versions']}\n"
    )
    for name, speed in sorted(report["residues_per_s"].items(), key=lambda item: -item[1]):
        cosine = report["lowest_cosine_with_transformers_fp32"].get(name)
        shown = f"{cosine:>10.6f}" if cosine is not None else " " * 10
        print(f"  {name:<26}{speed:>10,.0f} residues/s{shown}")
    print("\nLast column: lowest cosine with the embeddings of transformers fp32.\n")
    for name, value in report["ratios"].items():
        print(f"  {name:<38}{value:>8.2f}")


if __name__ == "__main__":
    main()
