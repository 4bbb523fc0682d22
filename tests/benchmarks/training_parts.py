"""The parts of bench_training.py that run for real, each on its own; others: full_size_parts.py."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from by_hand import Report
from full_size_parts import ROW_TOKENS, measure_blocks, measure_feeder, measure_ranks, plan_of
from machine import CORES
from synthetic_proteins import write_proteins
from turns import TakesTurns, read_lines

from raptide import RaptideError
from raptide.alphabet import ESM_33
from raptide.cluster import ray_session
from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.corpus import Corpus
from raptide.data.streaming.batch import Cursor, RowSettings
from raptide.data.streaming.rows import pack_block
from raptide.data.streaming.stream import global_batches

JOB = Path(__file__).resolve().parents[2] / "jobs/pretrain_model.py"
PEERS = {
    "bare loop": "vs_bare_loop",
    "transformers, file order": "vs_transformers_file_order",
    "transformers, sorted": "vs_transformers_sorted",
}
"""Who else trains, and the name of the ratio of raptide's speed to theirs."""

RUN_BLOCKS = BuildSettings(block_residues=32_768)
"""Of the corpus that is trained on: small blocks, since each run ends with an evaluation of one."""


def measure(scratch: Path, args: argparse.Namespace, report: Report) -> None:
    report["preset"] = args.preset
    report.setdefault("ratios", {})
    with ray_session(num_cpus=CORES):
        runs = synthetic_corpus(scratch, args.run_proteins, RUN_BLOCKS)
        if "stream" in args.parts:
            with report.part("stream"):
                fill_stream(scratch, args, report)
        if "feeder" in args.parts:
            with report.part("feeder"):
                report["feeder"] = measure_feeder(runs)
        if "blocks" in args.parts:
            with report.part("blocks"):
                report["blocks"] = measure_blocks(scratch, runs)
        if "ranks" in args.parts:
            with report.part("ranks"):
                report["ranks"] = measure_ranks(scratch, runs)
    if "steps" in args.parts:
        with report.part("steps"):
            fill_steps(scratch, runs, args, report)
    if "checkpoint" in args.parts:
        with report.part("checkpoint"):
            found = report["checkpoint"] = measure_checkpoint(scratch, runs)
            stall = statistics.median(found["stall_s"])
            report["ratios"]["checkpoint_stall_vs_sync"] = stall / found["alone_s"]
    if "resume" in args.parts:
        with report.part("resume"):
            report["resume_s"] = measure_resume(scratch, runs)


def fill_stream(scratch: Path, args: argparse.Namespace, report: Report) -> None:
    corpus = synthetic_corpus(scratch, args.proteins, BuildSettings())
    prepared = measure_preparation(corpus, args.rounds)
    report["ratios"]["prepare_tokens_per_s"] = prepared["tokens_per_s"]
    report["ratios"]["packing_efficiency"] = prepared["efficiency"]
    report["ratios"]["stream_tokens_per_s"] = measure_stream(corpus)


def fill_steps(scratch: Path, corpus: Corpus, args: argparse.Namespace, report: Report) -> None:
    """The report has the speeds of the rounds that are over, also when it is interrupted."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in ("raptide", *PEERS)}
    try:
        waits = measure_steps(scratch, corpus, args, turns)
        report["ratios"]["data_wait_fraction"] = statistics.median(waits)
    finally:
        report["tokens_per_s"] = {
            name: [speed([turn]) for turn in each] for name, each in turns.items()
        }
        for name, ratio in PEERS.items():
            if turns[name]:
                report["ratios"][ratio] = speed(turns["raptide"]) / speed(turns[name])


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


def measure_steps(
    scratch: Path,
    corpus: Corpus,
    args: argparse.Namespace,
    turns: dict[str, list[tuple[float, float]]],
) -> list[float]:
    """Raptide's waits, one a step; `turns` gets each peer's unpadded tokens and seconds."""
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
    return [line["speed/data_wait_fraction"] for line in read_metrics(run)[1 + args.steps :]]


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
    finish(start_job("--config", write_recipe(folder, tree), "--output", folder))
    return read_metrics(folder)


def write_recipe(folder: Path, tree: dict[str, Any]) -> Path:
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(json.dumps(tree))  # YAML reads JSON
    return recipe


def start_job(*arguments: Any, threads: int = CORES) -> subprocess.Popen[bytes]:
    return start(JOB, *arguments, threads=threads, stdout=subprocess.DEVNULL)


def finish(job: subprocess.Popen[bytes]) -> None:
    """Wait for a job's end, which must be a good one."""
    if job.wait() != 0:
        raise RaptideError(f"A training job ended with {job.returncode}; see above.")


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
            finish(start_job("--resume", folder, f"training.steps={steps}"))
        began = time.perf_counter()
        job = start_job("--resume", folder, f"training.steps={steps + 3}")
        while read_metrics(folder)[-1]["trainer/global_step"] == steps:
            if job.poll() is not None:
                raise RaptideError(f"A resumed job ended with {job.returncode} before a step.")
            time.sleep(0.1)
        found[f"{place:.0%}"] = time.perf_counter() - began
        finish(job)
        assert read_metrics(folder)[-1]["progress/epoch"] == 0
    return found
