"""What people give for a model and is none: one sentence says what it is, and the way on."""

import json

import esm
import pytest
import torch
from published import random_model, save_as_published
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, EsmForMaskedLM, EsmModel
from transformers_shapes import esm_config

from raptide.errors import BundleError
from raptide.model.formats.detect import read_weights
from raptide.training.checkpoints.checkpoint import find_bundle

CONFIG = esm_config(rotary=True, layers=2, width=32, positions=64)
STATE = {name: tensor.clone() for name, tensor in EsmForMaskedLM(CONFIG).state_dict().items()}
del STATE["lm_head.decoder.weight"]
LIGHTNING = {
    "pytorch-lightning_version": "2.1.0",
    "state_dict": {f"model.{name}": tensor for name, tensor in STATE.items()},
    "hyper_parameters": {"lr": 1e-3},
}


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def adapter(path):
    path.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "facebook/esm2_t6_8M_UR50D", "r": 8}
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"base_model.model.esm.encoder.layer.0.attention.self.query.lora_A.weight": 1}
    save_file({name: torch.ones(8, 32) for name in tensors}, path / "adapter_model.safetensors")


def configured(path, **config):
    CONFIG.save_pretrained(path)
    kept = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(kept | config))


def files(*names, config=False):
    def make(path):
        if config:
            configured(path)
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(b"anything")

    return make


def folding(path):
    configured(path, architectures=["EsmForProteinFolding"])
    save_file(STATE | {"trunk.x": torch.ones(1)}, path / "model.safetensors")


def without_config(path):
    path.mkdir()
    save_file(STATE, path / "model.safetensors")


def saved(content):
    return lambda path: torch.save(content, path)


ESM_STATE = "a state dict of 43 tensors such as esm.contact_head.*, of 2 layers and width 32, "
HEADS = "without the configuration that says how many heads they have; "
BESIDE = "save its state dict as model.safetensors or pytorch_model.bin beside the config.json"

STRANGERS = {
    "lora": (adapter, "is a LoRA adapter of facebook/esm2_t6_8M_UR50D .*; merge it with peft"),
    "state.safetensors": (lambda path: save_file(STATE, path), ESM_STATE + HEADS + BESIDE),
    "state.pt": (saved(STATE), ESM_STATE + HEADS + BESIDE),
    "state.bin": (saved(STATE), ESM_STATE + HEADS + BESIDE),
    "fair.pt": (
        lambda path: torch.save(esm.ESM2(2, 32, 4).state_dict(), path),
        "width 32, without the configuration .*; put it in place of the table `model` in the fair",
    ),
    "other.pt": (saved({"x": torch.ones(1)}), "a state dict of 1 tensors such as x, without a con"),
    "lora.safetensors": (
        lambda path: save_file({"x.lora_A.weight": torch.ones(1)}, path),
        "a LoRA adapter; merge it into its base model",
    ),
    "lightning.ckpt": (
        saved(LIGHTNING),
        "a Lightning checkpoint, whose `state_dict` is .*width 32",
    ),
    "evil.ckpt": (
        saved(LIGHTNING | {"hyper_parameters": Evil()}),
        "a Lightning checkpoint that holds more than tensors and plain values; open it where",
    ),
    "loop.pt": (
        saved({"model_state_dict": STATE, "epoch": 3}),
        "a training checkpoint, whose `model_state_dict` is a state dict of 43 tensors",
    ),
    "loop2.pt": (saved({"model": STATE, "epoch": 3}), "a training checkpoint, whose `model` is"),
    "optimizer.pt": (
        lambda path: torch.save(torch.optim.Adam([torch.ones(1)]).state_dict(), path),
        "the state of an optimizer, which holds no model",
    ),
    "deepspeed": (
        files("latest", "global_step5/mp_rank_00_model_states.pt"),
        "a checkpoint of DeepSpeed; gather it with its zero_to_fp32.py, save its state dict",
    ),
    "fsdp": (files(".metadata", "__0_0.distcp"), r"a sharded checkpoint of torch.distributed \(FS"),
    "tf": (
        files("tf_model.h5", config=True),
        r"a model for TensorFlow alone \(tf_model.h5\); name",
    ),
    "saved_model": (files("saved_model.pb"), "a model for TensorFlow; name a folder"),
    "flax": (files("flax_model.msgpack", config=True), "a model for Flax alone"),
    "onnx": (files("model.onnx", config=True), "a model for ONNX alone"),
    "gguf": (files("esm2-q8.gguf"), r"a model for llama.cpp \(GGUF\) alone"),
    "x.onnx": (lambda path: path.write_bytes(b"x"), "is a model for ONNX; name a folder"),
    "x.fasta": (lambda path: path.write_text(">a\nMK\n"), "is no model; name a model folder"),
    "bert": (
        lambda path: BertForMaskedLM(
            BertConfig(
                vocab_size=30,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=64,
            )
        ).save_pretrained(path),
        r"of another architecture \(bert, BertForMaskedLM\); name an ESM-1, ESM-1b, ESM-1v or ESM",
    ),
    "prott5": (
        lambda path: configured(path, model_type="t5", architectures=["T5EncoderModel"]),
        r"another architecture \(t5, T5EncoderModel\)",
    ),
    "esmc": (files("data/weights/esmc_300m_2024_12_v0.pth"), "an ESM-3 or ESM-C model"),
    "esmfold": (folding, "is ESMFold, which predicts structures; name the language model in it"),
    "no-config": (
        without_config,
        r"with tensors \(model.safetensors\) but without the config.json",
    ),
    "empty": (lambda path: path.mkdir(), "holds no config.json|no model folder, no checkpoint"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_told_in_one_sentence(name, tmp_path, capsys):
    make, message = STRANGERS[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(BundleError, match=message) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match=message):  # the jobs' and the endpoint's way
        read_weights(find_bundle(path))
    assert "never run" not in capsys.readouterr().out


def test_a_file_of_a_model_folder_and_a_checkpoint_are_told_where_the_model_is(tmp_path):
    EsmModel(CONFIG).save_pretrained(tmp_path / "step/model")
    with pytest.raises(BundleError, match=r"one file of a model folder; name the folder, .*/model"):
        read_weights(tmp_path / "step/model/model.safetensors")
    with pytest.raises(BundleError, match=r"is a checkpoint; name the model in it, .*/step/model"):
        read_weights(tmp_path / "step")


def test_what_the_sentences_advise_opens(tmp_path):
    """Lightning's state dict beside the configuration; fair-esm's in its file."""
    CONFIG.save_pretrained(tmp_path / "m")
    torch.save(LIGHTNING["state_dict"], tmp_path / "m/pytorch_model.bin")
    state = read_weights(tmp_path / "m").state
    assert torch.equal(state["head_bias"], STATE["lm_head.bias"])
    trained = random_model("esm2")
    file = save_as_published(random_model("esm2"), "esm2", tmp_path)
    content = torch.load(file, weights_only=False) | {"model": trained.state_dict()}
    torch.save(content, tmp_path / "esm2_mine.pt")
    weights = read_weights(tmp_path / "esm2_mine.pt")
    assert torch.equal(weights.state["embed.weight"], trained.embed_tokens.weight)
    assert weights.contact_head is not None
