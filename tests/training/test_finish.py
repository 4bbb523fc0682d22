"""The end of a run: what comes after its last step is not lost with whoever dies there."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from conftest import ROOT
from offline_wandb import read_runs
from small_runs import as_recipe, checkpoint_of, evaluations, losses, make_recipe, run_to_the_end

FIRST, LAST = 2, 4


@pytest.mark.thorough
def test_a_run_killed_in_its_last_evaluation_is_finished_by_a_resume(corpus, tmp_path, capsys):
    """With a checkpoint whose evaluation beside the training has not ended, and never will."""
    tree = make_recipe(corpus, tracked=True, steps=4)
    tree["cluster"]["workers"] = 1
    tree["checkpoint"] |= {"every_steps": 2, "keep": 1}
    tree["evaluation"] |= {"every_steps": 2, "asynchronous": True}
    run = tmp_path / "run"
    kill_after_the_last_checkpoint(tree, run)
    assert not (run / "result.json").exists()
    manifests = [read_manifest(run, name) for name in (FIRST, LAST)]
    assert [each["heldout_step"] for each in manifests] == [0, 0], "the kill came too late"
    assert [each["awaits_evaluation"] for each in manifests] == [True, False]
    first, last = checkpoint_of(run, FIRST), checkpoint_of(run, LAST)
    (first / "model/config.json").unlink()

    finished = run_to_the_end(as_recipe(tree), run, resume=True)
    assert (finished.step, finished.failed_evaluations) == (4, 1)
    assert finished.audit.steps == 4
    assert finished.audit.redone_steps == 0
    assert sorted(losses(run)) == [1, 2, 3, 4]
    assert evaluations(run)[4]["eval/ece"] == finished.heldout_ece.all_chosen
    assert evaluations(run)[4]["eval/failed"] == 1
    assert read_manifest(run, LAST)["heldout_step"] == 4
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [last.name]
    assert (run / "loss.png").exists()
    artifacts = [name for *_, found in read_runs(run / "wandb") for kind, name, _ in found]
    assert [name for name in artifacts if name.startswith("model-")] != []
    assert (
        f"{first.name} was not evaluated beside the training: it is gone" in capsys.readouterr().err
    )

    before = content(run)
    assert run_to_the_end(as_recipe(tree), run, resume=True) == finished
    assert content(run) == before
    assert f"{run} is finished; raise training.steps" in capsys.readouterr().out


def kill_after_the_last_checkpoint(tree, run):
    """Run a recipe as a job, and kill it while it evaluates what it has saved last: it waits for
    an evaluation that waits for a pipe."""
    config = run.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, str(ROOT / "jobs/pretrain_model.py"), "--config", str(config)]
    process = subprocess.Popen([*command, "--output", str(run)], start_new_session=True)
    await_checkpoint(run, FIRST, process)
    pipe = checkpoint_of(run, FIRST) / "model/config.json"
    pipe.unlink()
    os.mkfifo(pipe)
    await_checkpoint(run, LAST, process)
    time.sleep(1)  # the workers are at the evaluation now
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(workers_of(process.pid)):  # they go with it, in an order of their own
        time.sleep(0.1)


def workers_of(session):
    """Processes of a job that train or evaluate."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            works = process.name().startswith(("ray::RayTrain", "ray::evaluate"))
            ended = process.status() == psutil.STATUS_ZOMBIE
            if works and not ended and os.getsid(process.pid) == session:
                yield process


def await_checkpoint(run, step, process):
    while not list(run.glob(f"checkpoints/step-{step:08d}-*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.01)


def read_manifest(run, step):
    return json.loads((checkpoint_of(run, step) / "manifest.json").read_text())


def content(run):
    """Every file of a run, and when it was written."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in run.rglob("*")
        if path.is_file() and path.name != "audit.json"
    }
