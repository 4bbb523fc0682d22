"""A pass that breaks inside leaves nothing in the update, in DeepSpeed's engines too."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from raptide.alphabet import ESM_33
from raptide.config import parse_settings
from raptide.data.streaming.batch import Cursor, GlobalBatch, PackedRows
from raptide.training.batches import cut_share, empty_micro_batch, share_bounds
from raptide.training.checkpoints.step_bundle import full_tensors
from raptide.training.engine import build_engine
from raptide.training.planning.recipe import Recipe
from raptide.training.step import Stepper

ROWS = 3

TREE = {
    "name": "x",
    "corpus": "none",
    "stream": {"row_tokens": 64, "crop_tokens": 64, "batch_rows": ROWS},
    "model": {"layers": 2, "width": 32, "heads": 4},
    "training": {"steps": 2, "micro_batch_rows": 1, "bucket_elements": 5000},
    "cluster": {"workers": 1, "device": "cpu"},
}


def recipe_of(stage, precision):
    kind = {"zero_stage": stage, "precision": precision, "zero3_keep_whole_below": 100}
    return parse_settings(Recipe, TREE | {"training": TREE["training"] | kind}, source="test")


def a_share():
    rng = np.random.default_rng(3)
    tokens = rng.integers(4, 24, (ROWS, 64)).astype(np.uint8)
    targets = np.where(rng.random(tokens.shape) < 0.2, tokens, ESM_33.pad).astype(np.uint8)
    rows = PackedRows(tokens, targets, [np.array([40, 24], np.int32)] * ROWS)
    batch = GlobalBatch(rows, np.zeros((ROWS, 3), np.int64), Cursor())
    return cut_share(share_bounds(ROWS, 0, 1, 1, ROWS), ESM_33, torch.device("cpu"), batch)


def without_the_second(share):
    first, _, third = share.micro
    return dataclasses.replace(
        share, micro=(first, empty_micro_batch(ESM_33, torch.device("cpu")), third)
    )


def break_second_pass(engine):
    """Infinite values in the middle of the model, kept for the way back."""
    passes = iter(range(100))

    def spoil(layer, inputs, output):
        return output * float("inf") if next(passes) == 1 else output

    engine.module.layers[0].register_forward_hook(spoil)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_updates_as_if_the_pass_had_been_empty(on_cpu, stage, precision):
    recipe, share = recipe_of(stage, precision), a_share()
    states = []
    for breaks in (False, True):
        engine = build_engine(recipe, 1, "cpu", None)
        before = dict(full_tensors(engine, recipe.training))
        stepper = Stepper(engine, 1)
        if breaks:
            break_second_pass(engine)
        result = stepper.step(share if breaks else without_the_second(share), 1e-2)
        after = dict(full_tensors(engine, recipe.training))
        states.append({name: after[name] - before[name] for name in after})
        assert result.left_out == (len(share.micro[1].targets.at_N) if breaks else 0)
        assert 0 < result.grad_norm < 1e3
    expected, found = states
    assert max(float(change.abs().max()) for change in expected.values()) > 1e-3
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_engine_uses_gradients_that_are_no_numbers(on_cpu, stage, precision):
    """Infinite ones under finite losses; the weights stay numbers, and the step is told."""
    recipe, share = recipe_of(stage, precision), a_share()
    engine = build_engine(recipe, 1, "cpu", None)
    stepper = Stepper(engine, 1)
    before = dict(full_tensors(engine, recipe.training))

    def spoil(layer, inputs, output):
        output.register_hook(lambda gradient: gradient * float("inf"))

    handle = engine.module.layers[0].register_forward_hook(spoil)
    result = stepper.step(share, 1e-2)
    handle.remove()
    assert math.isfinite(result.loss)
    assert result.skipped
    after = dict(full_tensors(engine, recipe.training))
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert all(torch.equal(after[name], before[name]) for name in before) or stage == 0
    assert not stepper.step(share, 1e-2).skipped
