"""Speed and memory of building a corpus, against what people use now, on this machine.

    python tests/benchmarks/bench_corpus.py
    python tests/benchmarks/bench_corpus.py --fasta uniprot20k.fasta.gz --json corpus.json

- Tokenising alone, on one core: `translate_batch` against fair-esm's batch converter and
  transformers' EsmTokenizer, the same records, in turn, medians over the rounds. The bound is the
  speed at which this core copies memory.
- Whole builds from plain FASTA by jobs/build_corpus.py, from the start of the process to its end,
  of three sizes of synthetic proteins (synthetic_proteins.py). The memory of every process is read
  five times a second. Its own memory is what no other process shares; the object store, which all
  of Ray's workers map, is not in it, and is printed beside.
- `datasets.map` with EsmTokenizer, two processes, writing Parquet, on the smallest of the three.
- One cluster of a million members, if --giant is given.
- Bytes on disk for each residue of --fasta (by default the proteome that the demo trains on).

Needs the extra `bench`: pip install -c constraints.txt -e '.[dev,bench]'
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

import numpy as np
import psutil
from machine import publish
from synthetic_proteins import write_proteins

ROOT = Path(__file__).resolve().parents[2]
SIZES = (500_000, 2_500_000, 5_000_000)
GIANT = 1_000_000
PACKAGES = ("raptide", "ray", "pyarrow", "numpy", "transformers", "fair-esm", "datasets")
MEMORY_EVERY_S = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs=3, default=SIZES, metavar="N")
    parser.add_argument("--records", type=int, default=3000, help="records to tokenise")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fasta", type=Path, help="real proteins for the size on disk")
    parser.add_argument("--cluster-tag", help="of --fasta, as for build_corpus.py")
    parser.add_argument("--giant", action="store_true")
    parser.add_argument("--scratch", type=Path, help="where 10 GB are free")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        report = measure(Path(scratch), args)
    publish(report, PACKAGES, print_report, args.json)


def measure(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    tokenising = measure_tokenising(args.records, args.rounds)
    builds = [measure_build(scratch, count) for count in args.sizes]
    giant = [measure_build(scratch, GIANT + GIANT // 4, GIANT)] if args.giant else []
    datasets = measure_datasets(scratch, args.sizes[0])
    on_disk = measure_size(scratch, args.fasta or default_proteome(), args.cluster_tag)
    small, middle, large = builds
    speed = tokenising["residues_per_s"]
    later = (large["seconds"] - middle["seconds"]) / (large["residues"] - middle["residues"])
    earlier = (middle["seconds"] - small["seconds"]) / (middle["residues"] - small["residues"])
    return {
        "ratios": {
            "tokenise_residues_per_s_per_core": speed["raptide"],
            "tokenise_vs_esm_tokenizer": speed["raptide"] / speed["transformers"],
            "tokenise_vs_fair_esm": speed["raptide"] / speed["fair-esm"],
            "build_residues_per_s": large["residues"] / large["seconds"],
            "build_vs_datasets": small["residues"] / small["seconds"] / datasets["residues_per_s"],
            "build_time_per_residue_growth": later / earlier,
            "memory_growth_mb": large["own_mb"] - small["own_mb"],
            "bytes_per_residue": on_disk["bytes_per_residue"],
        },
        "tokenising": tokenising,
        "builds": builds + giant,
        "datasets": datasets,
        "on_disk": on_disk,
    }


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
    started = time.perf_counter()
    with subprocess.Popen([*job, *options], stdout=subprocess.DEVNULL) as process:
        own, resident = watch_memory(process)
    if process.returncode:
        raise SystemExit(f"The build ended with code {process.returncode}; see above.")
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


def measure_datasets(scratch: Path, count: int) -> dict[str, Any]:
    """FASTA to Parquet of token ids by `datasets.map`, in a process of its own."""
    fasta = scratch / "proteins.fasta"
    residues = write_proteins(fasta, count)
    script = Path(__file__).with_name("corpus_peer.py")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hf")}
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, script, fasta, scratch / "tokens.parquet"], check=True, env=environment
    )
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
    tokenising, ratios = report["tokenising"], report["ratios"]
    print(f"\nTokenising, one core, {tokenising['residues']:,} residues")
    for name, speed in tokenising["residues_per_s"].items():
        print(f"  {name:14} {speed / 1e6:8.1f} M residues/s")
    print(f"  {'copying bytes':14} {tokenising['copied_bytes_per_s'] / 1e6:8.1f} M/s")
    print("Building, the whole job")
    for row in report["builds"]:
        giant = f", {row['one_cluster']:,} in one cluster" if row["one_cluster"] else ""
        print(
            f"  {row['sequences']:>10,} sequences{giant}: {row['seconds']:6.1f} s, "
            f"{row['residues'] / row['seconds'] / 1e6:5.1f} M residues/s, largest process "
            f"{row['own_mb']:,.0f} MB of its own, {row['resident_mb']:,.0f} MB with shared pages"
        )
    peer = report["datasets"]
    print(
        f"  datasets.map, {peer['sequences']:,} sequences: {peer['seconds']:.1f} s, "
        f"{peer['residues_per_s'] / 1e6:.2f} M residues/s"
    )
    on_disk = report["on_disk"]
    print(f"On disk, {on_disk['fasta']}: {on_disk['bytes_per_residue']:.3f} bytes a residue")
    for name, ratio in ratios.items():
        print(f"  {name:34} {ratio:14,.2f}")
    print(json.dumps(report["machine"]))


if __name__ == "__main__":
    main()
