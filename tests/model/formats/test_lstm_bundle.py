"""Bundles of the LSTM: a model type of their own, and no other format's."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from raptide.errors import BundleError
from raptide.model.check import CHECK, verify_check
from raptide.model.families import make_model
from raptide.model.formats.detect import read_weights, write_weights
from raptide.model.formats.weights import Weights
from raptide.model.lstm.config import LstmSettings
from raptide.model.lstm.network import Lstm


@pytest.fixture
def model():
    return make_model(LstmSettings(layers=2, width=32)).initialise(3).eval()


@pytest.fixture
def bundle(model, tmp_path):
    write_weights(tmp_path / "bundle", Weights.of(model))
    return tmp_path / "bundle"


def test_a_bundle_comes_back_bit_for_bit_and_answers_as_its_record_says(model, bundle):
    config = json.loads((bundle / "config.json").read_text())
    assert config["model_type"] == "raptide-lstm"
    again = read_weights(bundle).build()
    assert isinstance(again, Lstm)
    assert again.settings == model.settings
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert verify_check(bundle, again)
    assert verify_check(bundle, again.to(torch.bfloat16))


def test_another_models_weights_are_caught_by_the_record(bundle):
    other = make_model(LstmSettings(layers=2, width=32)).initialise(4)
    save_file(dict(other.state_dict()), bundle / "model.safetensors")
    with pytest.raises(BundleError, match=f"otherwise than its record in {CHECK}"):
        verify_check(bundle, read_weights(bundle).build())


def test_fair_esm_is_not_given_one(model, tmp_path):
    with pytest.raises(BundleError, match="fair-esm knows the ESM families alone"):
        write_weights(tmp_path / "lstm.pt", Weights.of(model))
    assert not (tmp_path / "lstm.pt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.back.weight_hh_l0"), "lacks the tensor layers.1.back"),
        (lambda t: t.update({"layers.2.x": torch.zeros(1)}), "layers.2.x, which a model of its"),
        (
            lambda t: t.update({"contact_head.regression.weight": torch.zeros(1, 2)}),
            "contact_head.regression.weight, which a model of its",
        ),
        (lambda t: t.update({"head_bias": torch.zeros(3)}), r"head_bias has shape \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(bundle, change, message):
    tensors = load_file(bundle / "model.safetensors")
    change(tensors)
    save_file(tensors, bundle / "model.safetensors")
    with pytest.raises(BundleError, match=message):
        read_weights(bundle)


def test_a_configuration_that_is_none_is_one_sentence(bundle):
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps(config | {"width": 33}))
    with pytest.raises(BundleError, match="describes no model") as caught:
        read_weights(bundle)
    assert "\n" not in str(caught.value)
    (bundle / "config.json").write_text(json.dumps(config | {"model_type": "raptide-gru"}))
    with pytest.raises(BundleError, match="a model of another architecture"):
        read_weights(bundle)
