"""Starting from weights that others have trained."""

import pytest
import torch
from small_runs import as_recipe, make_recipe
from transformers import EsmForMaskedLM, EsmModel
from transformers_shapes import esm_config

from raptide.errors import BundleError, ConfigError
from raptide.model.formats.detect import read_weights
from raptide.training.engine import build_model
from raptide.training.trainer import prepare_run

SHAPE = {"layers": 2, "width": 64, "heads": 4}


@pytest.mark.parametrize(
    ("rotary", "model"),
    [
        (True, {"family": "esm2", **SHAPE}),
        (False, {"family": "esm1b", "max_positions": 128, **SHAPE}),
    ],
)
def test_training_starts_from_the_weights_of_a_transformers_folder(corpus, tmp_path, rotary, model):
    folder = tmp_path / "published"
    config = esm_config(rotary=rotary, layers=2, width=64, positions=128)
    EsmForMaskedLM(config).save_pretrained(folder)
    recipe = as_recipe(make_recipe(corpus) | {"init_from": str(folder), "model": model})
    prepare_run(recipe, tmp_path / "run")
    weights = read_weights(folder)
    for name, parameter in build_model(recipe, fresh=True).named_parameters():
        assert torch.equal(parameter, weights.state[name]), name
    wrong = make_recipe(corpus) | {"init_from": str(folder), "model": model | {"layers": 3}}
    with pytest.raises(ConfigError, match=r"has model\.layers 2, but the recipe asks for 3"):
        prepare_run(as_recipe(wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_starts_from_no_model_without_a_language_model_head(corpus, tmp_path):
    folder = tmp_path / "encoder"
    EsmModel(esm_config(rotary=True, layers=2, width=64, positions=128)).save_pretrained(folder)
    recipe = make_recipe(corpus) | {"init_from": str(folder), "model": {"family": "esm2", **SHAPE}}
    with pytest.raises(BundleError, match="no language-model head, which training needs; start"):
        prepare_run(as_recipe(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()
