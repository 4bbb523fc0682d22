"""The jobs in an empty folder; as processes of their own where that is what is tested."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from draws import generator, random_sequence
from in_process import job_in_process

from raptide import Corpus, Engine
from raptide.data.fasta import read_fasta
from raptide.evaluation.results import COLUMNS
from raptide.evaluation.tasks import KINDS
from raptide.model.config import ModelSettings
from raptide.model.formats.detect import write_weights
from raptide.model.formats.weights import Weights
from raptide.model.transformer import Esm

JOBS = sorted(p for p in (ROOT / "jobs").glob("*.py") if "def main" in p.read_text())


def job(name, *arguments, cwd, **kwargs):
    command = [sys.executable, str(ROOT / "jobs" / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **kwargs)


def processes_of(folder):
    """Processes that work in, or were started with, a folder of this test."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        text = " ".join([*(process.info["cmdline"] or []), process.info["cwd"] or ""])
        if str(folder) in text:
            found.append(process)
    return found


def assert_nothing_runs(folder):
    deadline = time.monotonic() + 20
    while left := processes_of(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_help_teaches(path, tmp_path):
    done = job_in_process(path.name, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"python jobs/{path.name}" in done.stdout, "the help shows no example"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("build_corpus.py", ["--input", "a.fasta", "--output", "c"], "a.fasta:3: record 'b'"),
        ("build_corpus.py", ["--input", "none", "--output", "c"], "none is not there"),
        ("pretrain_model.py", ["--config", "none.yaml"], "Cannot read the settings file none.yaml"),
        ("pretrain_model.py", ["--resume", "runs/x"], "holds no run to resume"),
        (
            "pretrain_model.py",
            ["--config", ROOT / "jobs/recipes/demo.yaml", "model.layer=2"],
            "did you mean `layers`",
        ),
        (
            "pretrain_model.py",
            ["--config", ROOT / "jobs/recipes/demo.yaml"],
            "corpora/demo holds no finished corpus",
        ),
        (
            "embed_proteins.py",
            ["--model", "m", "--input", "a.fasta", "--output", "e"],
            "no model folder",
        ),
        (
            "embed_proteins.py",
            ["--model", "bert", "--input", "a.fasta", "--output", "e"],
            "is a model of another architecture (bert)",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(name, arguments, message, cluster, tmp_path):
    (tmp_path / "a.fasta").write_text(">a\nMKLV\n>b\nMK1\n")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    done = job_in_process(name, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["a.fasta", "bert"], "something is left behind"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A short demo: fewer and smaller steps, nothing else changed."""
    folder = tmp_path_factory.mktemp("demo")
    short = ["training.steps=60", "stream.batch_rows=4", "model.layers=2"]
    short += ["model.width=64", "optimizer.warmup_steps=20", "evaluation.every_steps=60"]
    done = job("run_demo.py", *short, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(next(folder.glob("runs/demo/checkpoints/*60-*/model")), folder / "bundle")
    return folder, done.stdout


def test_the_demo_goes_the_whole_way(demo):
    folder, output = demo
    summary = json.loads((folder / "runs/demo/summary.json").read_text())
    # Two of its 2,100 proteins equal held-out ones letter for letter.
    assert (summary["num_sequences"], summary["num_residues"]) == (2098, 679_663)
    assert summary["steps"] == 60
    assert 100_000 < summary["tokens"] <= 60 * 4 * 1024
    assert summary["heldout_ece"] < summary["unigram_ece"] < summary["uniform_ece"] == 25
    assert summary["heldout_ece_masked_only"] < summary["unigram_ece_masked_only"]
    assert summary["http_library_max_abs_diff"] < 1e-5
    phases = {"corpus", "pretraining", "serving", "evaluation"}
    assert set(summary["phase_seconds"]) == phases
    assert summary["versions"]["ray"] == "2.60.0"
    assert "Try next" in output


def test_the_demo_ends_with_an_evaluation_and_its_report(demo):
    folder, output = demo
    there = folder / "runs/demo/evaluation"
    table = pq.read_table(there / "results.parquet")
    assert table.column_names == list(COLUMNS)
    rows = table.to_pylist()
    assert json.loads((there / "results.json").read_text())[3]["value"] == rows[3]["value"]
    assert {row["kind"] for row in rows} == set(KINDS)
    for kind, baselines in {
        "perplexity": {"uniform", "unigram", "2-gram", "3-gram", "4-gram"},
        "secondary-structure": {"one-hot", "random-weights"},
        "contacts": {"separation", "random-weights"},
        "homology": {"kmer", "phmmer", "random-weights"},
        "variants": {"blosum62", "unigram", "random-weights"},
        "variants-supervised": {"one-hot", "random-weights"},
        "space": {"random-weights"},
    }.items():
        mine = [row for row in rows if row["kind"] == kind]
        assert {row["model"] for row in mine if row["baseline"]} == baselines, kind
        assert {row["model"] for row in mine if not row["baseline"]} == {"runs/demo"}
        assert any(row["metric"].startswith("control/") for row in mine), kind
        assert all(row["n"] > 0 and len(row["dataset_digest"]) == 64 for row in mine)
    page = (there / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "http://" not in page.split("<main")[0]
    assert "controls came out at chance" in output
    assert sorted(path.name for path in there.iterdir()) == [
        *("cache", "report.html", "results.json", "results.parquet")
    ]
    assert not list((there / "cache").glob("read-*"))


def test_an_evaluation_given_again_computes_nothing(demo, cluster):
    folder, _ = demo
    before = (folder / "runs/demo/evaluation/results.parquet").read_bytes()
    options = ["--model", folder / "bundle", "--benchmark", ROOT / "jobs/benchmarks/tiny.yaml"]
    options += ["--output", folder / "runs/demo/evaluation"]
    done = job_in_process("evaluate_model.py", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Nothing was left to compute" in done.stdout
    after = pq.read_table(folder / "runs/demo/evaluation/results.parquet").to_pylist()
    for one, other in zip(pq.read_table(io.BytesIO(before)).to_pylist(), after, strict=True):
        if one["model"] == "runs/demo":  # weights count, not where they lie
            one = {**one, "model": str(folder / "bundle")}
        assert repr(one) == repr(other)


@pytest.mark.parametrize(
    ("benchmark", "options", "message"),
    [
        ("name: b\ntasks: []", [], "tasks"),
        ("name: b\ntasks: [{kind: magic}]", [], "has kind 'magic'; give one of perplexity"),
        ("name: b\ntasks: [{kind: space, nane: x}]", [], "nane"),
        ("name: b\ntasks: [{kind: space}, {kind: space}]", [], "2 tasks called 'space'"),
        ("name: b\ntasks: [{kind: homology, domains: no.parquet}]", [], "no.parquet"),
        ("name: b\ntasks: [{kind: variants, assays: 'no/*.csv'}]", [], "no/"),
        ("name: b\ntasks: [{kind: space}]", ["--tasks", "magic"], "no task 'magic'; it has space"),
        ("name: b\ntasks: [{kind: space}]", ["--repeats", "."], "at least two models"),
        ("name: b\ntasks: [{kind: space}]", ["--predictions", "no.csv"], "no.csv"),
    ],
)
def test_a_mistake_in_a_benchmark_is_one_line(
    bundle, cluster, tmp_path, benchmark, options, message
):
    (tmp_path / "b.yaml").write_text(benchmark)
    arguments = ["--model", bundle, "--benchmark", "b.yaml", "--output", "out", *options]
    done = job_in_process("evaluate_model.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "out/results.parquet").exists()


def test_after_the_demo_nothing_is_left_running(demo):
    assert_nothing_runs(demo[0])


@pytest.mark.thorough
def test_a_second_demo_says_what_it_reuses_and_replaces_and_a_stop_leaves_nothing(demo):
    folder, _ = demo
    command = [sys.executable, str(ROOT / "jobs/run_demo.py")]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "starting workers" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    output = "".join(lines)
    assert "Reusing corpora/demo" in output
    assert "Replacing the earlier run in runs/demo; nothing of it is resumed" in output
    assert_nothing_runs(folder)


def test_a_typing_error_costs_no_earlier_corpus_or_run(demo):
    folder, _ = demo
    done = job_in_process("run_demo.py", "--input", "typo.fasta", cwd=folder)
    assert done.returncode == 2
    assert "typo.fasta is not there" in done.stderr
    assert Corpus.open(folder / "corpora/demo").manifest["counts"]["train"]["clusters"] == 1876


def test_a_dry_run_prints_the_plan_and_trains_nothing(demo):
    folder, _ = demo
    recipe = ["--config", ROOT / "jobs/recipes/demo.yaml", "--output", "runs/dry"]
    settings = ["corpus=corpora/demo", "cluster.workers=[1,4]", "evaluation.asynchronous=true"]
    dry = [*recipe, "--dry-run", *settings, "evaluation.every_steps=100"]
    done = job_in_process("pretrain_model.py", *dry, cwd=folder)
    assert done.returncode == 0, done.stderr
    for part in (
        "every file verified",
        "1876 sequences (representatives), about",
        "or 4 workers, 1 times 4 rows",
        "parameters, fresh, rotary base 10000",
        "15% of the residues are targets",
        "300 steps, at most 2,457,600 tokens",
        "Muon at 0.01 for the matrices, Adam",
        " gradients clipped at 1",
        " steps of warm-up, then in a line to a tenth at step 270",
        " GB (weights ",
        "in place of the last three) with 1 workers",
        "in place of the last three) with 4 workers",
        "3 of about 0.01 GB, the newest 2 kept, in the run folder",
        "3 on 4 held-out blocks, beside the training",
        "ZeRO 2, fp32, its own check passed",
    ):
        assert part in done.stdout.replace("1,876", "1876"), done.stdout
    assert not (folder / "runs/dry").exists()
    shard = next((folder / "corpora/demo").glob("heldout-*.parquet"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    damaged = job_in_process("pretrain_model.py", *dry, cwd=folder)
    shard.write_bytes(content)
    assert damaged.returncode == 2
    assert f"{shard.name} is damaged" in damaged.stderr


@pytest.mark.thorough
def test_sigterm_ends_a_job_and_its_ray(demo, tmp_path):
    """Ray installs a handler of its own, which must not win."""
    script = str(ROOT / "jobs/pretrain_model.py")
    config = ["--config", str(ROOT / "jobs/recipes/demo.yaml"), "--output", "run"]
    command = [sys.executable, script, *config, f"corpus={demo[0]}/corpora/demo"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while "starting workers" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip().splitlines()[-1]) == (130, "interrupted")
    assert_nothing_runs(tmp_path)


def test_a_protein_too_long_for_the_model_is_named(cluster, tmp_path):
    model = Esm(ModelSettings(family="esm1b", layers=1, width=8, heads=2, max_positions=32))
    write_weights(tmp_path / "m", Weights.of(model.initialise(1)))
    (tmp_path / "a.fasta").write_text(">ok\nMKLV\n>long one\n" + "M" * 31 + "\n")
    done = job_in_process(
        *("embed_proteins.py", "--model", "m", "--input", "a.fasta", "--output", "e"),
        *("--long", "error"),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "Record 'long' has 31 residues, but this model takes at most 30" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fasta", "m"]
    done = job_in_process(
        *("embed_proteins.py", "--model", "m", "--input", "a.fasta", "--output", "e"),
        *("--long", "window"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "e/parts")["length"].to_pylist() == [4, 31]
    done = job_in_process(
        *("embed_proteins.py", "--model", "m", "--input", "a.fasta", "--output", "r"), cwd=tmp_path
    )
    assert done.returncode == 3, done.stderr
    assert pq.read_table(tmp_path / "r/parts")["id"].to_pylist() == ["ok"]
    (reject,) = pq.read_table(tmp_path / "r/rejects.parquet").to_pylist()
    assert (reject["id"], reject["line"], reject["length"]) == ("long", 3, 31)
    assert reject["reason"] == "too long: 31 residues, and 30 are taken whole"


def test_build_and_embed_a_users_own_file(demo, cluster, tmp_path, proteome):
    bundle = demo[0] / "bundle"
    source = tmp_path / "mine.fasta"
    with proteome.open() as file:
        source.write_text("".join(line for _, line in zip(range(2000), file, strict=False)))
    source.write_text(source.read_text().rsplit(">", 1)[0])
    arguments = ["--input", source, "--output", "corpora/mine"]
    done = job_in_process("build_corpus.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    corpus = Corpus.open(tmp_path / "corpora/mine")
    corpus.verify()
    assert corpus.digest[:16] in done.stdout
    picture = corpus.path / "corpus.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    done = job_in_process("build_corpus.py", "inspect", corpus.path, "--verify", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{corpus.manifest['counts']['train']['residues']:,} residues" in done.stdout
    assert "Verified: " in done.stdout
    shutil.copytree(corpus.path, tmp_path / "damaged")
    shard = tmp_path / "damaged" / corpus.manifest["shards"][0]["name"]
    shard.write_bytes(shard.read_bytes()[:-1])
    done = job_in_process("build_corpus.py", "inspect", "damaged", "--verify", cwd=tmp_path)
    assert done.returncode == 2
    assert f"{shard.name} is damaged: expected sha256" in done.stderr

    output = tmp_path / "embeddings"
    done = job_in_process(
        *("embed_proteins.py", "--model", bundle, "--input", source, "--output", output),
        *("--workers", 1),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    table = pq.read_table(output / "parts")
    names = [name for batch in read_fasta(source) for name in batch.names]
    assert table["id"].to_pylist() == names
    engine = Engine.load(bundle)
    sequence = source.read_text().split(">")[1].split("\n", 1)[1].replace("\n", "")
    np.testing.assert_allclose(
        table["embedding"][0].as_py(), engine.embed([sequence])[0], atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("build_corpus.py", ["--input", "a.fasta", "--output", "a.fasta/c"], "which is a file"),
        ("build_corpus.py", ["--input", "pipe", "--output", "c"], "can be read only once"),
        ("build_corpus.py", ["--input", "-", "--output", "c"], "write it to a file first"),
        (
            "build_corpus.py",
            ["--input", "a.fasta", "--clusters", "pipe", "--output", "c"],
            "but a cluster table is read twice here",
        ),
        ("run_demo.py", ["--input", "pipe"], "can be read only once"),
        (
            "embed_proteins.py",
            ["--model", "m", "--input", "-", "a.fasta", "-", "--output", "e"],
            "names - 2 times",
        ),
        (
            "build_corpus.py",
            ["--input", "a.fasta", "--clusters", "none.tsv", "--output", "c"],
            "none.tsv is not there",
        ),
        (
            "pretrain_model.py",
            ["--config", ROOT / "jobs/recipes/demo.yaml", "--output", "a.fasta/run"],
            "which is a file",
        ),
        ("fetch_corpus.py", ["swissprot", "--output", "a.fasta/x"], "which is a file"),
    ],
)
def test_places_that_cannot_work_are_refused_before_anything_starts(
    name, arguments, message, tmp_path
):
    (tmp_path / "a.fasta").write_text(">a\nMKLV\n")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    done = job_in_process(name, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_temporary_folder_too_long_for_rays_sockets_is_refused(tmp_path):
    (tmp_path / "a.fasta").write_text(">a\nMKLV\n")
    arguments = ["--input", "a.fasta", "--output", "c"]
    env = os.environ | {"RAY_TMPDIR": "/tmp/" + "x" * 60}
    done = job("build_corpus.py", *arguments, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert re.search(r"at most 3\d bytes, but /tmp/x+ has 65; set RAY_TMPDIR", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["a.fasta"]


def test_overrides_stand_on_both_sides_of_options(tmp_path):
    config = ["--config", ROOT / "jobs/recipes/demo.yaml"]
    arguments = ["training.steps=07", *config, "corpus=gone #2", "--dry-run", "model.layers=2"]
    done = job_in_process("pretrain_model.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "gone #2 holds no finished corpus" in done.stderr


def test_records_that_are_no_proteins_are_rejected_from_embeddings(demo, cluster, tmp_path):
    (tmp_path / "a.fasta").write_text(">ok\nMKLV\n>cut\nMK*VV\n>na mol:na\nACGT\n>bad\nM1\n")
    embed = ("embed_proteins.py", "--model", demo[0] / "bundle", "--input", "a.fasta")
    output = ("--output", "new/e", "--stop-codons", "split", "--price-per-hour", "3")
    done = job_in_process(*embed, *output, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert re.search(
        r"^2 records rejected: (1 nucleotides, 1 bad|1 bad letters, 1 nuc)", done.stdout, re.M
    )
    assert re.search(r"residues/s .* of start-up$", done.stdout, re.M)
    assert re.search(r"^A million such proteins: .* hours, .* at 3 an hour$", done.stdout, re.M)
    table = pq.read_table(tmp_path / "new/e/parts")
    assert table["id"].to_pylist() == ["ok", "cut/1-2", "cut/4-5"]
    assert table["length"].to_pylist() == [4, 2, 2]
    rejects = pq.read_table(tmp_path / "new/e/rejects.parquet").to_pylist()
    assert [(each["id"], each["line"]) for each in rejects] == [("na", 5), ("bad", 7)]
    allowed = job_in_process(*embed, *output, "--allow-rejects", cwd=tmp_path)
    assert allowed.returncode == 0, allowed.stderr
    assert "3 rows in " in allowed.stdout
    assert "Nothing was left to compute" in allowed.stdout
    kept = ("--output", "k", "--nucleotides", "keep")
    assert job_in_process(*embed, *kept, cwd=tmp_path).returncode == 3
    assert pq.read_table(tmp_path / "k/parts")["id"].to_pylist() == ["ok", "na"]


def test_embeddings_of_standard_input_and_of_a_pipe_are_those_of_a_file(cluster, tmp_path):
    shape = ModelSettings(family="esm1b", layers=1, width=8, heads=2, max_positions=64)
    write_weights(tmp_path / "m", Weights.of(Esm(shape).initialise(1)))
    texts = [
        "".join(f">{part}{n}\n{random_sequence(generator().integers(1, 60))}\n" for n in range(600))
        for part in "abc"
    ]
    for name, text in zip("abc", texts, strict=True):
        (tmp_path / f"{name}.fasta").write_text(text)
    os.mkfifo(tmp_path / "pipe")
    embed = ("embed_proteins.py", "--workers", 2, "--model", "m", "--output")
    files = ["a.fasta", "b.fasta", "c.fasta"]
    plain = job_in_process(*embed, "f", "--input", *files, cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    threading.Thread(target=(tmp_path / "pipe").write_text, args=[texts[2]]).start()
    with (tmp_path / "b.fasta").open("rb") as file:
        zipped = subprocess.Popen(["gzip", "-c"], stdin=file, stdout=subprocess.PIPE)
    arguments = ("s", "--input", "a.fasta", "-", "pipe")
    streamed = job_in_process(*embed, *arguments, cwd=tmp_path, stdin=zipped.stdout)
    assert streamed.returncode == 0, streamed.stderr
    tables = [pq.read_table(tmp_path / folder / "parts") for folder in "sf"]
    assert tables[0].equals(tables[1])
    assert tables[0].num_rows == 1800
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        *("parts", "rejects.parquet", "manifest.json", ".lock")
    }

    bad = subprocess.Popen(["printf", r"MKLV\n>b\nMK1\n"], stdout=subprocess.PIPE)
    refused = job_in_process(*embed, "r", "--input", "-", cwd=tmp_path, stdin=bad.stdout)
    assert refused.returncode == 2
    assert "error: standard input:1: text before the first > line" in refused.stderr
    assert not (tmp_path / "r").exists()
    bad = subprocess.Popen(["printf", r">a\nMKLV\n>b\nMK1\n"], stdout=subprocess.PIPE)
    rejected = job_in_process(*embed, "r", "--input", "-", cwd=tmp_path, stdin=bad.stdout)
    assert rejected.returncode == 3, rejected.stderr
    (reject,) = pq.read_table(tmp_path / "r/rejects.parquet").to_pylist()
    assert (reject["id"], reject["file"], reject["line"]) == ("b", "standard input", 3)
    assert reject["reason"].startswith("bad letters")
