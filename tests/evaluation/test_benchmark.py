"""Benchmark files: those that are shipped, and what people write into theirs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from raptide import ConfigError
from raptide.errors import InputError
from raptide.evaluation.benchmark import Benchmark
from raptide.evaluation.tasks import KINDS

FOLDER = ROOT / "jobs/benchmarks"
SHIPPED = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "reference")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_benchmark_is_one(path):
    benchmark = Benchmark.load(path)
    assert benchmark.tasks
    for task in benchmark.tasks:
        for name in ("train", "domains", "fasta"):
            value = getattr(task, name, None)
            assert value is None or Path(str(value)).is_absolute()


def test_the_tiny_one_has_its_data_and_all_kinds(tmp_path):
    benchmark = Benchmark.load(FOLDER / "tiny.yaml")
    assert {task.kind for task in benchmark.tasks} == set(KINDS)
    files = [path for path in (FOLDER / "tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    tasks = benchmark.make(tmp_path / "cache")
    used = {path.resolve() for task in tasks for path in task.files()}
    assert used == {path.resolve() for path in files if path.suffix != ".md"}
    assert not (tmp_path / "cache").exists(), "nothing is counted before it is asked for"


def test_paths_are_relative_to_the_file_wherever_one_stands(tmp_path, monkeypatch):
    shutil.copytree(FOLDER / "tiny", tmp_path / "there/tiny")
    shutil.copy(FOLDER / "tiny.yaml", tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    (task,) = Benchmark.load("there/tiny.yaml", ["homology"]).make(tmp_path)
    assert task.files() == [tmp_path / "there/tiny/domains.parquet"]


def test_a_folder_may_be_called_as_a_glob(tmp_path):
    folder = tmp_path / "données [v1]*"
    shutil.copytree(FOLDER / "tiny", folder / "tiny")
    shutil.copy(FOLDER / "tiny.yaml", folder)
    for path in (folder / "tiny.yaml", write_absolute(folder / "absolute.yaml")):
        (task,) = Benchmark.load(path, ["variants"]).make(tmp_path)
        assert task.files()


def write_absolute(path):
    path.write_text(
        f"name: a\ntasks: [{{kind: variants, assays: '{FOLDER}/tiny/variants/*.parquet'}}]"
    )
    return path


def test_tasks_are_chosen_by_name_or_kind(tmp_path):
    text = "name: b\ntasks: [{kind: space}, {kind: space, name: other}]"
    (tmp_path / "b.yaml").write_text(text)
    assert [t.name for t in Benchmark.load(tmp_path / "b.yaml").tasks] == ["space", "other"]
    chosen = Benchmark.load(tmp_path / "b.yaml", ["other"]).tasks
    assert [task.name for task in chosen] == ["other"]
    with pytest.raises(ConfigError, match="has no task 'others'; it has space, other"):
        Benchmark.load(tmp_path / "b.yaml", ["others"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [{kind: space}]", "name"),
        ("name: b", "tasks"),
        ("name: b\ntasks: []", "tasks"),
        ("name: b\ntasks: [{}]", "task 0 has kind None; give one of perplexity"),
        ("name: b\ntasks: [{kind: space}, {kind: [1]}]", "task 1 has kind"),
        ("name: b\ntasks: [{kind: space, colour: red}]", "task 0.*colour"),
        ("name: b\ntasks: [{kind: variants}]", "task 0.*assays"),
        ("name: b\ntasks: [{kind: space}, {kind: space}]", "2 tasks called 'space'"),
        ("name: b\ntasks: space", "tasks"),
        ("name: b\ntasks: [space]", "tasks"),
    ],
)
def test_what_is_no_benchmark_is_told_in_one_sentence(tmp_path, text, message):
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Benchmark.load(tmp_path / "b.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"space"}))
def test_a_missing_file_is_told_before_anything_is_computed(tmp_path, kind):
    fields = {
        "perplexity": "fasta: no, train_fasta: no",
        "secondary-structure": "train: no, test: {a: no}",
        "contacts": "train: no, test: {a: no}",
        "homology": "domains: no",
        "variants": "assays: no",
        "variants-supervised": "assays: no",
    }[kind]
    (tmp_path / "b.yaml").write_text(f"name: b\ntasks: [{{kind: {kind}, {fields}}}]")
    benchmark = Benchmark.load(tmp_path / "b.yaml")
    with pytest.raises(InputError, match=str(tmp_path / "no")) as caught:
        benchmark.make(tmp_path / "cache")
    assert "\n" not in str(caught.value)
