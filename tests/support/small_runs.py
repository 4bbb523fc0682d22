"""A tiny run on two workers, and what its tests share."""

import json

from raptide.config import parse_settings
from raptide.training.planning.recipe import Recipe
from raptide.training.trainer import prepare_run, pretrain

STEPS = 24
EVERY = 6
ROWS = 4 + 4 + 5 + 6 + 7 + 7 + 8 + 9 + 16 * 10
"""Of all steps: a batch grows from 4 to 10 rows in the first 8."""


def make_recipe(corpus, *, tracked=False, **training):
    """
    Args:
        tracked: keep the run in W&B too, which takes its worker seconds to start.
    """
    tree = {
        "name": "test",
        "corpus": str(corpus.path),
        "stream": {
            "row_tokens": 256,
            "crop_tokens": 128,
            "batch_rows": 10,
            "seed": 3,
            "first_batch_rows": 4,
            "batch_warmup_steps": 8,  # so whatever happens meets growth
        },
        "model": {"layers": 2, "width": 64, "heads": 4},
        "optimizer": {"lr": 1e-3, "warmup_steps": 10},
        "training": {
            "steps": STEPS,
            "micro_batch_rows": 2,
            "precision": "fp32",
            "zero_stage": 2,
            **training,
        },
        "cluster": {"workers": 2, "device": "cpu"},
        "checkpoint": {"every_steps": EVERY, "keep": 10},
        "evaluation": {"every_steps": EVERY, "blocks": 1},
        "tracking": {"log_every": 1, "audit": True, "mode": "auto" if tracked else "disabled"},
    }
    return tree


def as_recipe(tree, **cluster):
    return parse_settings(Recipe, tree | {"cluster": tree["cluster"] | cluster}, source="test")


def run_to_the_end(recipe, folder, *, resume=False, **more):
    return pretrain(recipe, prepare_run(recipe, folder, resume=resume), folder, **more)


def checkpoint_of(run, step):
    """The folder of a run's checkpoint after a step."""
    (folder,) = (run / "checkpoints").glob(f"step-{step:08d}-*")
    return folder


def metrics(run):
    return list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))


def losses(run):
    """Loss of each step, a step redone counted by its last occurrence."""
    return {
        line["trainer/global_step"]: line["train/loss"]
        for line in metrics(run)
        if "train/loss" in line
    }


def evaluations(run):
    """What each evaluation found, by the step of its model."""
    return {
        line["eval/step"]: {name: v for name, v in line.items() if name.startswith("eval/")}
        for line in metrics(run)
        if "eval/step" in line
    }
