"""Speed of the stream and of training steps, against what people use now, on this machine.

    python tests/benchmarks/bench_training.py
    python tests/benchmarks/bench_training.py --rounds 5 --json training.json

- Preparation alone, one core: draw, crop, mask and pack blocks that are in memory, rows of 4,096
  tokens; reading and decompressing are not counted. Packing efficiency is that of these rows.
- The stream, all cores: from the Parquet shards to global batches, through Ray Data. And the part
  of it that is one process at any size, the feeder: what it hands out with its rows ready in
  memory, in tokens and, to one reader, in batches.
- Training steps of one ESM-2 shape in fp32 on the same proteins, in unpadded tokens a second:
  raptide (jobs/pretrain_model.py with one worker: Ray Train, DeepSpeed, stream, W&B offline), a
  bare PyTorch loop over raptide's model and rows, and transformers' EsmForMaskedLM on padded
  batches of as many sequences, in file order and sorted by length. All have --threads threads,
  which leave Ray's own processes a core, as on a node that computes on GPUs. They take turns: one
  trains some steps while all processes of the others, Ray's too, stand still. A ratio is of all
  tokens over all seconds of the rounds; a first round, which does not count, warms up.
- A checkpoint of a 35 M model: how long training stands still for it, against how long one takes
  until it counts with no training beside it, which is the cost of a save that everything waits for.
- Resume: from the start of the command to the first step that is logged, at 1% and at 90% of an
  epoch, with a model so small that the time is Ray's, DeepSpeed's and the stream's.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from machine import publish
from synthetic_proteins import write_proteins
from turns import TakesTurns, read_lines

from raptide.alphabet import ESM_33
from raptide.cluster import ray_session
from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.corpus import Corpus
from raptide.data.streaming.feeder import BatchReader, Feeder
from raptide.data.streaming.rows import RowSettings, pack_block
from raptide.data.streaming.stream import (
    Cursor,
    GlobalBatch,
    Source,
    StreamPlan,
    StreamSettings,
    _split_tables,
    _to_batch,
    _to_table,
    global_batches,
    prepare_rows,
)

JOB = Path(__file__).resolve().parents[2] / "jobs/pretrain_model.py"
PACKAGES = ("raptide", "ray", "torch", "deepspeed", "transformers", "numpy", "pyarrow")
PEERS = {
    "bare loop": "vs_bare_loop",
    "transformers, file order": "vs_transformers_file_order",
    "transformers, sorted": "vs_transformers_sorted",
}
"""Who else trains, and the name of the ratio of raptide's speed to theirs."""

CORES = len(os.sched_getaffinity(0))
ROW_TOKENS = 1024
PARTS = ("stream", "steps", "checkpoint", "resume")
RUN_PROTEINS = 20_000
RUN_BLOCKS = BuildSettings(block_residues=32_768)
"""Of the corpus that is trained on: small blocks, since each run ends with an evaluation of one."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="esm2_t6_8M")
    parser.add_argument("--proteins", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=4, help="packed rows of 1,024 tokens in a step")
    parser.add_argument("--steps", type=int, default=3, help="steps of each peer in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, CORES - 1),
        help="that train, in each peer (default: all cores but one, %(default)s here)",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(Path(scratch), args)
    publish(report, PACKAGES, print_report, args.json)


def measure(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {"ratios": {}, "preset": args.preset}
    ratios = report["ratios"]
    with ray_session(num_cpus=CORES):
        runs = synthetic_corpus(scratch, RUN_PROTEINS, RUN_BLOCKS)
        if "stream" in args.parts:
            corpus = synthetic_corpus(scratch, args.proteins, BuildSettings())
            prepared = measure_preparation(corpus, args.rounds)
            ratios["prepare_tokens_per_s"] = prepared["tokens_per_s"]
            ratios["stream_tokens_per_s"] = measure_stream(corpus)
            ratios["packing_efficiency"] = prepared["efficiency"]
            report["feeder"] = measure_feeder(corpus)
    if "steps" in args.parts:
        steps = measure_steps(scratch, runs, args)
        report["tokens_per_s"] = {
            name: [speed([turn]) for turn in turns] for name, turns in steps["turns"].items()
        }
        ratios["data_wait_fraction"] = statistics.median(steps["data_wait_fraction"])
        for name, ratio in PEERS.items():
            ratios[ratio] = speed(steps["turns"]["raptide"]) / speed(steps["turns"][name])
    if "checkpoint" in args.parts:
        report["checkpoint"] = measure_checkpoint(scratch, runs)
        stall, whole = (report["checkpoint"][name] for name in ("stall_s", "alone_s"))
        ratios["checkpoint_stall_vs_sync"] = statistics.median(stall) / whole
    if "resume" in args.parts:
        report["resume_s"] = measure_resume(scratch, runs)
    return report


def synthetic_corpus(scratch: Path, proteins: int, settings: BuildSettings) -> Corpus:
    fasta = scratch / f"{proteins}-{settings.block_residues}.fasta"
    write_proteins(fasta, proteins)
    return build_corpus([fasta], fasta.with_suffix(""), settings)


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
    count, tokens = 50, 0
    batches = global_batches(plan_of(corpus, batch_rows=1024), Cursor(), count)
    next(batches)
    started = time.perf_counter()
    for batch in batches:
        tokens += batch.num_tokens
    return tokens / (time.perf_counter() - started)


class ReadyFeeder(Feeder):
    """A feeder that hands out one batch again and again, so that nothing but handing out counts."""

    def __init__(self, batch: GlobalBatch, num_readers: int) -> None:
        self._batches = itertools.repeat(batch)
        self._num_readers = num_readers
        self._produced = 0
        self._kept = {}
        self._failure = None


def measure_feeder(corpus: Corpus) -> dict[str, float]:
    """Unpadded tokens per second of cutting alone, and calls per second of the actor."""
    plan = plan_of(corpus, batch_rows=128)
    tables = [_to_table(prepare_rows(plan, 0, place), 0, place) for place in range(2)]
    tokens, started = 0, time.perf_counter()
    while time.perf_counter() - started < 5:
        batch, _ = _split_tables(tables, 128)
        cut = _to_batch(batch, ROW_TOKENS)
        ray.put(cut)
        tokens += cut.num_tokens
    seconds = time.perf_counter() - started
    feeder = ray.remote(num_cpus=0)(ReadyFeeder).remote(cut, 1)
    reader = BatchReader(feeder, timeout_s=60)
    calls, began = 2000, 0.0
    for index, _ in enumerate(reader.batches(calls)):
        if index == 99:
            began = time.perf_counter()
    calls_per_s = (calls - 100) / (time.perf_counter() - began)
    return {"tokens_per_s": tokens / seconds, "calls_per_s": calls_per_s}


def plan_of(corpus: Corpus, batch_rows: int) -> StreamPlan:
    settings = StreamSettings(row_tokens=ROW_TOKENS, batch_rows=batch_rows)
    return StreamPlan((Source(str(corpus.path), corpus.digest),), settings, "esm-33")


def measure_steps(scratch: Path, corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Unpadded tokens and seconds of each peer, a pair a round; raptide's waits, one a step."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in ("raptide", *PEERS)}
    run = scratch / "run"
    with contextlib.ExitStack() as stack:
        peers = {}
        for name in turns:
            if name == "raptide":
                peer = start_raptide(run, corpus, args)
            else:
                peer = start_peer(name, scratch, corpus, args)
            peers[name] = stack.enter_context(contextlib.closing(peer))
        for number in range(args.rounds + 1):
            for name, peer in peers.items():
                turn = peer.turn(args.steps)
                print(f"round {number}: {name}: {speed([turn]):,.0f} tokens/s", flush=True)
                if number > 0:
                    turns[name].append(turn)
    waits = [line["speed/data_wait_fraction"] for line in read_metrics(run)[1 + args.steps :]]
    return {"turns": turns, "data_wait_fraction": waits}


def speed(turns: list[tuple[float, float]]) -> float:
    """Tokens per second over all turns: batches differ in padding, so none stands for all."""
    return sum(tokens for tokens, _ in turns) / sum(seconds for _, seconds in turns)


def start_raptide(folder: Path, corpus: Corpus, args: argparse.Namespace) -> TakesTurns:
    """A real run of one worker, which is stopped before it comes to its end."""
    tree = recipe_of(corpus, args.preset, args.rows, steps=1_000_000)
    tree["cluster"]["cpus_per_worker"] = args.threads
    job = start_job(
        "--config", write_recipe(folder, tree), "--output", folder, threads=args.threads
    )
    return TakesTurns(job, folder / "metrics.jsonl")


def start_peer(name: str, scratch: Path, corpus: Corpus, args: argparse.Namespace) -> TakesTurns:
    script = Path(__file__).with_name("training_peers.py")
    # As many batches as there are steps that count: each counts once.
    arguments = (name, corpus.path, args.preset, args.rows, args.rounds * args.steps)
    lines = scratch / f"{name}.jsonl"
    with lines.open("wb") as output:
        return TakesTurns(start(script, *arguments, threads=args.threads, stdout=output), lines)


def recipe_of(corpus: Corpus, preset: str, rows: int, steps: int) -> dict[str, Any]:
    return {
        "name": "bench",
        "corpus": str(corpus.path),
        # Few rows ahead, so that a short run soon sees what a long one does: no data tasks.
        "stream": {"row_tokens": ROW_TOKENS, "batch_rows": rows, "lookahead_mb": 16},
        "model": {"preset": preset},
        "training": {"steps": steps, "micro_batch_rows": rows, "precision": "fp32"},
        "cluster": {"workers": 1, "device": "cpu", "cpus_per_worker": CORES},
        "evaluation": {"every_steps": steps, "blocks": 1},
        "checkpoint": {"every_steps": steps},
        "tracking": {"mode": "offline", "log_every": 1},
    }


def run_job(folder: Path, tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Run jobs/pretrain_model.py to its end; the metrics of all its steps."""
    assert start_job("--config", write_recipe(folder, tree), "--output", folder).wait() == 0
    return read_metrics(folder)


def write_recipe(folder: Path, tree: dict[str, Any]) -> Path:
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(json.dumps(tree))  # YAML reads JSON
    return recipe


def start_job(*arguments: Any, threads: int = CORES) -> subprocess.Popen[bytes]:
    return start(JOB, *arguments, threads=threads, stdout=subprocess.DEVNULL)


def start(*command: Any, threads: int, stdout: Any) -> subprocess.Popen[bytes]:
    """Start a Python script that computes with so many threads."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=stdout,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metrics.jsonl")


def measure_checkpoint(scratch: Path, corpus: Corpus) -> dict[str, Any]:
    """Seconds that training stood still for each checkpoint, and what the last took, alone."""
    tree = recipe_of(corpus, "esm2_t12_35M", rows=1, steps=12)
    tree["checkpoint"] = {"every_steps": 4}
    folder = scratch / "checkpoints"
    lines = run_job(folder, tree)
    *beside, last = [line for line in lines if "speed/checkpoint_stall_s" in line]
    newest = max((folder / "checkpoints").glob("step-*"))
    return {
        "bytes": sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()),
        "stall_s": [line["speed/checkpoint_stall_s"] for line in beside],
        "alone_s": last["speed/checkpoint_s"],
    }


def measure_resume(scratch: Path, corpus: Corpus) -> dict[str, float]:
    """Seconds from the start of the command to its first step, by the place in the epoch."""
    rows, folder = 32, scratch / "resumed"
    epoch = corpus.manifest["counts"]["train"]["residues"] / (rows * ROW_TOKENS)
    found = {}
    for place in (0.01, 0.9):
        steps = max(1, round(place * epoch))
        if not found:
            tree = recipe_of(corpus, "esm2_t6_8M", rows, steps)
            run_job(folder, tree | {"model": {"layers": 1, "width": 16, "heads": 2}})
        else:
            assert start_job("--resume", folder, f"training.steps={steps}").wait() == 0
        began = time.perf_counter()
        job = start_job("--resume", folder, f"training.steps={steps + 3}")
        while read_metrics(folder)[-1]["trainer/global_step"] == steps:
            time.sleep(0.1)
        found[f"{place:.0%}"] = time.perf_counter() - began
        assert job.wait() == 0
        assert read_metrics(folder)[-1]["progress/epoch"] == 0
    return found


def print_report(report: dict[str, Any]) -> None:
    if "tokens_per_s" in report:
        print(f"\nTraining steps of {report['preset']}, unpadded tokens a second, every round")
        for name, rounds in report["tokens_per_s"].items():
            print(f"  {name:26}" + "".join(f"{speed:10,.0f}" for speed in rounds))
    if "checkpoint" in report:
        found = report["checkpoint"]
        stalls = ", ".join(f"{seconds:.2f}" for seconds in found["stall_s"])
        print(
            f"A checkpoint of {found['bytes'] / 1e9:.2f} GB: training stood still for {stalls} s; "
            f"alone it took {found['alone_s']:.2f} s"
        )
    if "feeder" in report:
        found = report["feeder"]
        print(
            f"The feeder alone: {found['tokens_per_s']:,.0f} tokens/s cut, "
            f"{found['calls_per_s']:,.0f} batches/s handed out"
        )
    for place, seconds in report.get("resume_s", {}).items():
        print(f"Resume at {place} of an epoch: first step after {seconds:.1f} s")
    for name, ratio in report["ratios"].items():
        print(f"  {name:34} {ratio:16,.3f}")
    print(json.dumps(report["machine"]))


if __name__ == "__main__":
    main()
