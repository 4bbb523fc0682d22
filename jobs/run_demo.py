"""The whole way on one machine: FASTA, corpus, pretraining, endpoint, evaluation and its report.

    python jobs/run_demo.py
    python jobs/run_demo.py --input my.fasta

Drives the other jobs as a user would, and `serve run` as a process of its own. Results go to
runs/demo/summary.json. Without --input, the proteome that the package pyhmmer ships is used.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml

from commandline import as_called, called_as, job_parser, run_job
from processes import free_port, no_orphans, run, running
from raptide import Corpus, CorpusError, Engine, RaptideError
from raptide.alphabet import decode_sequences
from raptide.data.corpus_files import sha256_of_file
from raptide.data.fasta_text import refuse_missing

JOBS = Path(__file__).resolve().parent
CORPUS, RUN = Path("corpora/demo"), Path("runs/demo")
EVALUATION = RUN / "evaluation"
BENCHMARK = JOBS / "benchmarks/tiny.yaml"
RECIPE = JOBS / "recipes/demo.yaml"
PROTEOME = "tests/data/seqs/938293.PRJEB85.HG003687.faa"
BLOCK_RESIDUES = 65_536
READY_S = 180.0
CHECKED_SEQUENCES = 16


def main() -> None:
    parser = job_parser(__doc__)
    group = parser.add_argument_group("what it trains on")
    group.add_argument(
        "--input", type=Path, metavar="FASTA", help="proteins (default: a proteome of pyhmmer's)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings of the recipe"
    )
    args = parser.parse_intermixed_args()
    if args.input:
        refuse_missing(args.input)
    source = args.input or Path(str(files("pyhmmer") / PROTEOME))
    seconds: dict[str, float] = {}
    with no_orphans():
        with phase("corpus", seconds):
            corpus = build_corpus(source)
        with phase("pretraining", seconds):
            result = pretrain(args.overrides)
        with phase("serving", seconds):
            difference = serve_and_check(Path(result["checkpoint"]) / "model", corpus)
        with phase("evaluation", seconds):
            evaluate()
    summary = summarise(corpus, result, difference, seconds)
    (RUN / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print_summary(summary)


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"\n== {name} ==", flush=True)
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 2)


def build_corpus(source: Path) -> Corpus:
    """The demo's corpus: an earlier one if it came from the same file, else a new one."""
    if CORPUS.exists():
        if _is_up_to_date(source):
            print(f"Reusing {CORPUS}: it was built from the same file ({source.name}).")
            return Corpus.open(CORPUS)
        Corpus.open(CORPUS)  # whatever else lies there is not ours to delete
        print(f"Replacing {CORPUS}: it was built from something else than {source.name}.")
    old = CORPUS.with_name("demo.old")
    shutil.rmtree(old, ignore_errors=True)
    if CORPUS.exists():
        CORPUS.rename(old)
    try:
        _job(
            *("build_corpus.py", "--input", source, "--output", CORPUS),
            *("--block-residues", BLOCK_RESIDUES),
        )
    except BaseException:
        if old.exists():
            old.rename(CORPUS)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return Corpus.open(CORPUS)


def _is_up_to_date(source: Path) -> bool:
    try:
        manifest = Corpus.open(CORPUS).manifest
    except CorpusError:
        return False
    same_file = source.is_file() and [each["sha256"] for each in manifest["inputs"]] == [
        sha256_of_file(source)
    ]
    return same_file and manifest["settings"]["block_residues"] == BLOCK_RESIDUES


def pretrain(overrides: list[str]) -> dict[str, Any]:
    if RUN.exists():
        print(f"Replacing the earlier run in {RUN}; nothing of it is resumed.")
    _job(
        *("pretrain_model.py", "--config", RECIPE, "--output", RUN, "--replace"),
        *(f"corpus={CORPUS}", *overrides),
    )
    return json.loads((RUN / "result.json").read_text())


def evaluate() -> None:
    _job(
        *("evaluate_model.py", "--model", RUN, "--benchmark", BENCHMARK, "--output", EVALUATION),
    )


def _job(script: str, *arguments: object) -> None:
    command = [sys.executable, str(JOBS / script), *map(str, arguments)]
    if (code := run(command)) != 0:
        sys.exit(code)


def serve_and_check(bundle: Path, corpus: Corpus) -> float:
    """Deploy the bundle, ask over HTTP, and compare with the library; the largest difference."""
    sequences = _some_sequences(corpus)
    port = free_port()
    config = RUN / "serve.yaml"
    config.write_text(yaml.safe_dump(_serve_config(bundle, port)))
    log = RUN / "serve.log"
    command = [str(Path(sys.executable).parent / "serve"), "run", str(config)]
    with (
        running(command, log=log, RAY_ADDRESS="local", PYTHONPATH=str(JOBS.parent)) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120.0) as client,
    ):
        _wait_until_ready(client, server, log)
        print(f"POST /v1/embeddings and /v1/scores with {len(sequences)} sequences", flush=True)
        embedded = client.post("/v1/embeddings", json={"input": sequences})
        scored = client.post("/v1/scores", json={"sequences": sequences, "method": "one-pass"})
        masked = client.post("/v1/scores", json={"sequences": sequences[:2]})
        for answer in (embedded, scored, masked):
            answer.raise_for_status()
    engine = Engine.load(bundle)
    pairs = [
        (_column(embedded, "embedding"), engine.embed(sequences)),
        (_column(scored, "score"), engine.score_sequences(sequences, "one-pass")),
        (_column(masked, "score"), engine.score_sequences(sequences[:2])),
    ]
    return max(float(np.abs(http - np.asarray(library)).max()) for http, library in pairs)


def _column(answer: httpx.Response, field: str) -> np.ndarray:
    return np.array([row[field] for row in answer.json()["data"]])


def _some_sequences(corpus: Corpus) -> list[str]:
    """A few held-out proteins, the shortest of the first block, so that masking is quick."""
    block = corpus.read_block(corpus.blocks("heldout")[0])
    letters = decode_sequences(block.residues, np.diff(block.residue_splits))
    return sorted(letters, key=len)[:CHECKED_SEQUENCES]


def _serve_config(bundle: Path, port: int) -> dict[str, Any]:
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "raptide",
                "route_prefix": "/",
                "import_path": "serve.app:build",
                "args": {"model": str(bundle.resolve())},
            }
        ],
    }


def _wait_until_ready(client: httpx.Client, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RaptideError(f"`serve run` ended with exit code {server.returncode}; see {log}.")
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RaptideError(f"The endpoint was not ready within {READY_S:.0f} s; see {log}.")


def summarise(
    corpus: Corpus, result: dict[str, Any], difference: float, seconds: dict[str, float]
) -> dict[str, Any]:
    counts = corpus.manifest["counts"].values()
    packages = ("raptide", "ray", "torch", "deepspeed", "pyarrow", "numpy", "wandb")
    return {
        "num_sequences": sum(split.get("sequences", 0) for split in counts),
        "num_residues": sum(split.get("residues", 0) for split in counts),
        "num_clusters": sum(split.get("clusters", 0) for split in counts),
        "steps": result["step"],
        "tokens": result["tokens"],
        "heldout_ece": result["heldout_ece"]["all_chosen"],
        "heldout_ece_masked_only": result["heldout_ece"]["masked_only"],
        "unigram_ece": result["unigram_ece"]["all_chosen"],
        "unigram_ece_masked_only": result["unigram_ece"]["masked_only"],
        "uniform_ece": result["uniform_ece"],
        "tokens_per_s": result["tokens_per_s"],
        "http_library_max_abs_diff": difference,
        "phase_seconds": seconds,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
    }


def next_steps() -> str:
    """Commands to copy: of the checkout's environment, or of the one that was installed into."""
    serve = f"serve run serve.app:build model={RUN}     # then http://127.0.0.1:8000/docs"
    embed = f"python jobs/embed_proteins.py --model {RUN} --input my.fasta --output embeddings"
    lines = [serve, as_called(embed)]
    if any((RUN / "wandb").glob("offline-run-*")):
        lines.append(f"wandb sync {RUN}/wandb/offline-run-*       # the run in W&B")
    return "\n".join(f"  {'' if called_as() else '.venv/bin/'}{line}" for line in lines)


def print_summary(summary: dict[str, Any]) -> None:
    masked, unigram = (summary[f"{name}_ece_masked_only"] for name in ("heldout", "unigram"))
    learned = summary["heldout_ece"] < summary["unigram_ece"] and masked < unigram
    print(
        f"\n{summary['num_sequences']:,} proteins, {summary['num_residues']:,} residues; "
        f"{summary['steps']} steps at {summary['tokens_per_s']:,.0f} tokens/s.\n"
        f"Held-out ECE {summary['heldout_ece']:.2f}, unigram {summary['unigram_ece']:.2f}, uniform "
        f"{summary['uniform_ece']:.0f}; where nothing can be copied (<mask> alone) {masked:.2f} "
        f"against {unigram:.2f}: "
        + ("the model has learned.\n" if learned else "the model has NOT learned.\n")
        + "Endpoint and library agree to "
        f"{summary['http_library_max_abs_diff']:.1e}. All figures: {RUN}/summary.json\n\n"
        f"What it has learned, beside baselines: {EVALUATION}/report.html\n\n"
        "Try next:\n"
        f"{next_steps()}"
    )
    if not learned:
        sys.exit(1)


if __name__ == "__main__":
    run_job(main)
