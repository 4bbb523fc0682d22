import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EsmForMaskedLM

from raptide.errors import BundleError
from raptide.model.bundle import load_bundle, save_bundle
from raptide.model.config import ModelSettings
from raptide.model.packed import Packed
from raptide.model.transformer import Esm


def make(family="esm2"):
    settings = ModelSettings(family=family, layers=2, width=32, heads=4, max_positions=64)
    return Esm(settings).initialise(3).eval()


@pytest.fixture
def bundle(tmp_path):
    model = make()
    save_bundle(tmp_path / "m", model.settings, model.state_dict(), {"step": 7})
    return tmp_path / "m"


@pytest.mark.parametrize("family", ["esm1", "esm1b", "esm2"])
def test_a_bundle_reads_back_bit_for_bit(tmp_path, family):
    model = make(family)
    save_bundle(tmp_path, model.settings, model.state_dict(), {"step": 7})
    again, lineage = load_bundle(tmp_path)
    assert again.settings.model_dump(exclude={"ffn", "norm_eps"}) == model.settings.model_dump(
        exclude={"ffn", "norm_eps"}
    )
    assert lineage == {"step": 7}
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", ["esm1b", "esm2"])
@torch.inference_mode()
def test_transformers_opens_a_bundle_and_agrees(tmp_path, family):
    model = make(family)
    save_bundle(tmp_path, model.settings, model.state_dict(), {})
    theirs, report = EsmForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    missing = {name for name in report["missing_keys"] if "contact_head" not in name}
    assert missing <= {"esm.rotary_embeddings.inv_freq"}  # computed, not stored
    assert not report["unexpected_keys"]
    tokens = torch.tensor([0, 5, 6, 32, 9, 2])
    expected = theirs.eval()(tokens[None]).logits[0]
    torch.testing.assert_close(model(Packed(tokens, (6,))), expected, atol=1e-5, rtol=1e-4)


def edit_weights(bundle, edit):
    tensors = load_file(bundle / "model.safetensors")
    edit(tensors)
    save_file(tensors, bundle / "model.safetensors")


NAME = "esm.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NAME), f"lacks the tensor {NAME}"),
        (lambda t: t.update({NAME: torch.zeros(3, 3)}), rf"{NAME} has shape \(3, 3\)"),
        (lambda t: t.update(extra=torch.zeros(1)), "holds extra, which config.json has no use for"),
    ],
)
def test_a_missing_unused_or_misshapen_tensor_is_named(bundle, edit, message):
    edit_weights(bundle, edit)
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle)


def test_other_folders_are_refused(bundle, tmp_path):
    with pytest.raises(BundleError, match=r"holds no config.json"):
        load_bundle(tmp_path)
    (bundle / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(BundleError, match="damaged"):
        load_bundle(bundle)
    (bundle / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(BundleError, match="no ESM masked language model"):
        load_bundle(bundle)
