"""Speed and memory of building a corpus, against what people use now, on this machine.

    python tests/benchmarks/bench_corpus.py
    python tests/benchmarks/bench_corpus.py --fasta uniprot20k.fasta.gz --json corpus.json
    python tests/benchmarks/bench_corpus.py --quick

- tokenising: on one core, `translate_batch` against fair-esm's batch converter and transformers'
  EsmTokenizer, the same records, in turn, medians over the rounds. The bound is the speed at which
  this core copies memory.
- builds: whole builds from plain FASTA by jobs/build_corpus.py, from the start of the process to
  its end, of three sizes of synthetic proteins (synthetic_proteins.py). The memory of every process
  is read five times a second. Its own memory is what no other process shares; the object store,
  which all of Ray's workers map, is not in it, and is printed beside. With --giant, one more of
  which a million members are one cluster.
- shuffle: few rows to twenty and to thousands of buckets (corpus_shuffle.py), in turn, medians over
  the rounds: seconds, and by how much the memory of the process that drives it grows.
- datasets: `datasets.map` with EsmTokenizer, two processes, writing Parquet, on the smallest of the
  three. Left out, and said so, where `datasets` is not installed; refused then if asked for.
- on_disk: bytes for each residue of --fasta (by default the proteome that the demo trains on).

Needs the extra `dev`, for `datasets` also `bench`: pip install -c constraints.txt -e '.[dev,bench]'
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
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import psutil
from synthetic_proteins import write_proteins

from processes import running
from raptide.errors import RaptideError

ROOT = Path(__file__).resolve().parents[2]
SIZES = (500_000, 2_500_000, 5_000_000)
GIANT = 1_000_000
BUCKETS = (20, 2_600)
"""In one go, and as many as the paper's proteins take."""
SHUFFLED_MB = 480
PARTS = ("tokenising", "builds", "shuffle", "datasets", "on_disk")
QUICK = {"sizes": (20_000, 60_000, 100_000), "records": 300, "rounds": 3, "shuffled_mb": 64}
PACKAGES = ("raptide", "ray", "pyarrow", "numpy", "transformers", "fair-esm", "datasets")
MEMORY_EVERY_S = 0.2
BYTES_PER_PROTEIN = 2_000
"""Of FASTA, corpus and what passes between them, with some to spare."""


def parse() -> argparse.Namespace:
    parser = by_hand.script_parser(__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="default: all whose packages are installed"
    )
    parser.add_argument("--sizes", type=int, nargs=3, default=SIZES, metavar="N")
    parser.add_argument("--records", type=int, default=3000, help="records to tokenise")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shuffled-mb", type=int, default=SHUFFLED_MB, help="rows of `shuffle`")
    parser.add_argument("--fasta", type=Path, help="real proteins for the size on disk")
    parser.add_argument("--cluster-tag", help="of --fasta, as for build_corpus.py")
    parser.add_argument("--giant", type=int, nargs="?", const=GIANT, default=0, metavar="MEMBERS")
    parser.add_argument(
        "--scratch", type=Path, help="where 2 kB for each protein of the largest build are free"
    )
    return by_hand.parse(parser, QUICK)


def main() -> None:
    args = parse()
    parts = args.parts or PARTS
    if "tokenising" in parts:
        by_hand.need_packages("transformers", "esm")
    if args.parts and "datasets" in parts:
        by_hand.need_packages("datasets", "transformers")
    if "on_disk" in parts and args.fasta is None:
        by_hand.need_packages("pyhmmer")
    if args.fasta is not None:
        by_hand.need_file(args.fasta, "--fasta")
    proteins = max(*args.sizes, args.giant)
    by_hand.need_room(proteins * BYTES_PER_PROTEIN / 1e9, args.scratch, "--scratch")
    with (
        by_hand.Report("bench_corpus", args, PACKAGES, print_report, ratios, adds=True) as report,
        tempfile.TemporaryDirectory(dir=args.scratch) as scratch,
    ):
        measure(Path(scratch), args, parts, report)


def measure(
    scratch: Path, args: argparse.Namespace, parts: Sequence[str], report: by_hand.Report
) -> None:
    if "tokenising" in parts:
        with report.part("tokenising"):
            report["tokenising"] = measure_tokenising(args.records, args.rounds)
    if "builds" in parts:
        with report.part("builds"):
            builds = report["builds"] = []
            for count in args.sizes:
                builds.append(measure_build(scratch, count))
            if args.giant:
                builds.append(measure_build(scratch, args.giant * 5 // 4, args.giant))
    if "shuffle" in parts:
        with report.part("shuffle"):
            report["shuffle"] = measure_shuffle(args.shuffled_mb, args.rounds)
    if "datasets" in parts:
        if (why := by_hand.lacks("datasets")) is not None:
            report.pop("datasets", None)
            report.leave_out("datasets", why)
        else:
            with report.part("datasets"):
                report["datasets"] = measure_datasets(scratch, args.sizes[0])
    if "on_disk" in parts:
        with report.part("on_disk"):
            fasta = args.fasta or default_proteome()
            report["on_disk"] = measure_size(scratch, fasta, args.cluster_tag)


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """Of the parts that a report has."""
    found = {}
    if "tokenising" in report:
        speed = report["tokenising"]["residues_per_s"]
        found["tokenise_residues_per_s_per_core"] = speed["raptide"]
        found["tokenise_vs_esm_tokenizer"] = speed["raptide"] / speed["transformers"]
        found["tokenise_vs_fair_esm"] = speed["raptide"] / speed["fair-esm"]
    builds = [row for row in report.get("builds", ()) if not row["one_cluster"]]
    peer = report.get("datasets")
    if builds and peer is not None and peer["sequences"] == builds[0]["sequences"]:
        ours = builds[0]["residues"] / builds[0]["seconds"]
        found["build_vs_datasets"] = ours / peer["residues_per_s"]
    if len(builds) == len(SIZES):
        small, middle, large = builds
        later = (large["seconds"] - middle["seconds"]) / (large["residues"] - middle["residues"])
        earlier = (middle["seconds"] - small["seconds"]) / (middle["residues"] - small["residues"])
        found["build_residues_per_s"] = large["residues"] / large["seconds"]
        found["build_time_per_residue_growth"] = later / earlier
        found["memory_growth_mb"] = large["own_mb"] - small["own_mb"]
    if "shuffle" in report:
        few, many = report["shuffle"]
        found["shuffle_driver_growth_mb"] = many["driver_growth_mb"]
        found["shuffle_many_vs_few_buckets_s"] = many["seconds"] / few["seconds"]
    if "on_disk" in report:
        found["bytes_per_residue"] = report["on_disk"]["bytes_per_residue"]
    return found


def default_proteome() -> Path:
    return Path(str(files("pyhmmer"))) / "tests/data/seqs/938293.PRJEB85.HG003687.faa"


def measure_tokenising(count: int, rounds: int) -> dict[str, Any]:
    """Residues per second of one thread, and the bytes per second that it copies."""
    import esm
    import torch
    from transformers import EsmTokenizer

    from raptide.alphabet import ESM_33, translate_batch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        sequences = synthetic_sequences(Path(scratch), count)
        (Path(scratch) / "vocab.txt").write_text("\n".join(ESM_33.tokens) + "\n")
        tokenizer = EsmTokenizer(str(Path(scratch) / "vocab.txt"))
    convert = esm.data.Alphabet.from_architecture("ESM-1b").get_batch_converter()
    peers: dict[str, Callable[[], Any]] = {
        "raptide": lambda: translate_batch(sequences),
        "fair-esm": lambda: convert([("", sequence) for sequence in sequences]),
        "transformers": lambda: tokenizer(sequences)["input_ids"],
    }
    assert_same_tokens(peers, sequences)
    residues = sum(map(len, sequences))
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, run in peers.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    speeds = {name: residues / statistics.median(taken) for name, taken in seconds.items()}
    return {
        "records": len(sequences),
        "residues": residues,
        "residues_per_s": speeds,
        "copied_bytes_per_s": copy_speed(rounds),
    }


def synthetic_sequences(scratch: Path, count: int) -> list[str]:
    from raptide.alphabet import decode_sequences
    from raptide.data.fasta import read_fasta

    write_proteins(scratch / "tokenise.fasta", count)
    sequences: list[str] = []
    for batch in read_fasta(scratch / "tokenise.fasta"):
        sequences += decode_sequences(np.frombuffer(batch.residues, np.uint8), batch.lengths)
    return sequences


def assert_same_tokens(peers: dict[str, Callable[[], Any]], sequences: Sequence[str]) -> None:
    (ids, lengths), converted, tokenized = (
        peers[name]() for name in ("raptide", "fair-esm", "transformers")
    )
    ends = np.cumsum(lengths)
    for index in range(0, len(sequences), 100):
        ours = list(ids[ends[index] - lengths[index] : ends[index]])
        assert ours == tokenized[index][1:-1]
        assert ours == converted[2][index, 1 : len(ours) + 1].tolist()


def copy_speed(rounds: int) -> float:
    source = np.ones(256 << 20, np.uint8)
    target = np.empty_like(source)
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        np.copyto(target, source)
        taken.append(time.perf_counter() - started)
    return source.size / statistics.median(taken)


def measure_build(scratch: Path, count: int, one_cluster: int = 0) -> dict[str, Any]:
    """One build of synthetic proteins by the job."""
    fasta, output = scratch / "proteins.fasta", scratch / "corpus"
    residues = write_proteins(fasta, count, one_cluster=one_cluster)
    taken = build(fasta, output, *(["--cluster-tag", "cluster50"] if one_cluster else []))
    manifest = json.loads((output / "manifest.json").read_text())
    assert sum(split["residues"] for split in manifest["counts"].values()) == residues
    remove(fasta, output)
    return {"sequences": count, "one_cluster": one_cluster, "residues": residues, **taken}


def build(fasta: Path, output: Path, *options: str) -> dict[str, float]:
    """Seconds of the job, and the largest memory of any of its processes."""
    job = [sys.executable, ROOT / "jobs/build_corpus.py", "--input", fasta, "--output", output]
    log = output.with_name("build.log")
    started = time.perf_counter()
    with running([*map(str, job), *options], log=log) as process:
        own, resident = watch_memory(process)
    if process.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RaptideError(f"The build of {fasta.name} ended with {process.returncode}: {last}")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "own_mb": own / 1e6, "resident_mb": resident / 1e6}


def watch_memory(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Largest own and largest resident memory of one process of a family, bytes."""
    own = resident = 0
    while process.poll() is None:
        for member in family(process.pid):
            try:
                memory = member.memory_info()
            except psutil.Error:
                continue
            own = max(own, memory.rss - memory.shared)
            resident = max(resident, memory.rss)
        time.sleep(MEMORY_EVERY_S)
    return own, resident


def family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def measure_shuffle(megabytes: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each number of buckets; every measurement in a process of its own."""
    script = str(Path(__file__).with_name("corpus_shuffle.py"))
    told: dict[int, list[dict[str, float]]] = {buckets: [] for buckets in BUCKETS}
    for _ in range(rounds):
        for buckets, rows in told.items():
            command = [sys.executable, script, str(buckets), str(megabytes)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                why = done.stderr.strip().splitlines()[-1:]
                raise RaptideError(f"The shuffle to {buckets} buckets ended with {why}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return [
        {
            "buckets": buckets,
            "megabytes": megabytes,
            **{name: statistics.median(row[name] for row in rows) for name in rows[0]},
        }
        for buckets, rows in told.items()
    ]


def measure_datasets(scratch: Path, count: int) -> dict[str, Any]:
    """FASTA to Parquet of token ids by `datasets.map`, in a process of its own."""
    fasta = scratch / "proteins.fasta"
    residues = write_proteins(fasta, count)
    script = Path(__file__).with_name("corpus_peer.py")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hf")}
    started = time.perf_counter()
    command = [sys.executable, script, fasta, scratch / "tokens.parquet"]
    if (code := subprocess.run(command, check=False, env=environment).returncode) != 0:
        raise RaptideError(f"datasets.map on {fasta.name} ended with {code}; see above.")
    seconds = time.perf_counter() - started
    remove(fasta, scratch / "tokens.parquet", scratch / "hf")
    return {"sequences": count, "seconds": seconds, "residues_per_s": residues / seconds}


def measure_size(scratch: Path, fasta: Path, cluster_tag: str | None) -> dict[str, Any]:
    """Bytes of everything in the corpus folder, the picture too."""
    output = scratch / "corpus"
    build(fasta, output, *(["--cluster-tag", cluster_tag] if cluster_tag else []))
    manifest = json.loads((output / "manifest.json").read_text())
    residues = sum(split["residues"] for split in manifest["counts"].values())
    size = sum(file.stat().st_size for file in output.iterdir())
    remove(output)
    return {"fasta": fasta.name, "residues": residues, "bytes_per_residue": size / residues}


def remove(*paths: Path) -> None:
    subprocess.run(["rm", "-rf", *paths], check=True)


def print_report(report: dict[str, Any]) -> None:
    if "tokenising" in report:
        tokenising = report["tokenising"]
        print(f"\nTokenising, one core, {tokenising['residues']:,} residues")
        for name, speed in tokenising["residues_per_s"].items():
            print(f"  {name:14} {speed / 1e6:8.1f} M residues/s")
        print(f"  {'copying bytes':14} {tokenising['copied_bytes_per_s'] / 1e6:8.1f} M/s")
    if "builds" in report:
        print("Building, the whole job")
    for row in report.get("builds", ()):
        giant = f", {row['one_cluster']:,} in one cluster" if row["one_cluster"] else ""
        print(
            f"  {row['sequences']:>10,} sequences{giant}: {row['seconds']:6.1f} s, "
            f"{row['residues'] / row['seconds'] / 1e6:5.1f} M residues/s, largest process "
            f"{row['own_mb']:,.0f} MB of its own, {row['resident_mb']:,.0f} MB with shared pages"
        )
    for row in report.get("shuffle", ()):
        print(
            f"Shuffle, {row['megabytes']:,} MB to {row['buckets']:,} buckets: "
            f"{row['seconds']:.1f} s, the driver grows by {row['driver_growth_mb']:,.0f} MB"
        )
    if "datasets" in report:
        peer = report["datasets"]
        print(
            f"  datasets.map, {peer['sequences']:,} sequences: {peer['seconds']:.1f} s, "
            f"{peer['residues_per_s'] / 1e6:.2f} M residues/s"
        )
    if "on_disk" in report:
        on_disk = report["on_disk"]
        print(f"On disk, {on_disk['fasta']}: {on_disk['bytes_per_residue']:.3f} bytes a residue")
    for name, ratio in report["ratios"].items():
        print(f"  {name:34} {ratio:14,.2f}")
    print(json.dumps(report["machine"]))


if __name__ == "__main__":
    by_hand.run_script(main)
