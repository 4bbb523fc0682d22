"""Files in fair-esm's own layout, against fair-esm's own loader and models."""

import warnings
from dataclasses import replace

import esm
import pytest
import torch
from draws import pack, pad, random_tokens
from published import NAMES, random_model, save_as_published

from raptide.errors import BundleError
from raptide.model.contacts import corrected_maps
from raptide.model.formats.detect import read_weights, write_weights
from raptide.model.formats.fair_esm import regression_file

KINDS = sorted(NAMES)


def load_with_fair_esm(file):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # fair-esm calls torch.load as before PyTorch 2.6.
        load = torch.load
        patch.setattr(torch, "load", lambda *a, **k: load(*a, **k | {"weights_only": False}))
        model, _ = esm.pretrained.load_model_and_alphabet_local(file)
    return model.eval()


@pytest.fixture(params=KINDS)
def published(request, tmp_path):
    """(file, its model as fair-esm loads it)."""
    file = save_as_published(random_model(request.param), request.param, tmp_path)
    return file, load_with_fair_esm(file)


def close(mine, theirs):
    assert (mine - theirs).abs().max() < 1e-4 * max(1.0, theirs.abs().max().item())


@torch.inference_mode()
def test_logits_layers_and_contacts_equal_fair_esm(published):
    file, theirs = published
    weights = read_weights(file)
    ours = weights.build()
    alphabet = ours.settings.alphabet
    pieces = random_tokens(alphabet)
    everything = range(ours.settings.layers + 1)
    expected = theirs(pad(pieces), repr_layers=list(everything), return_contacts=True)
    packed = pack(pieces)
    logits = ours(packed).split(packed.lengths)
    layers = ours.represent(packed, everything)
    assert expected["logits"].std() > 0.5, "too flat to show a difference"
    for i, piece in enumerate(pieces):
        close(logits[i], expected["logits"][i, : len(piece)])
        for layer in everything:
            mine = layers[layer].split(packed.lengths)[i]
            close(mine, expected["representations"][layer][i, : len(piece)])
        if weights.contact_head is not None:
            maps = corrected_maps(ours.attention_maps(pack([piece])), alphabet.append_eos)
            mine = weights.contact_head.probabilities(maps)
            reference = expected["contacts"][i, : len(mine), : len(mine)]
            assert (mine - reference).abs().max() < 1e-4
            assert len(mine) < 10 or reference.std() > 0.05, "too flat to show a difference"


def test_the_contact_head_is_optional(published):
    file, _ = published
    assert (read_weights(file).contact_head is None) == ("esm1v" in file.name)
    regression_file(file).unlink(missing_ok=True)
    assert read_weights(file).contact_head is None


def test_a_round_trip_is_exact_and_fair_esm_opens_it(published, tmp_path):
    """fair-esm -> bundle -> fair-esm: the loaded models hold the same bits."""
    file, theirs = published
    assert read_weights(file).lineage == {}
    write_weights(tmp_path / "bundle", replace(read_weights(file), lineage={"step": 7}))
    (tmp_path / "back").mkdir()
    write_weights(tmp_path / "back" / file.name, read_weights(tmp_path / "bundle"))
    assert read_weights(tmp_path / "back" / file.name).lineage == {"step": 7}
    again = load_with_fair_esm(tmp_path / "back" / file.name)
    expected = theirs.state_dict()
    if "esm1v" in file.name:  # fair-esm draws it, there being none
        expected = {n: t for n, t in expected.items() if not n.startswith("contact_head")}
    expected.pop("embed_positions._float_tensor", None)  # not initialised, not used
    for name, tensor in expected.items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_files_from_before_zip_archives_are_read(tmp_path):
    model = random_model("esm1")
    file = save_as_published(model, "esm1", tmp_path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(file).state["embed.weight"], model.embed_tokens.weight)


def test_esm1_without_an_output_bias_is_read_as_one_of_zeros(tmp_path):
    file = save_as_published(random_model("esm1"), "esm1", tmp_path)
    content = torch.load(file, weights_only=False)
    del content["model"]["decoder.embed_out_bias"]
    torch.save(content, file)
    assert not read_weights(file).state["head_bias"].any()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.pop("encoder.lm_head.bias"), "lacks the tensor lm_head.bias"),
        (lambda m: m.pop("encoder.sentence_encoder.layers.0.fc1.weight"), "lacks 'layers.0.fc1"),
        (lambda m: m.update(extra=torch.ones(1)), "holds extra"),
        (
            lambda m: m.update({"encoder.lm_head.weight": torch.ones(33, 48)}),
            "lm_head.weight differs from the embedding",
        ),
        (
            lambda m: m.update(
                {"encoder.sentence_encoder.layers.1.self_attn.rot_emb.inv_freq": torch.ones(6)}
            ),
            "inv_freq differs",
        ),
    ],
)
def test_a_misfit_tensor_is_named(tmp_path, edit, message):
    file = save_as_published(random_model("esm2"), "esm2", tmp_path)
    content = torch.load(file, weights_only=False)
    edit(content["model"])
    torch.save(content, file)
    with pytest.raises(BundleError, match=message):
        read_weights(file)


def test_other_models_of_fair_esm_are_refused(tmp_path):
    file = save_as_published(random_model("esm1b"), "esm1b", tmp_path)
    content = torch.load(file, weights_only=False)
    content["args"].arch = "msa_transformer"
    torch.save(content, file)
    with pytest.raises(BundleError, match="arch 'msa_transformer'"):
        read_weights(file)
    torch.save({"weights": 1}, file)
    with pytest.raises(BundleError, match="no table `model`"):
        read_weights(file)
    file.write_bytes(b"PK nothing")
    with pytest.raises(BundleError, match="is damaged"):
        read_weights(file)


def test_a_name_that_fair_esm_would_misread_is_refused(tmp_path):
    file = save_as_published(random_model("esm1b"), "esm1b", tmp_path)
    with pytest.raises(BundleError, match="names that start with esm2"):
        write_weights(tmp_path / "esm2_copy.pt", read_weights(file))
