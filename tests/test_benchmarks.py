"""Scripts that are run by hand: they begin with what they need and end with what they have."""

import builtins
import json
import re
import runpy
import subprocess
import sys
from unittest import mock

import draws
import numpy as np
import pytest
from conftest import ROOT
from in_process import script_in_process

BENCHMARKS = sorted((ROOT / "tests/benchmarks").glob("bench_*.py"))
CHAOS = [
    ROOT / f"tests/chaos/{name}.py"
    for name in (
        "bulk_chaos",
        "cluster_day",
        "evaluation_chaos",
        "pretrain_chaos",
        "pretrain_soak",
        "serve_chaos",
        "serve_day",
        "serve_scale",
        "serve_schema",
        "serve_soak",
        "zero_sizes",
    )
]
SCRIPTS = pytest.mark.parametrize("script", [*BENCHMARKS, *CHAOS], ids=lambda path: path.stem)
HEAVY = {"deepspeed", "pyarrow", "ray", "torch", "transformers"}


def run(script, *arguments, cwd):
    """In this process, where nothing heavy may be imported before the checks are through."""
    import_module = builtins.__import__

    def guard(name, *rest, **options):
        assert name.split(".")[0] not in HEAVY, f"{name} is imported before the checks"
        return import_module(name, *rest, **options)

    with mock.patch.object(builtins, "__import__", guard):
        return script_in_process(script, *arguments, cwd=cwd)


def assert_refused(done, *words):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert all(str(word) in done.stderr for word in words), done.stderr


def test_every_script_is_tested():
    runnable = {
        path
        for path in (ROOT / "tests/chaos").glob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert runnable == set(CHAOS)


@SCRIPTS
def test_help_says_what_quick_changes(script, tmp_path):
    done = run(script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{script.stem}.py --quick\n" in done.stdout
    quick = " ".join(done.stdout.split("  --quick ")[1].split())
    assert re.search(r"at most 8 minutes on two slow cores: --\w", quick)


@SCRIPTS
def test_a_file_that_is_no_report_of_the_script_is_refused_and_left_alone(script, tmp_path):
    whole = json.dumps({"script": script.stem, "quick": False})
    foreign = [
        whole[: draws.generator().integers(1, len(whole))].encode(),
        json.dumps({"script": "another", "quick": False}).encode(),
        b"[1, 2]",
        b"\xff\x00" + draws.generator().bytes(20),
    ]
    for number, content in enumerate(foreign):
        file = tmp_path / f"{number}.json"
        file.write_bytes(content)
        assert_refused(run(script, "--json", file, cwd=tmp_path), "--json", file, script.stem)
        assert file.read_bytes() == content


@SCRIPTS
def test_quick_and_whole_runs_do_not_share_a_report(script, tmp_path):
    for quick, options in ((True, ()), (False, ("--quick",))):
        file = tmp_path / f"{quick}.json"
        file.write_text(json.dumps({"script": script.stem, "quick": quick}))
        kind = "a quick run" if quick else "a whole run"
        assert_refused(run(script, "--json", file, *options, cwd=tmp_path), "--json", file, kind)


@SCRIPTS
def test_a_report_that_cannot_be_written_is_refused(script, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing/x.json", tmp_path / "file/x.json", tmp_path):
        assert_refused(run(script, "--json", path, cwd=tmp_path), "--json", path)


@pytest.mark.parametrize(
    ("name", "package", "options"),
    [
        ("benchmarks/bench_corpus", "fair-esm", ()),
        ("benchmarks/bench_corpus", "transformers", ("--parts", "tokenising")),
        ("benchmarks/bench_corpus", "datasets", ("--parts", "datasets")),
        ("benchmarks/bench_corpus", "pyhmmer", ("--parts", "on_disk")),
        ("benchmarks/bench_engine", "fair-esm", ()),
        ("benchmarks/bench_engine", "transformers", ()),
        ("benchmarks/bench_serving", "pyhmmer", ("--parts", "latency")),
        ("benchmarks/bench_serving", "transformers", ()),
        ("benchmarks/bench_training", "transformers", ()),
        ("chaos/cluster_day", "pyhmmer", ()),
        ("chaos/pretrain_chaos", "pyhmmer", ()),
        ("chaos/serve_schema", "schemathesis", ()),
        ("chaos/zero_sizes", "pyhmmer", ()),
    ],
)
def test_a_package_that_is_missing_is_refused_with_the_command_that_installs_it(
    name, package, options, tmp_path
):
    module = {"fair-esm": "esm"}.get(package, package)
    with mock.patch.dict(sys.modules, {module: None}):
        done = run(ROOT / f"tests/{name}.py", *options, cwd=tmp_path)
    assert_refused(done, f"package {package} ", "pip install -c constraints.txt -e")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("bench_corpus", ("--fasta", "missing.fasta"), ("--fasta", "missing.fasta")),
        ("bench_corpus", ("--fasta", "."), ("--fasta",)),
        ("bench_corpus", ("--scratch", "missing"), ("--scratch", "missing")),
        ("bench_corpus", ("--sizes", "1", "2", 10**13), ("20,000,000.0 GB", "--scratch")),
        ("bench_corpus", ("--giant", 10**13), ("20,000,000.0 GB", "--scratch")),
        ("bench_engine", ("--esm-cpp", "missing"), ("--esm-cpp", "missing", "pip install")),
        ("bench_engine", ("--esm-cpp", sys.executable), ("--esm-cpp", "pip install")),
        ("bench_serving", ("--picture", "missing/x.png"), ("--picture", "missing/x.png")),
        ("bench_serving", ("--infinity", "missing/venv"), ("--infinity", "missing/venv")),
        ("bench_serving", ("--infinity", str(ROOT)), ("--infinity", ROOT)),
    ],
)
def test_what_else_a_benchmark_needs_is_refused_if_missing(name, options, words, tmp_path):
    done = run(ROOT / f"tests/benchmarks/{name}.py", *options, cwd=tmp_path)
    assert_refused(done, *words)


@SCRIPTS
def test_a_report_without_any_part_can_be_shown(script):
    with mock.patch.object(sys, "path", [str(script.parent), *sys.path]):
        names = runpy.run_path(str(script))
    from machine import describe_machine

    report = {"quick": False, "left_out": {}, "machine": describe_machine()}
    names["print_report"](report | {"ratios": names["ratios"](report) if "ratios" in names else {}})


PARTS = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import by_hand

def main():
    args = by_hand.parse(by_hand.script_parser(""), {})
    with by_hand.Report("parts", args, ("numpy",), lambda report: print("shown", sorted(report)),
                        lambda report: {"double": 2 * report.get("first", 0)}, adds=True) as report:
        with report.part("first"):
            report["first"] = 21
        with report.part("second"):
            report["second"] = [1]
            END
            report["second"] = [1, 2]

by_hand.run_script(main)
"""


@pytest.mark.parametrize(
    ("end", "code", "why"),
    [
        ("raise by_hand.ConfigError('no luck')", 2, "no luck"),
        ("{}['x']", 1, "KeyError: 'x'"),
        ("os.kill(os.getpid(), signal.SIGINT); signal.pause()", 130, "interrupted"),
        ("os.kill(os.getpid(), signal.SIGTERM); signal.pause()", 130, "interrupted"),
        ("pass", 0, None),
    ],
    ids=["refused", "bug", "Ctrl-C", "SIGTERM", "none"],
)
def test_what_was_found_is_shown_and_kept_however_a_script_ends(end, code, why, tmp_path):
    script, file = tmp_path / "parts.py", tmp_path / "report.json"
    script.write_text(PARTS.replace("END", end))
    file.write_text("")  # as mktemp leaves it: no report yet
    done = subprocess.run(
        [sys.executable, script, ROOT / "tests/benchmarks", "--json", file, "--quick"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith("shown ")
    report = json.loads(file.read_text())
    assert report["first"] == 21
    assert report["second"] == ([1] if why else [1, 2])
    assert report["ratios"] == {"double": 42}
    assert report["quick"]
    assert "A quick run" in done.stdout
    assert report["machine"]["versions"]["numpy"] != "not installed"
    assert report.get("broke_off") == (why and {"part": "second", "why": why})
    assert (why is None) == ("Broke off" not in done.stdout)
    assert why is None or f"Broke off: second: {why}" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.py", "report.json"]


@pytest.mark.parametrize(("per_1000", "grows"), [(0.0, False), (0.6, False), (1.5, True)])
def test_a_soak_finds_growth_among_what_comes_and_goes(monkeypatch, per_1000, grows):
    monkeypatch.syspath_prepend(ROOT / "tests/chaos")
    import long_run

    rng, memory = draws.generator(), long_run.Memory()
    steps = 3 * np.arange(450)  # a look every ten seconds
    for key, name, looks in (((1, 0.0), "worker", 450), ((2, 0.0), "young", 50)):
        memory._names[key] = name
        held = 700 + per_1000 * steps / 1000 + rng.normal(0, 0.1, 450)
        times = 10.0 * np.arange(looks)
        memory._samples[key] = list(zip(times, steps[:looks], held[:looks], strict=True))
    (found,) = memory.slopes()
    assert found["process"] == "worker"
    assert (found["mb_per_1000_steps"] > long_run.MOST_MB) == grows
    assert memory.young() == ["young"]
