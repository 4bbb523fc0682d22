"""Trouble that is seen early."""

import math
import subprocess
import sys

import pytest
import torch

from raptide.config import parse_settings
from raptide.errors import TrainingDiverged
from raptide.training.planning.estimate import explain_memory, ran_out_of_memory
from raptide.training.planning.recipe import Recipe
from raptide.training.step import StepResult
from raptide.training.watching.watch import SCALES, LossWatch, describe_hang

HANGING = """
import sys, threading, time
from pathlib import Path
from raptide.training.watching.watch import HangWatch
watch = HangWatch(Path(sys.argv[1]), rank=int(sys.argv[2]), attempt=2, timeout_s=1.0)
def waits_for_the_others():
    time.sleep(60)
watch.progress()
waits_for_the_others()
"""


def test_a_jump_of_the_loss_is_a_spike_and_its_noise_is_not():
    watch = LossWatch(max_nonfinite_steps=2)
    noise = [2.8 + 0.02 * ((7 * step) % 5) for step in range(40)]
    assert not any(watch.see(StepResult(loss, 0)) for loss in noise)
    assert watch.see(StepResult(4.5, 0))
    assert not watch.see(StepResult(2.85, 0))
    assert watch.spikes == 1
    assert not LossWatch(2).see(StepResult(50.0, 0)), "there is nothing yet to compare it with"


def test_a_streak_of_losses_that_are_no_numbers_ends_the_run_but_single_ones_do_not():
    watch = LossWatch(max_nonfinite_steps=2)
    for left_out in (5, 0, 5):
        watch.see(StepResult(2.8, left_out))
        watch.refuse_divergence(3, last=False)
    watch.refuse_divergence(3, last=True)  # the weights are none the worse for what is left out
    watch.see(StepResult(2.8, 5))
    with pytest.raises(TrainingDiverged, match="in 2 steps in a row, up to step 4"):
        watch.refuse_divergence(4, last=False)


def test_a_last_step_of_which_nothing_is_a_number_ends_the_run_without_it():
    watch = LossWatch(max_nonfinite_steps=2)
    watch.see(StepResult(math.nan, 5))
    with pytest.raises(TrainingDiverged, match="in 1 steps in a row, up to step 3"):
        watch.refuse_divergence(3, last=True)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_gradients_that_are_no_numbers_count_as_losses_do(norm):
    watch = LossWatch(max_nonfinite_steps=2)
    watch.see(StepResult(2.8, 0, norm))
    assert (watch.nonfinite_steps, watch.skipped) == (1, 1)
    watch.see(StepResult(2.8, 0, 1.0))
    assert (watch.nonfinite_steps, watch.skipped) == (0, 1)
    watch.see(StepResult(2.8, 5, 1.0))
    watch.see(StepResult(2.8, 0, norm))
    with pytest.raises(TrainingDiverged, match="The loss or a gradient was NaN or infinite in 2"):
        watch.refuse_divergence(4, last=False)


def test_steps_that_are_left_out_until_the_scale_of_the_loss_is_found_end_nothing():
    watch = LossWatch(max_nonfinite_steps=2, scales_loss=True)
    for _ in range(9):
        watch.see(StepResult(2.8, 0, math.inf))
        watch.refuse_divergence(9, last=True)
    assert (watch.nonfinite_steps, watch.skipped) == (0, 9)
    for _ in range(SCALES + 2 - 9):
        watch.refuse_divergence(30, last=False)
        watch.see(StepResult(2.8, 0, math.inf))
    with pytest.raises(TrainingDiverged, match="in 2 steps in a row"):
        watch.refuse_divergence(30, last=False)


def test_ranks_that_hang_leave_their_stacks_and_end(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-c", HANGING, str(tmp_path), str(rank)])
        for rank in range(2)
    ]
    assert [rank.wait(timeout=60) for rank in ranks] == [1, 1]
    (tmp_path / "hangs/attempt-002-rank-00002.txt").write_text("")  # of one that was killed
    assert describe_hang(tmp_path, 1) is None
    assert describe_hang(tmp_path, 2).startswith("2 workers stood still")
    stacks = [file.read_text() for file in sorted((tmp_path / "hangs").iterdir())]
    assert ["waits_for_the_others" in stack for stack in stacks] == [True, True]


@pytest.mark.parametrize(
    ("training", "remedy"),
    [
        ({"micro_batch_rows": 64}, "training.checkpoint_activations=true"),
        (
            {"micro_batch_rows": 512, "checkpoint_activations": True},
            "training.micro_batch_rows=256",
        ),
        ({"micro_batch_rows": 1, "checkpoint_activations": True}, "offload_optimizer=true"),
        (
            {
                "micro_batch_rows": 1,
                "checkpoint_activations": True,
                "offload_optimizer": True,
                "zero_stage": 3,
            },
            "offload_parameters=true",
        ),
    ],
)
def test_a_worker_out_of_memory_says_which_setting_to_lower(training, remedy):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**56)
    assert ran_out_of_memory(caught.value)
    assert not ran_out_of_memory(RuntimeError("shapes do not match"))
    tree = {
        "name": "x",
        "corpus": "x",
        "model": {"preset": "esm2_t33_650M"},
        "training": {"steps": 10, **training},
        "cluster": {"workers": 8},
    }
    sentence = explain_memory(parse_settings(Recipe, tree, source="test"), 8, rank=3)
    assert sentence.startswith("Rank 3 ran out of memory")
    assert remedy in sentence
