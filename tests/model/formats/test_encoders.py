"""Models of transformers that have no language-model head: encoders and classifiers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from draws import random_sequence
from safetensors.torch import load_file, save_file
from transformers import (
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    EsmModel,
)
from transformers_shapes import esm_config

from raptide.alphabet import ESM_33, encode_residues
from raptide.errors import BundleError
from raptide.inference.engine import Engine
from raptide.model.check import CHECK, verify_check
from raptide.model.formats.detect import read_weights, write_weights

BOTH = pytest.mark.parametrize("rotary", [True, False], ids=["esm2", "esm1b"])


def random_model(kind, rotary=True):
    shape = {"layers": 2, "width": 32, "positions": 128}
    options = {"attn_implementation": "eager", "num_labels": 3}  # its contacts need eager attention
    model = kind(esm_config(rotary=rotary, **shape, **options)).eval()
    for name, parameter in model.named_parameters():
        std = 20 if name.endswith("regression.weight") else 0.2
        torch.nn.init.normal_(parameter, std=std)
        if "layer_norm" in name.lower() or "LayerNorm" in name:
            parameter.data += 1
    return model


def save_raw(model, folder, prefix=""):
    """As a training loop would: the state dict, and the configuration beside it."""
    model.config.save_pretrained(folder)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")


WRITERS = {
    "EsmModel": (EsmModel, lambda m, f: m.save_pretrained(f)),
    "no pooler": (
        lambda c: EsmModel(c, add_pooling_layer=False),
        lambda m, f: m.save_pretrained(f),
    ),
    "sequences": (EsmForSequenceClassification, lambda m, f: m.save_pretrained(f)),
    "tokens": (EsmForTokenClassification, lambda m, f: m.save_pretrained(f)),
    "shards": (
        EsmForSequenceClassification,
        lambda m, f: m.save_pretrained(f, max_shard_size="20KB"),
    ),
    "bin": (EsmModel, save_raw),
    "wrapped encoder": (EsmModel, lambda m, f: save_raw(m, f, "backbone.")),
    "wrapped classifier": (EsmForTokenClassification, lambda m, f: save_raw(m, f, "model.")),
}


@BOTH
@pytest.mark.parametrize("writer", WRITERS)
@torch.inference_mode()
def test_embeddings_and_contacts_are_those_of_transformers(writer, rotary, tmp_path):
    kind, save = WRITERS[writer]
    theirs = random_model(kind, rotary)
    save(theirs, tmp_path)
    engine = Engine.load(tmp_path, device="cpu", dtype="fp32")
    assert not verify_check(tmp_path, engine.model), "strangers' models have no record"
    encoder = getattr(theirs, "esm", theirs)
    for length in (1, 40, 90):
        sequence = random_sequence(length)
        tokens = torch.from_numpy(ESM_33.add_specials(encode_residues(sequence)).astype(int))[None]
        hidden = encoder(tokens).last_hidden_state[0].numpy()
        (residue,) = engine.embed([sequence], pooling="residue")
        np.testing.assert_allclose(residue, hidden[1:-1], atol=1e-4)
        contacts = encoder.predict_contacts(tokens, torch.ones_like(tokens))[0].numpy()
        np.testing.assert_allclose(engine.contacts([sequence])[0], contacts, atol=1e-4)
    assert contacts.std() > 0.05, "too flat to show a difference"


@BOTH
def test_it_comes_back_bit_for_bit_and_transformers_opens_it(rotary, tmp_path):
    theirs = random_model(EsmForSequenceClassification, rotary)
    theirs.save_pretrained(tmp_path / "theirs")
    weights = read_weights(tmp_path / "theirs")
    assert not weights.has_head
    assert weights.left_out == (
        "classifier.dense.bias",
        "classifier.dense.weight",
        "classifier.out_proj.bias",
        "classifier.out_proj.weight",
    )
    write_weights(tmp_path / "ours", weights)
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == ["EsmModel"]
    assert verify_check(tmp_path / "ours", read_weights(tmp_path / "ours").build())
    again, report = EsmModel.from_pretrained(
        tmp_path / "ours", add_pooling_layer=False, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in theirs.esm.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_head_is_whole_or_not_there_at_all(tmp_path):
    random_model(EsmForMaskedLM).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.dense.weight"]
    save_file(tensors, file)
    with pytest.raises(BundleError, match=r"lacks the tensor lm_head\.dense\.weight"):
        read_weights(tmp_path)
    save_file({n: t for n, t in tensors.items() if not n.startswith("lm_head.")}, file)
    assert not read_weights(tmp_path).has_head


def test_a_record_notices_that_the_head_was_lost(tmp_path):
    random_model(EsmForMaskedLM).save_pretrained(tmp_path / "theirs")
    weights = read_weights(tmp_path / "theirs")
    body = {name: t for name, t in weights.state.items() if not name.startswith("head_")}
    write_weights(tmp_path / "whole", weights)
    write_weights(tmp_path / "body", replace(weights, state=body))
    models = {name: read_weights(tmp_path / name).build() for name in ("whole", "body")}
    with pytest.raises(BundleError, match=r"belongs to a model with a language-model head"):
        verify_check(tmp_path / "whole", models["body"])
    with pytest.raises(BundleError, match=r"belongs to a model without a language-model head"):
        verify_check(tmp_path / "body", models["whole"])
    record = json.loads((tmp_path / "body" / CHECK).read_text())
    assert record["log_likelihood"] is None


def test_fair_esm_gets_no_file_that_it_cannot_open(tmp_path):
    random_model(EsmModel).save_pretrained(tmp_path / "m")
    with pytest.raises(BundleError, match="without which fair-esm opens no model; write a folder"):
        write_weights(tmp_path / "esm2_x.pt", read_weights(tmp_path / "m"))
    assert not (tmp_path / "esm2_x.pt").exists()
