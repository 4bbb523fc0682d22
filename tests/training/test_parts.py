"""ZeRO 3: the same model as anywhere else, of which no rank ever holds the whole."""

import deepspeed
import pytest
import torch
from draws import random_weights
from small_engines import SHAPES, recipe_of

from raptide.model.families import make_model
from raptide.model.formats.detect import write_weights
from raptide.training.checkpoints.step_bundle import full_tensors
from raptide.training.engine import build_engine


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", SHAPES)
def test_fresh_weights_are_those_of_other_stages(on_cpu, family, precision):
    recipe = recipe_of(3, precision, model=SHAPES[family])
    engine = build_engine(recipe, 1, "cpu", None)
    expected = make_model(recipe.model).initialise(recipe.training.seed)
    found = dict(full_tensors(engine, recipe.training))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert found.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert torch.equal(found[name], parameter.detach().to(dtype).float()), name
    if recipe.model.rotary:
        assert torch.equal(engine.module.frequencies(), expected.frequencies())


def test_it_starts_from_weights(on_cpu, tmp_path):
    weights = random_weights(**SHAPES["esm2"])
    write_weights(tmp_path / "model", weights)
    recipe = recipe_of(3, model=SHAPES["esm2"], init_from=str(tmp_path / "model"))
    engine = build_engine(recipe, 1, "cpu", None)
    for name, tensor in dict(full_tensors(engine, recipe.training)).items():
        assert torch.equal(tensor, weights.state[name].float()), name
    assert torch.equal(engine.module.frequencies(), weights.frequencies())


def test_no_more_than_a_layer_is_whole_at_once(on_cpu, monkeypatch):
    recipe, most = recipe_of(3, model=SHAPES["esm2"]), []
    cut_up = deepspeed.zero.Init
    whole = set()

    def noted(module, **settings):
        for each in module.parameters():
            assert each.device.type != "meta"
            whole.add(id(each))
        most.append(sum(each.numel() for each in module.parameters() if not hasattr(each, "ds_id")))
        return cut_up(module=module, **settings)

    monkeypatch.setattr(deepspeed.zero, "Init", noted)
    engine = build_engine(recipe, 1, "cpu", None)
    model = make_model(recipe.model)
    layer = sum(each.numel() for each in model.layers[0].parameters())
    assert max(most) == layer
    assert sum(most) == sum(each.numel() for each in model.parameters())
    assert len(whole) == len(list(engine.module.parameters()))
