"""What goes along with a job, and what its arguments become."""

import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from commandline import refuse_output
from raptide.errors import ConfigError
from raptide.operations.shipping import PARTS, default_name, job_names, pack


@pytest.fixture
def checkout(tmp_path):
    for name in ("platform/raptide", "jobs/recipes", "serve", "runs/old", "tests"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "my.fasta", "jobs/recipes/demo.yaml"):
        (tmp_path / name).write_text("x")
    (tmp_path / "jobs/pretrain_model.py").write_text('if __name__ == "__main__":\n    pass\n')
    (tmp_path / "jobs/commandline.py").write_text("")
    return tmp_path


def packed(checkout, *arguments, job="pretrain_model", **settings):
    return pack(checkout, job, arguments, code_version="0.1+abc", **settings)


def words(shipment):
    return shlex.split(shipment.entrypoint.split("exec ")[1])


def test_only_what_jobs_need_is_shipped(checkout):
    env = packed(checkout).runtime_env
    assert env["working_dir"] == str(checkout)
    assert {"/my.fasta", "/runs", "/tests"} <= set(env["excludes"])
    assert not {f"/{part}" for part in PARTS} & set(env["excludes"])


def test_a_job_has_time_to_save_and_knows_its_commit(checkout):
    env = packed(checkout, stop_wait_s=77).runtime_env["env_vars"]
    assert env == {"RAY_JOB_STOP_WAIT_TIME_S": "77", "RAPTIDE_CODE_VERSION": "0.1+abc"}


def test_the_job_itself_is_the_process_that_ray_watches(checkout):
    shipment = packed(checkout, "a b=c's", python="python3.11")
    assert words(shipment) == ["python3.11", "jobs/pretrain_model.py", "a b=c's"]
    assert shipment.entrypoint.startswith('PYTHONPATH="$PWD/platform:$PWD:$PYTHONPATH" exec ')
    assert words(packed(checkout, "/x.yaml", job="serve")) == ["python", "-m", "serve", "/x.yaml"]


def test_paths_that_come_along_are_found_there_from_anywhere(checkout, monkeypatch):
    monkeypatch.chdir(checkout / "jobs")
    given = ("--config", "recipes/demo.yaml", "--config=recipes/demo.yaml", "steps=3")
    there = ["--config", "jobs/recipes/demo.yaml", "--config=jobs/recipes/demo.yaml", "steps=3"]
    assert words(packed(checkout, *given))[2:] == there


def test_paths_that_stay_at_home_are_refused_and_those_of_the_cluster_are_not(
    checkout, monkeypatch
):
    monkeypatch.chdir(checkout)
    (checkout / "mine.yaml").write_text("x")
    for argument in ("runs/old", "corpus=runs/old", "mine.yaml"):
        with pytest.raises(ConfigError, match=rf"^{argument} names a path of this machine"):
            packed(checkout, argument)
    kept = ("/shared/runs", "corpus=s3://bucket/c", "runs/new", "tests")
    assert words(packed(checkout, *kept))[2:] == list(kept)


def test_an_unknown_job_is_refused_with_those_there_are(checkout):
    with pytest.raises(ConfigError, match=r"no job 'commandline'.*pretrain_model, serve"):
        packed(checkout, job="commandline")


def test_every_script_of_this_checkout_can_be_submitted_but_the_one_that_submits():
    names = job_names(ROOT)
    assert {"pretrain_model", "embed_proteins", "check_cluster", "serve"} <= set(names)
    assert not {"submit_job", "commandline", "processes"} & set(names)


def test_a_default_name_stands_for_one_command():
    names = {
        default_name("embed_proteins", ["--model", "a"]),
        default_name("embed_proteins", ["--model", "b"]),
        default_name("embed_proteins", ["--modela"]),
        default_name("score_proteins", ["--model", "a"]),
    }
    assert len(names) == 4
    assert default_name("x", ["y"]) == default_name("x", ["y"])


def test_an_output_in_a_jobs_own_copy_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match="--output runs/x would lie in this job's copy"):
        refuse_output(Path("runs/x"), "--output")
    refuse_output(tmp_path / "runs/x", "--output")
