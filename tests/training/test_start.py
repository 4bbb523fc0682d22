"""Starting from weights that others have trained."""

import shutil
from dataclasses import replace

import pytest
import torch
from draws import random_weights
from small_runs import as_recipe, make_recipe, run_to_the_end
from transformers import EsmForMaskedLM, EsmModel
from transformers_shapes import esm_config

from raptide.config import load_settings
from raptide.errors import BundleError, ConfigError
from raptide.model.formats.detect import read_weights, write_weights
from raptide.model.formats.weights import Weights
from raptide.model.packed import Packed
from raptide.training.checkpoints.checkpoint import SavedCheckpoint
from raptide.training.checkpoints.export import read_zero_weights
from raptide.training.checkpoints.owned import Storage
from raptide.training.engine import build_model
from raptide.training.planning.recipe import Recipe
from raptide.training.run_folder import load_resumed
from raptide.training.trainer import prepare_run

SHAPE = {"layers": 2, "width": 64, "heads": 4}


@pytest.mark.parametrize(
    ("rotary", "model"),
    [
        (True, {"family": "esm2", **SHAPE}),
        (False, {"family": "esm1b", "max_positions": 128, **SHAPE}),
    ],
)
def test_training_starts_from_the_weights_of_a_transformers_folder(
    alone, corpus, tmp_path, rotary, model
):
    folder = tmp_path / "published"
    config = esm_config(rotary=rotary, layers=2, width=64, positions=128)
    EsmForMaskedLM(config).save_pretrained(folder)
    recipe = as_recipe(make_recipe(corpus) | {"init_from": str(folder), "model": model})
    prepare_run(recipe, tmp_path / "run")
    weights = read_weights(folder)
    for name, parameter in build_model(recipe, "cpu", None, {}).named_parameters():
        assert torch.equal(parameter, weights.state[name]), name
    wrong = make_recipe(corpus) | {"init_from": str(folder), "model": model | {"layers": 3}}
    with pytest.raises(ConfigError, match=r"has model\.layers 2, but the recipe asks for 3"):
        prepare_run(as_recipe(wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fresh_frequencies_have_the_base_of_the_recipe_and_reach_transformers(alone, tmp_path):
    tree = {"name": "x", "corpus": "none", "stream": {"batch_rows": 2}, "model": SHAPE}
    tree |= {"training": {"steps": 1, "micro_batch_rows": 1, "rotary_base": 500.0}}
    recipe = as_recipe(tree | {"cluster": {"workers": 1}})
    model = build_model(recipe, "cpu", None, {})
    expected = 500.0 ** -(torch.arange(8) / 8)
    torch.testing.assert_close(model.frequencies(), expected)
    write_weights(tmp_path / "model", Weights.of(model))
    theirs = EsmForMaskedLM.from_pretrained(tmp_path / "model", attn_implementation="sdpa").eval()
    tokens = torch.tensor([[0, 5, 9, 13, 7, 4, 20, 2]])
    ours = model.eval()(Packed(tokens[0], (8,)))
    torch.testing.assert_close(theirs(tokens).logits[0], ours, rtol=1e-4, atol=1e-5)


def test_training_starts_from_no_model_without_a_language_model_head(corpus, tmp_path):
    folder = tmp_path / "encoder"
    EsmModel(esm_config(rotary=True, layers=2, width=64, positions=128)).save_pretrained(folder)
    recipe = make_recipe(corpus) | {"init_from": str(folder), "model": {"family": "esm2", **SHAPE}}
    with pytest.raises(BundleError, match="no language-model head, which training needs; start"):
        prepare_run(as_recipe(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_run_outlives_the_weights_it_started_from(corpus, tmp_path, monkeypatch):
    """Named by a relative path, gone after the first checkpoint; resumed from another folder."""
    shape = {"family": "esm2", "layers": 1, "width": 16, "heads": 2}
    start = random_weights(**shape)
    start = replace(start, inv_freq=start.frequencies() * (1 + 0.1 * torch.rand(4)))
    write_weights(tmp_path / "start", start)
    (tmp_path / "elsewhere").mkdir()
    tree = make_recipe(corpus, steps=2) | {"init_from": "start", "model": shape}
    tree["optimizer"] = {"lr": 1e-30, "warmup_steps": 1}  # nothing is learned
    tree["checkpoint"] = {"every_steps": 2}
    monkeypatch.chdir(tmp_path)
    begun = run_to_the_end(as_recipe(tree), tmp_path / "run")
    assert_same_weights(begun.bundle, start)
    shutil.rmtree(tmp_path / "start")
    monkeypatch.chdir(tmp_path / "elsewhere")
    changes = ["training.steps=3", "cluster.workers=1"]
    recipe = load_settings(Recipe, load_resumed(tmp_path / "run"), changes)
    resumed = run_to_the_end(recipe, tmp_path / "run", resume=True)
    assert resumed.step == 3
    assert_same_weights(resumed.bundle, start)
    (resumed.checkpoint / "model").rename(tmp_path / "elsewhere/model")
    assert torch.equal(read_zero_weights(resumed.checkpoint).frequencies(), start.frequencies())


def test_a_checkpoint_of_an_earlier_version_has_its_frequencies_in_its_model(tmp_path):
    start = random_weights(family="esm2", layers=1, width=16, heads=2)
    start = replace(start, inv_freq=torch.rand(4))
    write_weights(tmp_path / "step-00000001/model", start)
    saved = SavedCheckpoint(Storage.of(tmp_path), "step-00000001", {})
    assert torch.equal(saved.frequencies(), start.frequencies())


def assert_same_weights(bundle, expected):
    found = read_weights(bundle)
    assert torch.equal(found.frequencies(), expected.frequencies())
    for name, tensor in expected.state.items():
        torch.testing.assert_close(found.state[name], tensor, rtol=0, atol=1e-20, msg=name)
