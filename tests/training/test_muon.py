"""Muon: orthogonal steps for matrices, whoever holds them."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from muon_steps import RATE, saved_after, saved_in, take_steps
from torch.optim._muon import _zeropower_via_newtonschulz

from raptide.config import parse_settings
from raptide.errors import ConfigError
from raptide.model.families import is_matrix, make_model
from raptide.training import muon
from raptide.training.checkpoints.step_bundle import full_tensors
from raptide.training.engine import build_engine, load_state
from raptide.training.muon import COEFFICIENTS, ITERATIONS, RMS, Partitions, muon_step
from raptide.training.planning.recipe import Recipe

TREE = {
    "name": "x",
    "corpus": "none",
    "stream": {"row_tokens": 64, "crop_tokens": 64, "batch_rows": 4},
    "model": {"layers": 2, "width": 40, "heads": 4, "ffn": 100},
    "optimizer": {"matrices": "muon", "lr": RATE, "muon_lr": 2 * RATE, "weight_decay": 0.1},
    "training": {"steps": 9, "micro_batch_rows": 1, "precision": "fp32", "zero_stage": 0},
    "cluster": {"workers": 2, "device": "cpu"},
}


def with_settings(tree=TREE, **sections):
    tree = copy.deepcopy(tree)
    for section, changes in sections.items():
        tree[section] |= changes
    return tree


def recipe_of(**sections):
    return parse_settings(Recipe, with_settings(**sections), source="test")


RUNS = {
    **{f"{stage}-fp32": with_settings(training={"zero_stage": stage}) for stage in (0, 1, 2)},
    "2-bf16": with_settings(training={"zero_stage": 2, "precision": "bf16"}),
    "0-one-row": with_settings(stream={"batch_rows": 1}),  # one rank has nothing to do
    "2-one-row": with_settings(training={"zero_stage": 2}, stream={"batch_rows": 1}),
    "2-clipped": with_settings(training={"zero_stage": 2}, optimizer={"clip_norm": 0.01}),
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder of what two ranks have done with each of the recipes."""
    folder = tmp_path_factory.mktemp("muon")
    (folder / "recipes.json").write_text(json.dumps(RUNS))
    command = [sys.executable, str(ROOT / "tests/support/muon_ranks.py")]
    ranks = [subprocess.Popen([*command, str(rank), str(folder)]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return folder


def alone(recipe, steps=3):
    """What one rank comes to: losses and norms, and all weights."""
    engine = build_engine(recipe, 1, "cpu", None)
    results = take_steps(engine, recipe, 0, 1, steps=steps)
    return results, weights_of(engine, recipe)


@pytest.mark.parametrize("shape", [(36, 36), (100, 36), (36, 100), (7, 64)])
def test_a_step_is_orthogonal_and_of_the_size_of_adamws(shape):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    step = muon_step(drawn.bfloat16(), in_bf16=True).float()
    left, _, right = torch.linalg.svd(drawn, full_matrices=False)
    inside = left.T @ step @ right.T / (RMS * max(shape) ** 0.5)
    values = inside.diagonal()
    assert 0.6 < values.min() <= values.max() < 1.4
    assert (inside - values.diag()).abs().max() < 0.05
    assert step.square().mean().sqrt() == pytest.approx(RMS, rel=0.2)


@pytest.mark.parametrize("shape", [(64, 64), (96, 24), (24, 96), (5, 70)])
def test_a_step_is_torchs_in_bf16_and_as_good_in_fp32(shape):
    """Torch's own is private, and in bf16 alone: ten times slower on CPUs without units for it."""
    direction = torch.randn(shape).bfloat16()
    again = direction.clone()
    expected = _zeropower_via_newtonschulz(direction.clone(), COEFFICIENTS, ITERATIONS, 1e-7)
    expected = expected * (RMS * max(shape) ** 0.5)
    found = {}
    for in_bf16 in (True, False):
        found[in_bf16] = muon_step(direction, in_bf16=in_bf16)
        assert torch.equal(direction, again), "a direction may be whole, and shared by steps"
    assert torch.equal(found[True], expected)
    assert found[False].dtype == torch.bfloat16
    assert (found[False] - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("family", ["esm1", "esm1b", "esm2"])
def test_what_has_tokens_on_one_side_is_no_matrix(family):
    model = make_model(recipe_of(model={"family": family}).model)
    found = {name for name, each in model.named_parameters() if is_matrix(name, each)}
    inside = {"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"}
    inside |= {"fc1", "fc2"}
    assert found == {f"layers.{n}.{each}.weight" for n in range(2) for each in inside}


def test_parts_hold_every_element_once():
    rng = np.random.default_rng(5)
    for ranks in (1, 2, 3, 7):
        shapes = tuple(torch.Size(rng.integers(1, 9, 2).tolist()) for _ in range(12))
        total = sum(shape.numel() for shape in shapes)
        size = -(-total // ranks) + 1  # the last part ends in padding
        whole = torch.arange(total)
        found = []
        for rank in range(ranks):
            part = torch.full((size,), -1)
            for lies, shape, here, which in Partitions(shapes, rank, None).of_rank(size).values():
                assert whole[lies].view(shape).shape == shape
                part[here] = whole[lies][which]
            found.append(part)
        held = torch.cat(found)
        assert held[:total].tolist() == whole.tolist()
        assert (held[total:] == -1).all()


def test_groups_have_rates_of_their_own(on_cpu):
    engine = build_engine(recipe_of(), 1, "cpu", None)
    take_steps(engine, recipe_of(), 0, 1, steps=1)
    assert [group["lr"] for group in engine.optimizer.param_groups] == [2 * RATE, RATE]


def orthogonal_by_singular_values(direction):
    """The iteration's polynomial, five times on each singular value, in float64."""
    left, values, right = torch.linalg.svd(direction.double(), full_matrices=False)
    values /= values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


def test_a_step_moves_matrices_as_it_says(on_cpu):
    """Against the definition: momentum, Nesterov, orthogonal, decay."""
    recipe = recipe_of(optimizer={"clip_norm": 0.0})
    engine = build_engine(recipe, 1, "cpu", None)
    weights = engine.module.get_parameter("layers.1.fc1.weight")
    before, gradients = weights.detach().double(), []
    weights.register_post_accumulate_grad_hook(lambda each: gradients.append(each.grad.double()))
    momentum, expected = torch.zeros_like(before), before
    for step in range(2):
        take_steps(engine, recipe, 0, 1, steps=1, first=step)
        gradient = gradients[-1]  # of the last micro-batch, with those before
        momentum = 0.95 * momentum + 0.05 * gradient
        toward = orthogonal_by_singular_values(0.05 * gradient + 0.95 * momentum)
        expected = expected * (1 - 2 * RATE * 0.1) - 2 * RATE * 0.2 * 10 * toward
    moved, said = (weights.detach() - before), (expected - before)
    assert (moved - said).norm() < 0.15 * said.norm(), "bfloat16 on the way"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_loss_that_is_no_number_moves_no_matrix(on_cpu, stage):
    """The momentum would go on for long."""
    recipe = recipe_of(training={"zero_stage": stage})
    engine = build_engine(recipe, 1, "cpu", None)
    take_steps(engine, recipe, 0, 1, steps=2)
    before = weights_of(engine, recipe)
    spoiled = engine.module.register_forward_hook(lambda module, given, loss: loss * math.nan)
    take_steps(engine, recipe, 0, 1, steps=1)
    rate, decay = 2 * RATE, 0.1
    for name, weights in weights_of(engine, recipe).items():
        if is_matrix(name, weights):
            torch.testing.assert_close(weights, before[name] * (1 - rate * decay))
    spoiled.remove()
    take_steps(engine, recipe, 0, 1, steps=1)
    assert not torch.equal(weights_of(engine, recipe)[name], weights)


def weights_of(engine, recipe):
    return dict(full_tensors(engine, recipe.training))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("clip", [0.01, 1e3])
def test_what_is_clipped_are_the_gradients_before_the_momentum(on_cpu, stage, clip):
    recipe = recipe_of(training={"zero_stage": stage}, optimizer={"clip_norm": clip})
    engine = build_engine(recipe, 1, "cpu", None)
    ((_, norm),) = take_steps(engine, recipe, 0, 1, steps=1)
    optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    total = 0.0
    for group, kept in zip(optimizer.param_groups, (0.95, recipe.optimizer.beta1), strict=True):
        for parameter in group["params"]:
            total += float((optimizer.state[parameter]["exp_avg"] / (1 - kept)).square().sum())
    assert norm > 0.1
    assert total**0.5 == pytest.approx(min(norm, clip), rel=1e-3)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("family", ["esm1", "esm1b", "esm2"])
def test_what_is_no_matrix_moves_as_by_adamw_alone(on_cpu, family, stage):
    moved = {}
    for matrices in ("muon", "adamw"):
        model = {**TREE["model"], "family": family}
        recipe = recipe_of(
            model=model, training={"zero_stage": stage}, optimizer={"matrices": matrices}
        )
        engine = build_engine(recipe, 1, "cpu", None)
        take_steps(engine, recipe, 0, 1, steps=1)
        moved[matrices] = weights_of(engine, recipe)
    for name, weights in moved["muon"].items():
        same = torch.allclose(weights, moved["adamw"][name], rtol=0, atol=1e-6)
        assert same != is_matrix(name, weights), name


@pytest.mark.parametrize("stage", [0, 2])
def test_a_parameter_in_the_other_group_is_named(on_cpu, stage):
    recipe = recipe_of(training={"zero_stage": stage})
    engine = build_engine(recipe, 1, "cpu", None)
    own = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    if stage == 0:
        others = [group["params"] for group in own.param_groups][1]
    else:
        others = engine.optimizer.round_robin_bit16_groups[1]
    others.append(engine.module.layers[1].fc2.weight)
    with pytest.raises(AssertionError, match=r"layers\.1\.fc2\.weight is in the other group"):
        own.follow(engine)


def test_ranks_of_two_kinds_agree_on_their_arithmetic(on_cpu, monkeypatch):
    """One that has no units for bf16 is asked by all; gloo's reduction stands in for it."""
    monkeypatch.setattr(muon, "multiplies_bf16_faster", lambda device: True)
    engine = build_engine(recipe_of(), 1, "cpu", None)
    assert engine.optimizer._in_bf16
    monkeypatch.setattr(muon.dist, "all_reduce", lambda tensor, *_, **__: tensor.zero_())
    engine.optimizer.follow(engine)
    assert not engine.optimizer._in_bf16


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_make_the_steps_of_one(two_ranks, on_cpu, name):
    recipe = parse_settings(Recipe, RUNS[name], source=name)
    results, state = alone(recipe)
    told = [json.loads((two_ranks / f"rank-{rank}.json").read_text())[name] for rank in range(2)]
    assert told[0] == told[1]
    close = 2e-2 if "bf16" in name else 1e-3
    np.testing.assert_allclose(told[0], results, rtol=close)
    found = torch.load(two_ranks / f"{name}.pt")
    assert_moved_alike(found, state, recipe.model, name)


def assert_moved_alike(found, expected, shape, name):
    """Up to what rounding makes of steps whose size does not depend on the gradients', the more so
    where these are of few rows, and so of low rank."""
    share = 0.5 if "bf16" in name else 0.2 if "one-row" in name else 0.1
    fresh = dict(make_model(shape).initialise(1).named_parameters())
    for each, weights in expected.items():
        moved = (weights - fresh[each].detach()).norm()
        assert (found[each] - weights).norm() < share * moved, each


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_save_and_one_goes_on(two_ranks, on_cpu, name):
    """At stage 0 as it is, else by DeepSpeed's conversion, which carries the momentum along."""
    recipe = parse_settings(Recipe, RUNS[name], source=name)
    saved = saved_in(two_ranks / name)
    engine = build_engine(recipe, 1, "cpu", saved)
    load_state(engine, saved, 1)
    assert [group["of_rate"] for group in engine.optimizer.param_groups[:1]] == [2]
    results = take_steps(engine, recipe, 0, 1, steps=1, first=2)
    told = json.loads((two_ranks / "rank-0.json").read_text())[name]
    close = 2e-2 if "bf16" in name else 1e-3
    np.testing.assert_allclose(results, told[2:], rtol=close)
    found, state = torch.load(two_ranks / f"{name}.pt"), weights_of(engine, recipe)
    assert_moved_alike(found, state, recipe.model, name)


@pytest.mark.parametrize("name", RUNS)
def test_two_go_on_where_they_were(two_ranks, name):
    """Each with its part of the momentum: bit for bit."""
    told = json.loads((two_ranks / "rank-0.json").read_text())
    assert told[f"{name}, resumed"] == told[name][2:]
    whole, resumed = (torch.load(two_ranks / f"{name}{end}.pt") for end in ("", ", resumed"))
    for each, weights in whole.items():
        assert torch.equal(resumed[each], weights), each


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_goes_on_where_it_was(on_cpu, tmp_path, stage):
    recipe = recipe_of(training={"zero_stage": stage})
    engine = build_engine(recipe, 1, "cpu", None)
    take_steps(engine, recipe, 0, 1, steps=2)
    saved_after(engine, recipe, tmp_path, workers=1)
    expected = take_steps(engine, recipe, 0, 1, steps=2, first=2)
    saved = saved_in(tmp_path)
    resumed = build_engine(recipe, 1, "cpu", saved)
    load_state(resumed, saved, 1)
    assert take_steps(resumed, recipe, 0, 1, steps=2, first=2) == expected


@pytest.mark.parametrize("stage", [0, 2])
def test_settings_are_those_of_the_recipe_it_goes_on_with(on_cpu, tmp_path, stage):
    recipe = recipe_of(training={"zero_stage": stage})
    engine = build_engine(recipe, 1, "cpu", None)
    take_steps(engine, recipe, 0, 1, steps=1)
    saved_after(engine, recipe, tmp_path, workers=1)
    changes = {"muon_lr": 5 * RATE, "muon_momentum": 0.8, "weight_decay": 0.3, "beta1": 0.7}
    changed = recipe_of(training={"zero_stage": stage}, optimizer=changes)
    saved = saved_in(tmp_path)
    resumed = build_engine(changed, 1, "cpu", saved)
    load_state(resumed, saved, 1)
    take_steps(resumed, changed, 0, 1, steps=1)
    muon, adamw = resumed.optimizer.param_groups
    assert (muon["lr"], muon["momentum"], muon["weight_decay"]) == (5 * RATE, 0.8, 0.3)
    assert (adamw["lr"], tuple(adamw["betas"]), adamw["weight_decay"]) == (RATE, (0.7, 0.999), 0.3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training": {"zero_stage": 3}}, "use training.zero_stage 0, 1 or 2"),
        ({"training": {"zero_stage": 2, "offload_optimizer": True}}, "without offload_optimizer"),
        ({"training": {"precision": "bf16"}}, "with bf16 needs training.zero_stage 1 or 2"),
    ],
)
def test_what_muon_cannot_do_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        recipe_of(**changes)


def test_an_lstm_is_refused():
    tree = TREE | {"model": {"preset": "lstm_l2_300K"}}
    with pytest.raises(ConfigError, match="muon is for transformers"):
        parse_settings(Recipe, tree, source="test")
