"""What a run is said to take, against what torch counts."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from raptide.alphabet import ESM_33
from raptide.config import parse_settings
from raptide.data.streaming.batch import Cursor, GlobalBatch, PackedRows
from raptide.model.config import ModelSettings
from raptide.model.families import count_parameters
from raptide.model.packed import Packed, Targets
from raptide.model.transformer import Esm
from raptide.training.planning.estimate import (
    activation_bytes,
    checkpoint_bytes,
    peak_flops,
    step_flops,
    worker_memory,
)
from raptide.training.planning.recipe import EvaluationSettings, Recipe
from raptide.training.watching.heldout import Ece, Evaluations

FAMILIES = ("esm1", "esm1b", "esm2")


def model_of(family):
    return ModelSettings(family=family, layers=5, width=64, heads=4)


def recipe_of(**training):
    tree = {
        "name": "x",
        "corpus": "x",
        "model": {"preset": "esm2_t12_35M"},
        "training": {"steps": 10, "micro_batch_rows": 4, **training},
        "cluster": {"workers": 8},
    }
    return parse_settings(Recipe, tree, source="test")


def a_batch(lengths):
    rng = np.random.default_rng(2)
    tokens = rng.integers(4, 24, sum(lengths)).astype(np.uint8)
    targets = np.where(rng.random(len(tokens)) < 0.15, tokens, ESM_33.pad).astype(np.uint8)
    rows = PackedRows(tokens[None], targets[None], [np.array(lengths, np.int32)])
    return GlobalBatch(rows, np.zeros((1, 3), np.int64), Cursor())


def forward(model, batch):
    tokens = torch.from_numpy(batch.rows.tokens[0].astype(np.int64))
    true = torch.from_numpy(batch.rows.targets[0].astype(np.int64))
    lengths = tuple(batch.rows.segments[0].tolist())
    at = torch.nonzero(true != ESM_33.pad)[:, 0]
    return model(Packed(tokens, lengths), Targets(at, true[at])).sum()


@pytest.mark.parametrize("family", ["esm1b", "esm2"])
def test_arithmetic_is_what_torch_counts(family):
    settings = model_of(family)
    batch = a_batch([200, 90, 310])
    model = Esm(settings).initialise(1)
    # Plain matrix products, since torch does not count the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(model, batch).backward()
    assert step_flops(settings, batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_the_allocator_still_holds_after_the_forward_pass(family, dtype):
    """Bytes that torch's CPU allocator has given out and not got back: no hook of autograd's."""
    settings = model_of(family)
    batch = a_batch([128, 300, 84])
    model = Esm(settings).initialise(1).to(dtype)
    forward(model, batch)  # what is made once, such as rotary tables, is no activation
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward(model, batch)
    events = profiler.profiler.kineto_results.events()
    held = sum(event.nbytes() for event in events if event.name() == "[memory]")
    assert activation_bytes(settings, dtype) * 512 == pytest.approx(held, rel=0.05)
    del loss


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_can_be_computed_again_for_the_same_gradients(family):
    settings = model_of(family)
    batch = a_batch([128, 300, 84])
    model = Esm(settings).initialise(1)
    kept = []
    for again in (False, True):
        model.checkpoint_activations = again
        model.zero_grad()
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = forward(model, batch)
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        kept.append((sum(sizes.values()), loss.detach(), gradients))
    (whole, *expected), (inputs, *found) = kept
    assert inputs < whole / 4
    torch.testing.assert_close(found, expected)
    recipe, saving = recipe_of(), recipe_of(checkpoint_activations=True)
    assert worker_memory(saving, 8).activations < worker_memory(recipe, 8).activations / 4


def test_zero_divides_more_from_stage_to_stage():
    parameters = count_parameters(ModelSettings.model_validate({"preset": "esm2_t12_35M"}))
    held = [
        tuple(
            round(size / parameters, 6)
            for size in (memory.weights, memory.gradients, memory.optimizer)
        )
        for stage in range(4)
        for memory in [worker_memory(recipe_of(zero_stage=stage), 8)]
    ]
    # A worker's part of the gradients twice at stage 2, where they are added up.
    assert held == [(2, 2, 12), (2, 2, 1.5), (2, 0.5, 1.5), (0.25, 0.25, 1.5)]
    for stage, optimizer in ((0, 8), (3, 12)):
        alone = worker_memory(recipe_of(zero_stage=stage, precision="fp32"), 1)
        assert (alone.weights, alone.gradients, alone.optimizer) == tuple(
            size * parameters for size in (4, 4, optimizer)
        )
    assert checkpoint_bytes(recipe_of()) == 18 * parameters


def test_buckets_count_as_deepspeed_makes_them():
    """Twice where one travels while the other fills."""
    bytes_of = {
        (stage, overlap): worker_memory(
            recipe_of(zero_stage=stage, overlap_comm=overlap, bucket_elements=1000), 8
        ).buckets
        for stage in range(4)
        for overlap in (False, True)
    }
    assert [bytes_of[stage, False] for stage in range(4)] == [0, 2000, 2000, 2000]
    assert [bytes_of[stage, True] for stage in range(4)] == [0, 4000, 4000, 2000]
    whole = worker_memory(recipe_of(bucket_elements=10**9), 8)
    assert whole.buckets == 2 * whole.weights, "no bucket is larger than the model"


def test_peak_is_that_of_the_recipe_or_of_a_known_device():
    assert peak_flops(recipe_of(), "cpu") is None
    tree = recipe_of().model_dump()
    tree["cluster"]["peak_tflops"] = 2.5
    assert peak_flops(parse_settings(Recipe, tree, source="test"), "cpu") == 2.5e12


def test_patience_counts_evaluations_since_the_best_and_travels_in_the_manifest():
    found = Evaluations()
    for step, ece in enumerate([17.0, 16.0, 16.5, 16.0], 1):
        found = found.after(Ece(ece, ece), step)
    assert (found.best, found.since_best, found.step) == (16.0, 2, 4)
    assert Evaluations.of_manifest(found.to_manifest()) == found
    assert found.is_over(EvaluationSettings(patience=2))
    assert not found.is_over(EvaluationSettings(patience=3))
    assert not found.is_over(EvaluationSettings())


def test_a_goal_is_of_the_last_evaluation_on_masks():
    found = Evaluations().after(Ece(9.0, 12.0), step=1)
    assert found.is_over(EvaluationSettings(until_ece_masked=12.0))
    assert not found.is_over(EvaluationSettings(until_ece_masked=11.9))
    assert not Evaluations().is_over(EvaluationSettings(until_ece_masked=12.0))
