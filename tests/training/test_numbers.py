"""A run in which some numbers are none: what it saves, counts and ends with."""

import json

import pytest
from lone_worker import run_here
from small_runs import EVERY, as_recipe, make_recipe, metrics

from raptide.errors import TrainingDiverged
from raptide.training import worker
from raptide.training.step import Stepper


def spoil_loss(passes):
    """Of the first pass of a step."""

    def spoil(layer, inputs, output):
        passes.append(1)
        return output * float("nan") if len(passes) == 1 else output

    return spoil


def spoil_gradients(passes):
    def spoil(layer, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))

    return spoil


@pytest.fixture
def spoiled(monkeypatch):
    """Steps of the next run, and what becomes of them."""
    steps = {}

    class SomeSpoiled(Stepper):
        done = 0

        def step(self, share, rate, **asked):
            self.done += 1
            spoil = steps.get(self.done)
            if spoil is None:
                return super().step(share, rate, **asked)
            handle = self._engine.module.layers[0].register_forward_hook(spoil([]))
            try:
                return super().step(share, rate, **asked)
            finally:
                handle.remove()

    monkeypatch.setattr(worker, "Stepper", SomeSpoiled)
    return steps


@pytest.mark.parametrize("stage", [0, 2])
def test_nothing_is_saved_after_a_spoiled_step_but_at_the_very_end(
    alone, corpus, tmp_path, spoiled, stage
):
    tree = make_recipe(corpus, steps=3 * EVERY, zero_stage=stage)
    spoiled |= {EVERY: spoil_gradients, 2 * EVERY: spoil_loss, 3 * EVERY: spoil_loss}
    ended = run_here(as_recipe(tree, workers=1), tmp_path / "run")
    assert ended.step == 3 * EVERY
    (saved,) = (tmp_path / "run/checkpoints").glob("step-*")
    assert saved == ended.checkpoint
    lines = {line["trainer/global_step"]: line for line in metrics(tmp_path / "run")}
    assert [step for step, line in lines.items() if "train/grad_norm" not in line] == [EVERY]
    left_out = [step for step, line in lines.items() if line["train/nonfinite_targets"]]
    assert left_out == [2 * EVERY, 3 * EVERY]
    assert lines[EVERY - 1]["train/skipped_steps"] == 0
    assert lines[3 * EVERY]["train/skipped_steps"] == 1
    assert json.loads((saved / "manifest.json").read_text())["step"] == 3 * EVERY


def test_a_run_whose_gradients_stay_no_numbers_stops(alone, corpus, tmp_path, spoiled):
    tree = make_recipe(corpus, steps=2 * EVERY, zero_stage=0, max_nonfinite_steps=2)
    spoiled |= {3: spoil_gradients, 4: spoil_gradients}
    with pytest.raises(TrainingDiverged, match=r"loss or a gradient .* in 2 steps .* to step 4;"):
        run_here(as_recipe(tree, workers=1), tmp_path / "run")
