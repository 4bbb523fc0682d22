"""A run's folder: one command for the first start and every retry, one process at a time."""

import json
import shutil

import pytest
import yaml
from in_process import job_in_process
from small_runs import as_recipe, checkpoint_of, make_recipe, metrics

from raptide.errors import ConfigError
from raptide.training.planning.resuming import with_absolute_paths
from raptide.training.run_folder import alone_in, begin_run
from raptide.training.watching.heldout import Ece


@pytest.fixture
def retried(corpus, tmp_path):
    """A recipe, its run's folder, and the command that starts or resumes it."""
    tree = make_recipe(corpus, steps=4) | {"model": {"layers": 1, "width": 16, "heads": 2}}
    tree["cluster"]["workers"] = 1
    tree["checkpoint"]["every_steps"] = 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))

    def command(*more):
        options = ["--config", "recipe.yaml", "--output", "run", "--start-or-resume", *more]
        return job_in_process("pretrain_model.py", *options, cwd=tmp_path)

    return as_recipe(tree), tmp_path / "run", command


def begin(recipe, folder):
    begin_run(folder, with_absolute_paths(recipe), Ece(20.0, 20.0))


@pytest.mark.thorough
def test_one_command_starts_goes_on_and_is_done(retried):
    recipe, folder, command = retried
    begin(recipe, folder)  # and ended there, in the middle of its first checkpoint
    (folder / "checkpoints/step-00000002/zero").mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    done = command()
    assert done.returncode == 0, done.stderr
    assert "Trained to step 4" in done.stdout

    shutil.rmtree(checkpoint_of(folder, 4))
    (folder / "result.json").unlink()
    done = command()
    assert done.returncode == 0, done.stderr
    steps = [line["trainer/global_step"] for line in metrics(folder) if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 3, 4], "it went on from its checkpoint"

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = command()
    assert (done.returncode, done.stderr) == (0, "")
    assert "The run in run is finished" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    other = command("optimizer.lr=0.5", "cluster.workers=2")
    assert other.returncode == 2
    assert "optimizer.lr 0.001 there, 0.5 here, cluster.workers 1 there, 2 here" in other.stderr

    (folder / "result.json").unlink()
    with alone_in(folder):
        refused = command()
    assert refused.returncode == 2
    assert "Another process trains the run in run" in refused.stderr

    for manifest in folder.glob("checkpoints/step-*/manifest.json"):
        manifest.write_text("{")
    damaged = command()
    assert damaged.returncode == 2, "it started over, though there were checkpoints"
    assert "has no checkpoint that counts" in damaged.stderr


def test_a_run_that_was_begun_is_taken_for_no_other(retried):
    recipe, folder, command = retried
    begin(recipe, folder)
    done = command("training.steps=5", "--dry-run")
    assert done.returncode == 2
    assert "run holds the run of another recipe (training.steps 4 there, 5 here)" in done.stderr
    assert command("--dry-run").returncode == 0
    (folder / "recipe.yaml").unlink()
    assert "holds no run to resume" in command().stderr


def test_of_two_that_begin_in_one_place_one_is_refused(retried):
    recipe, folder, _ = retried
    folder.mkdir()  # an empty folder is nobody's
    begin(recipe, folder)
    first = json.loads((folder / "run.json").read_text())
    with pytest.raises(ConfigError, match="another process may have begun a run there"):
        begin(recipe, folder)
    assert json.loads((folder / "run.json").read_text()) == first
    assert sorted(path.name for path in folder.parent.iterdir()) == ["recipe.yaml", "run"]


@pytest.mark.parametrize("options", [("--resume", "run"), ("--config", "r.yaml", "--replace")])
def test_start_or_resume_goes_with_a_recipe_alone(tmp_path, options):
    done = job_in_process("pretrain_model.py", *options, "--start-or-resume", cwd=tmp_path)
    assert done.returncode == 2
    assert "give it --config" in done.stderr
