"""Speed of the stream and of training steps, against what people use now, on this machine.

    python tests/benchmarks/bench_training.py
    python tests/benchmarks/bench_training.py --rounds 5 --json training.json

- Preparation alone, one core: draw, crop, mask and pack blocks that are in memory, rows of 4,096
  tokens; reading and decompressing are not counted. Packing efficiency is that of these rows.
- The stream, all cores: from the Parquet shards to global batches, through Ray Data.
- Training steps of one ESM-2 shape in fp32 on the same proteins, each peer in a process of its own,
  in turn, all cores; tokens are unpadded ones, and figures medians over the rounds:
  raptide (jobs/pretrain_model.py with one worker: Ray Train, DeepSpeed, stream, W&B offline), a
  bare PyTorch loop over raptide's model and rows, and transformers' EsmForMaskedLM on padded
  batches of as many sequences, in file order and sorted by length.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import publish
from synthetic_proteins import write_proteins

from raptide.alphabet import ESM_33
from raptide.cluster import ray_session
from raptide.data.build import BuildSettings, build_corpus
from raptide.data.corpus import Corpus
from raptide.data.rows import RowSettings, pack_block
from raptide.data.stream import Cursor, Source, StreamPlan, StreamSettings, global_batches

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("raptide", "ray", "torch", "deepspeed", "transformers", "numpy", "pyarrow")
PEERS = ("raptide", "bare loop", "transformers, file order", "transformers, sorted")
ROW_TOKENS = 1024
LOG_EVERY = 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="esm2_t6_8M")
    parser.add_argument("--proteins", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=8, help="packed rows of 1,024 tokens in a step")
    parser.add_argument("--steps", type=int, default=6, help="steps of each peer in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(Path(scratch), args)
    publish(report, PACKAGES, print_report, args.json)


def measure(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    fasta = scratch / "proteins.fasta"
    write_proteins(fasta, args.proteins)
    with ray_session(num_cpus=len(os.sched_getaffinity(0))):
        corpus = build_corpus([fasta], scratch / "corpus", BuildSettings())
        prepared = measure_preparation(corpus, args.rounds)
        streamed = measure_stream(corpus)
    steps = measure_steps(scratch, corpus, args)
    speed = {name: statistics.median(rounds) for name, rounds in steps["tokens_per_s"].items()}
    ours = speed["raptide"]
    return {
        "ratios": {
            "prepare_tokens_per_s": prepared["tokens_per_s"],
            "stream_tokens_per_s": streamed,
            "packing_efficiency": prepared["efficiency"],
            "data_wait_fraction": statistics.median(steps["data_wait_fraction"]),
            "vs_transformers_file_order": ours / speed["transformers, file order"],
            "vs_transformers_sorted": ours / speed["transformers, sorted"],
            "vs_bare_loop": ours / speed["bare loop"],
        },
        "preset": args.preset,
        "tokens_per_s": steps["tokens_per_s"],
    }


def measure_preparation(corpus: Corpus, rounds: int) -> dict[str, float]:
    """Unpadded tokens per second of one core, and their share of the rows."""
    blocks = [corpus.read_block(block) for block in corpus.blocks("train")[:8]]
    settings = RowSettings(row_tokens=4096)
    seconds, tokens, places = [], 0, 0
    for epoch in range(rounds):
        started = time.perf_counter()
        packed = [pack_block(b, settings, ESM_33, 1, epoch, i) for i, b in enumerate(blocks)]
        seconds.append(time.perf_counter() - started)
        tokens = sum(int(fill.sum()) for rows in packed for fill in rows.segments)
        places = sum(rows.tokens.size for rows in packed)
    return {"tokens_per_s": tokens / statistics.median(seconds), "efficiency": tokens / places}


def measure_stream(corpus: Corpus) -> float:
    """Unpadded tokens per second of global batches, after the first one."""
    settings = StreamSettings(row_tokens=ROW_TOKENS, batch_rows=1024)
    plan = StreamPlan((Source(str(corpus.path), corpus.digest),), settings, "esm-33")
    count = 50
    tokens = 0
    batches = global_batches(plan, Cursor(), count)
    next(batches)
    started = time.perf_counter()
    for batch in batches:
        tokens += sum(int(fill.sum()) for fill in batch.rows.segments)
    return tokens / (time.perf_counter() - started)


def measure_steps(scratch: Path, corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Unpadded tokens per second of each peer, a figure a round."""
    speeds: dict[str, list[float]] = {name: [] for name in PEERS}
    waits: list[float] = []
    for number in range(args.rounds):
        for name in PEERS:
            if name == "raptide":
                speed, wait = run_raptide(scratch / f"run-{number}", corpus, args)
                waits.append(wait)
            else:
                speed = run_peer(name, corpus, args)
            speeds[name].append(speed)
            print(f"round {number + 1}: {name}: {speed:,.0f} tokens/s", flush=True)
    return {"tokens_per_s": speeds, "data_wait_fraction": waits}


def run_raptide(folder: Path, corpus: Corpus, args: argparse.Namespace) -> tuple[float, float]:
    """A real run of one worker; its first step, which warms up, does not count."""
    recipe = folder.with_suffix(".yaml")
    steps = args.steps + 1
    tree = {
        "name": "bench",
        "corpus": str(corpus.path),
        "stream": {"row_tokens": ROW_TOKENS, "batch_rows": args.rows},
        "model": {"preset": args.preset},
        "training": {"steps": steps, "micro_batch_rows": args.rows, "precision": "fp32"},
        "cluster": {"workers": 1, "device": "cpu", "cpus_per_worker": os.cpu_count()},
        "evaluation": {"every_steps": steps, "blocks": 1},
        "checkpoint": {"every_steps": steps},
        "tracking": {"mode": "offline", "log_every": LOG_EVERY},
    }
    recipe.write_text(json.dumps(tree))  # YAML reads JSON
    subprocess.run(
        [sys.executable, ROOT / "jobs/pretrain_model.py", "--config", recipe, "--output", folder],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())},
    )
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    measured = [line for line in lines if 1 < line["trainer/global_step"] <= steps]
    speed = statistics.median(line["speed/tokens_per_s"] for line in measured)
    return speed, statistics.median(line["speed/data_wait_fraction"] for line in measured)


def run_peer(name: str, corpus: Corpus, args: argparse.Namespace) -> float:
    script = Path(__file__).with_name("training_peers.py")
    numbers = [str(number) for number in (args.rows, args.steps)]
    done = subprocess.run(
        [sys.executable, script, name, str(corpus.path), args.preset, *numbers],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.split()[-1])


def print_report(report: dict[str, Any]) -> None:
    print(f"\nTraining steps of {report['preset']}, unpadded tokens a second, every round")
    for name, rounds in report["tokens_per_s"].items():
        print(f"  {name:26}" + "".join(f"{speed:10,.0f}" for speed in rounds))
    for name, ratio in report["ratios"].items():
        print(f"  {name:34} {ratio:16,.3f}")
    print(json.dumps(report["machine"]))


if __name__ == "__main__":
    main()
