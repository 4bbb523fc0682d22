"""A run that is told to end saves the step that it is in, and goes on from it without a gap."""

import os
import signal
import threading
import time

import pytest
from lone_worker import run_here
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.preemption import PreemptionInfo
from small_runs import as_recipe, make_recipe, metrics, run_to_the_end

from raptide.training import worker
from raptide.training.checkpoints.checkpoint import newest_checkpoint
from raptide.training.checkpoints.owned import Storage

pytestmark = pytest.mark.usefixtures("cluster")

STEPS = 40


def sigterm_at(run, step):
    """Once that many steps are logged."""

    def send():
        until = time.monotonic() + 300
        while not (run / "metrics.jsonl").exists() or len(metrics(run)) < step:
            assert time.monotonic() < until
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def slow_and_rarely_saved(corpus, workers):
    """A recipe of which nothing is saved or evaluated before its end."""
    tree = make_recipe(corpus, steps=STEPS)
    tree["checkpoint"]["every_steps"] = tree["evaluation"]["every_steps"] = 1000
    return as_recipe(tree, workers=workers)


def test_sigterm_ends_the_step_saves_and_says_so(alone, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker, "LOOK_EVERY_S", 0.0)
    step_of = worker.Stepper.step

    def slow_step(*given, **asked):
        time.sleep(0.1)  # the board is polled twice a second
        return step_of(*given, **asked)

    monkeypatch.setattr(worker.Stepper, "step", slow_step)
    recipe, run = slow_and_rarely_saved(corpus, 1), tmp_path / "run"
    sender = sigterm_at(run, 3)
    with pytest.raises(KeyboardInterrupt):
        run_here(recipe, run)
    sender.join()
    saved = newest_checkpoint(Storage.of_run(run))
    assert 3 <= saved.step < STEPS
    assert saved.manifest["heldout_step"] == 0, "it is not evaluated on the way out"
    told = capsys.readouterr().err
    assert f"{run} is saved at step {saved.step}; --resume goes on." in told
    assert "The run was told to end: it ends its step and saves first." in told
    assert not (run / "result.json").exists()

    monkeypatch.setattr(worker.Stepper, "step", step_of)
    finished = run_here(recipe, run, resume=True)
    assert finished.audit.steps == finished.step == STEPS
    assert finished.audit.redone_steps == 0


@pytest.mark.thorough
def test_two_workers_leave_in_the_same_step(corpus, tmp_path, monkeypatch):
    recipe, run = slow_and_rarely_saved(corpus, 2), tmp_path / "run"
    recipe = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"steps": 20_000})}
    )
    sender = sigterm_at(run, 3)
    with pytest.raises(KeyboardInterrupt):
        run_to_the_end(recipe, run)
    sender.join()
    saved = newest_checkpoint(Storage.of_run(run))
    assert saved is not None
    logged = {line["trainer/global_step"] for line in metrics(run)}
    assert max(logged) == saved.step, "nothing was trained that was not saved"


def test_a_node_that_is_to_go_away_makes_a_checkpoint_at_once_and_no_rank_meets_another(
    alone, corpus, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(worker, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(worker.ray.train, "get_preemption_info", lambda: pytest.fail("a barrier"))
    step_of, steps = worker.Stepper.step, []

    def step(*given, **asked):
        steps.append(asked["save"])
        if len(steps) == 3:
            noticed = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [0]})
            get_train_context().preemption_context.preemption_info = noticed
        return step_of(*given, **asked)

    monkeypatch.setattr(worker.Stepper, "step", step)
    tree = make_recipe(corpus, steps=8)
    tree["checkpoint"]["every_steps"] = tree["evaluation"]["every_steps"] = 1000
    run_here(as_recipe(tree, workers=1), tmp_path / "run")
    saved = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    assert [int(each.name.split("-")[1]) for each in saved] == [4, 8]
    assert [number for number, save in enumerate(steps, 1) if save] == [4], "told once"
    assert "saving a checkpoint after step 4." in capsys.readouterr().err
