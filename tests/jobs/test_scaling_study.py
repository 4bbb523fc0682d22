"""A study from end to end: interrupted while runs train, and gone on with."""

import hashlib
import json
import re
import sys

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from conftest import ROOT

import run_scaling_study
from raptide.errors import ConfigError, InputError, RaptideError
from raptide.scaling.manifest import refuse_other_study, write_manifest
from raptide.scaling.study import Study
from raptide.scaling.training import Ending

TINY = ROOT / "jobs/benchmarks/tiny"

RECIPE = {
    "name": "base",
    "corpus": "given by an override",
    "stream": {"row_tokens": 128, "crop_tokens": 128, "batch_rows": 4},
    "model": {"layers": 1, "width": 16, "heads": 2},
    "optimizer": {"lr": 1e-2, "warmup_steps": 2},
    "training": {"steps": 6, "micro_batch_rows": 4, "precision": "fp32", "zero_stage": 0},
    "cluster": {"workers": 1, "device": "cpu"},
    "checkpoint": {"every_steps": 2, "keep": 1},
    "evaluation": {"every_steps": 6, "blocks": 1},
    "tracking": {"mode": "disabled"},
}

STUDY = {
    "name": "smallest",
    "recipe": "recipe.yaml",
    "models": {
        "t": {"model": {"layers": 1, "width": 16, "heads": 2}},
        "lstm": {
            "model": {"family": "lstm", "layers": 1, "width": 8},
            "training": {"steps": 400},
            "checkpoint": {"every_steps": 20},
        },
    },
    "data": {"some": {"stream": {"fraction": 0.2}}},
    "grid": [{"models": ["t", "lstm"], "data": ["some"]}],
    "benchmark": "bench.yaml",
    "heldout_proteins": 20,
    "at_once": 1,
    "worker_tflops": 0.01,
}

BENCH = {
    "name": "b",
    "tasks": [{"kind": "homology", "domains": str(TINY / "domains.parquet")}],
}


class Interrupted(Exception):
    """In place of Ctrl-C, which would end the session."""


@pytest.fixture
def run(tmp_path, corpus, monkeypatch, capsys):
    for name, tree in (("recipe", RECIPE), ("study", STUDY), ("bench", BENCH)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))

    def call(*more):
        command = ["x", "--study", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [*command, f"corpus={corpus.path}", *more])

        run_scaling_study.main()
        return capsys.readouterr().out

    return call


def test_what_is_wrong_with_the_data_is_said_before_anything_is_trained(run, tmp_path):
    missing = {"name": "b", "tasks": [{"kind": "homology", "domains": "nowhere.parquet"}]}
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(missing))
    with pytest.raises(InputError, match=r"nowhere\.parquet"):
        run()
    assert not (tmp_path / "out").exists()
    (tmp_path / "bench.yaml").unlink()
    for more in ([], ["--dry-run"]):
        with pytest.raises(InputError, match=r"bench\.yaml"):
            run(*more)


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.thorough
def test_a_study_goes_on_where_it_was_and_ends_with_table_and_page(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    dry = run("--dry-run")
    assert "t--some--seed1" in dry
    assert not out.exists()

    first, second = (out / f"runs/{model}--some--seed1" for model in ("t", "lstm"))

    def wait(tasks, **options):
        """Ray's, until the second run has a checkpoint."""
        ready = []
        while not ready:
            if not options and list(second.glob("checkpoints/step-*/manifest.json")):
                raise Interrupted
            ready, others = ray_wait(tasks, **({"timeout": 0.05} | options))
        return ready, others

    ray_wait = ray.wait
    with monkeypatch.context() as patched:
        patched.setattr(ray, "wait", wait)
        with pytest.raises(Interrupted):
            run()
    assert not (second / "result.json").exists(), "it was through before the interrupt"
    states = {name: each["state"] for name, each in manifest(out)["runs"].items()}
    assert states == {"t--some--seed1": "finished", "lstm--some--seed1": "waiting"}
    weights = hash_of(result_of(first))
    before = (first / "result.json").stat().st_mtime_ns

    run()
    assert (first / "result.json").stat().st_mtime_ns == before, "it was trained again"
    assert len(list((second / "checkpoints/attempts").iterdir())) == 2
    assert result_of(second)["step"] == 400
    found = manifest(out)
    assert {each["state"] for each in found["runs"].values()} == {"finished"}
    rows = {row["name"]: row for row in pq.read_table(out / "study.parquet").to_pylist()}
    assert rows.keys() == {
        *("t--some--seed1", "lstm--some--seed1"),
        *(f"{gram}--some" for gram in ("unigram", "2-gram", "3-gram", "4-gram")),
    }
    trained = rows["t--some--seed1"]
    assert weights == hash_of(result_of(first))
    assert trained["run_ece"] == pytest.approx(result_of(first)["heldout_ece"]["all_chosen"])
    assert trained["epochs"] == pytest.approx(trained["tokens"] / trained["epoch_tokens"])
    assert rows["lstm--some--seed1"]["kind"] == "lstm"
    for row in rows.values():
        assert row["ece_masked_low"] < row["ece_masked"] < row["ece_masked_high"]
    (metric,) = [name for name in trained if re.fullmatch(r"homology/[^_]+", name)]
    assert 0 <= trained[metric] <= 1
    page = (out / "study.html").read_text()
    for words in ("ECE by parameters", "ECE by data", "lstm--some--seed1", "4-gram--some"):
        assert words in page
    assert "<script" not in page


def manifest(folder):
    return json.loads((folder / "study.json").read_text())


def hash_of(result):
    file = f"{result['checkpoint']}/model/model.safetensors"
    with open(file, "rb") as stream:
        return hashlib.sha256(stream.read()).hexdigest()


@pytest.fixture
def study(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return Study.load(tmp_path / "study.yaml")


def test_a_folder_holds_one_study(study, tmp_path):
    out = tmp_path / "out"
    refuse_other_study(out, study)
    out.mkdir()
    refuse_other_study(out, study)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else than a study"):
        refuse_other_study(out, study)
    write_manifest(out, study, {}, ["x"])
    refuse_other_study(out, study)
    (out / "study.json").write_text(json.dumps({"study": {"name": "another"}}))
    with pytest.raises(ConfigError, match="holds the study 'another', not 'smallest'"):
        refuse_other_study(out, study)


def test_runs_that_failed_are_in_the_manifest_and_end_the_job(study, tmp_path):
    first, second = (run.name for run in study.runs)
    endings = {
        first: Ending(study.runs[0], tmp_path / first),
        second: Ending(study.runs[1], tmp_path / second, "It found no corpus."),
    }
    write_manifest(tmp_path / "out", study, endings, ["x"])
    runs = manifest(tmp_path / "out")["runs"]
    assert (runs[first]["state"], runs[second]["state"]) == ("finished", "failed")
    assert runs[second]["problem"] == "It found no corpus."
    message = (
        r"1 of 2 runs failed, such as lstm--some--seed1: It found no corpus\. The same command"
    )
    with pytest.raises(RaptideError, match=message):
        run_scaling_study.refuse_failures(endings)
    run_scaling_study.refuse_failures({first: endings[first]})
