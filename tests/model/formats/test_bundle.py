import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, EsmForMaskedLM

from raptide.errors import BundleError
from raptide.model.config import ModelSettings
from raptide.model.contacts import ContactHead
from raptide.model.formats.bundle import BundleWriter
from raptide.model.formats.detect import read_weights, write_weights
from raptide.model.formats.weights import Weights, name_tensors
from raptide.model.packed import Packed
from raptide.model.transformer import Esm


def make(family="esm2", contacts=True, **shape):
    settings = ModelSettings(family=family, layers=2, width=32, heads=4, max_positions=64, **shape)
    head = ContactHead(torch.randn(1, 8), torch.randn(1)) if contacts else None
    state = Esm(settings).initialise(3).state_dict()
    return Weights(settings, state, contact_head=head, lineage={"step": 7})


@pytest.fixture
def bundle(tmp_path):
    write_weights(tmp_path / "m", make())
    return tmp_path / "m"


def assert_same(a, b):
    assert a.settings.traits == b.settings.traits
    assert a.state.keys() == b.state.keys()
    for name, tensor in a.state.items():
        assert torch.equal(b.state[name], tensor), name
    assert (a.contact_head is None) == (b.contact_head is None)
    if a.contact_head is not None:
        assert torch.equal(a.contact_head.weight, b.contact_head.weight)
        assert torch.equal(a.contact_head.bias, b.contact_head.bias)


@pytest.mark.parametrize("family", ["esm1", "esm1b", "esm2"])
@pytest.mark.parametrize("contacts", [True, False])
def test_a_bundle_reads_back_bit_for_bit(tmp_path, family, contacts):
    weights = make(family, contacts)
    write_weights(tmp_path, weights)
    again = read_weights(tmp_path)
    assert_same(weights, again)
    assert again.lineage == {"step": 7}
    write_weights(tmp_path / "copy", again)
    files = [
        (folder / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "copy")
    ]
    assert files[0] == files[1]


def test_esm1v_which_has_no_first_norm_reads_back(tmp_path):
    write_weights(tmp_path, make("esm1b", norm_before=False))
    again = read_weights(tmp_path)
    assert again.settings.norm_before is False
    assert not any("norm_before" in name for name in again.state)
    EsmForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["esm1b", "esm2"])
@torch.inference_mode()
def test_transformers_opens_a_bundle_and_agrees(tmp_path, family):
    weights = make(family)
    write_weights(tmp_path, weights)
    theirs, report = EsmForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.tensor([0, 5, 6, 32, 9, 2])
    ours = weights.build()
    expected = theirs.eval()(tokens[None]).logits[0]
    torch.testing.assert_close(ours(Packed(tokens, (6,))), expected, atol=1e-5, rtol=1e-4)
    encoded = AutoTokenizer.from_pretrained(tmp_path)("MKTX")["input_ids"]
    assert [weights.settings.alphabet.tokens[i] for i in encoded] == ["<cls>", *"MKTX", "<eos>"]


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
def test_torch_files_are_read_where_there_are_no_safetensors(bundle, shards):
    """As published before safetensors: pickled tensors, the norms spelled weight and bias."""
    expected = read_weights(bundle)
    tensors = load_file(bundle / "model.safetensors")
    (bundle / "model.safetensors").unlink()
    tensors["esm.embeddings.position_ids"] = torch.arange(66)[None]
    tensors["esm.embeddings.position_embeddings.weight"] = torch.zeros(66, 32)
    tensors["lm_head.decoder.weight"] = tensors["esm.embeddings.word_embeddings.weight"]
    if not shards:
        torch.save(tensors, bundle / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        places = {name: f"pytorch_model-{1 + i % 2}.bin" for i, name in enumerate(names)}
        for place in set(places.values()):
            torch.save({n: tensors[n] for n in names if places[n] == place}, bundle / place)
        index = json.dumps({"weight_map": places})
        (bundle / "pytorch_model.bin.index.json").write_text(index)
    assert_same(expected, read_weights(bundle))


def edit_weights(bundle, edit):
    tensors = load_file(bundle / "model.safetensors")
    edit(tensors)
    save_file(tensors, bundle / "model.safetensors")


NAME = "esm.encoder.layer.1.attention.self.query.weight"
CONTACTS = "esm.contact_head.regression"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NAME), f"lacks the tensor {NAME}"),
        (lambda t: t.update({NAME: torch.zeros(3, 3)}), rf"{NAME} has shape \(3, 3\)"),
        (lambda t: t.update(extra=torch.zeros(1)), "holds extra, which a model of its shape"),
        (lambda t: t.pop(f"{CONTACTS}.bias"), f"lacks the tensor {CONTACTS}.bias"),
        (lambda t: t.update({f"{CONTACTS}.weight": torch.zeros(1, 7)}), r"has shape \(1, 7\)"),
        (
            lambda t: t.update({"lm_head.decoder.weight": torch.ones(33, 32)}),
            "lm_head.decoder.weight differs from the embedding",
        ),
        (
            lambda t: t.update(
                {NAME.replace("query.weight", "rotary_embeddings.inv_freq"): torch.ones(9)}
            ),
            r"inv_freq has shape \(9,\)",
        ),
        (
            lambda t: t.update({n: torch.full_like(t[n], torch.nan) for n in t if "inv_freq" in n}),
            "inv_freq holds values that are no numbers",
        ),
        (
            lambda t: t.update({"esm.encoder.emb_layer_norm_after.gamma": torch.ones(32)}),
            "emb_layer_norm_after.weight twice",
        ),
    ],
)
def test_a_missing_unused_or_misshapen_tensor_is_named(bundle, edit, message):
    edit_weights(bundle, edit)
    with pytest.raises(BundleError, match=message):
        read_weights(bundle)


def test_other_folders_are_refused(bundle, tmp_path):
    with pytest.raises(BundleError, match=r"holds no config.json"):
        read_weights(tmp_path)
    with pytest.raises(BundleError, match="does not exist"):
        read_weights(tmp_path / "gone.pt")
    (bundle / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(BundleError, match="damaged"):
        read_weights(bundle)
    (bundle / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"no model.safetensors \(nor its index"):
        read_weights(bundle)
    (bundle / "vocab.txt").write_text("<cls>\n<pad>\nA\n")
    with pytest.raises(BundleError, match="not the 33-token alphabet"):
        read_weights(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "a model of another architecture"),
        ({"token_dropout": False}, "token dropout"),
        ({"rope_theta": 1e6}, "rope_theta is 1000000"),
        ({"emb_layer_norm_before": True}, "this mixture is not supported"),
        ({"num_attention_heads": 5}, "must be an even multiple of heads"),
        ({"hidden_size": None}, "describes no model"),
    ],
)
def test_a_config_of_another_model_is_refused(bundle, change, message):
    config = json.loads((bundle / "config.json").read_text()) | change
    (bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=message) as caught:
        read_weights(bundle)
    assert "\n" not in str(caught.value)


def test_a_config_without_a_field_says_which(bundle):
    config = json.loads((bundle / "config.json").read_text())
    del config["hidden_size"]
    (bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match="lacks the field 'hidden_size'"):
        read_weights(bundle)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (lambda names: dict.fromkeys(names, "model-9.safetensors"), "names the shard model-9"),
        (lambda names: dict.fromkeys(names, "../m/part.safetensors"), "not beside it"),
        (lambda names: dict.fromkeys(names[1:], "part.safetensors"), "disagree about the tensor"),
        (lambda names: 3, "no index of shards"),
    ],
)
def test_an_index_that_contradicts_its_shards_is_refused(bundle, places, message):
    names = sorted(load_file(bundle / "model.safetensors"))
    (bundle / "model.safetensors").rename(bundle / "part.safetensors")
    index = json.dumps({"weight_map": places(names)})
    (bundle / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BundleError, match=message):
        read_weights(bundle)


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_nothing_but_tensors_is_unpickled(bundle, tmp_path, capsys):
    (bundle / "model.safetensors").unlink()
    torch.save({"x": Evil()}, bundle / "pytorch_model.bin")
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    for path in (bundle, tmp_path / "evil.pt"):
        with pytest.raises(BundleError, match="more than tensors and plain values"):
            read_weights(path)
    assert not re.search("must never run", capsys.readouterr().out)


def test_shards_take_the_place_of_one_file_and_one_file_that_of_shards(tmp_path):
    """The folder of a model that was larger, or smaller, holds nothing of it any more."""
    small = make()
    large = replace(small, state=Esm(small.settings).initialise(4).state_dict())
    for weights, size in ((small, 1 << 30), (large, 9_000), (small, 20_000), (large, 1 << 30)):
        writer = BundleWriter(tmp_path, weights.settings, size)
        for item in name_tensors(weights, "hugging_face").tensors.items():
            writer.add(*item)
        writer.close({})
        assert_same(weights, read_weights(tmp_path))
        kinds = {file.name.partition("-of-")[2] for file in tmp_path.glob("model*.safetensors")}
        assert len(kinds) == 1, kinds
