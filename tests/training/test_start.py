"""Starting from weights that others have trained."""

import pytest
import torch
from small_runs import as_recipe, make_recipe
from transformers import EsmConfig, EsmForMaskedLM

from raptide.errors import ConfigError
from raptide.model.bundle import read_weights
from raptide.training.engine import build_model
from raptide.training.trainer import prepare_run

SHAPE = {"layers": 2, "width": 64, "heads": 4}


def folder_of_transformers(folder, *, positions):
    """A model folder as transformers writes it."""
    EsmForMaskedLM(
        EsmConfig(
            vocab_size=33,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=130,
            position_embedding_type=positions,
            emb_layer_norm_before=positions == "absolute",
            layer_norm_eps=1e-5,
            token_dropout=True,
            mask_token_id=32,
            pad_token_id=1,
        )
    ).save_pretrained(folder)


@pytest.mark.parametrize(
    ("positions", "model"),
    [
        ("rotary", {"family": "esm2", **SHAPE}),
        ("absolute", {"family": "esm1b", "max_positions": 128, **SHAPE}),
    ],
)
def test_training_starts_from_the_weights_of_a_transformers_folder(
    corpus, tmp_path, positions, model
):
    folder = tmp_path / "published"
    folder_of_transformers(folder, positions=positions)
    recipe = as_recipe(make_recipe(corpus) | {"init_from": str(folder), "model": model})
    prepare_run(recipe, tmp_path / "run")
    weights = read_weights(folder)
    for name, parameter in build_model(recipe, fresh=True).named_parameters():
        assert torch.equal(parameter, weights.state[name]), name
    wrong = make_recipe(corpus) | {"init_from": str(folder), "model": model | {"layers": 3}}
    with pytest.raises(ConfigError, match=r"has model\.layers 2, but the recipe asks for 3"):
        prepare_run(as_recipe(wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()
