from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from raptide.errors import BundleError
from raptide.model.check import CHECK, verify_check
from raptide.model.config import ModelSettings
from raptide.model.formats.detect import read_weights, write_weights
from raptide.model.formats.tensor_files import digest_weights
from raptide.model.formats.weights import Weights
from raptide.model.transformer import Esm


def write(folder, seed=1, family="esm2"):
    model = Esm(ModelSettings(family=family, layers=2, width=32, heads=4)).initialise(seed)
    write_weights(folder, Weights.of(model))
    return folder


@pytest.mark.parametrize("family", ["esm1", "esm1b", "esm2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bundle_answers_as_its_record_says(tmp_path, family, dtype):
    model = read_weights(write(tmp_path, family=family)).build().to(dtype)
    assert verify_check(tmp_path, model)


def test_a_bundle_in_bf16_answers_as_its_record_says(tmp_path):
    model = Esm(ModelSettings(layers=2, width=32, heads=4)).initialise(1).to(torch.bfloat16)
    write_weights(tmp_path, Weights.of(model))
    assert verify_check(tmp_path, read_weights(tmp_path).build())


def test_weights_of_another_model_are_refused(tmp_path):
    model = read_weights(write(tmp_path / "a", seed=1)).build()
    write(tmp_path / "b", seed=2)
    with pytest.raises(BundleError, match=r"otherwise than its record in check\.json"):
        verify_check(tmp_path / "b", model)


def test_one_damaged_tensor_is_noticed(tmp_path):
    file = write(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("attention.self.value.weight"))
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BundleError, match="otherwise"):
        verify_check(tmp_path, read_weights(tmp_path).build())


def test_strangers_folders_must_answer_with_numbers(tmp_path):
    (write(tmp_path) / CHECK).unlink()
    model = read_weights(tmp_path).build()
    assert not verify_check(tmp_path, model)
    weights = read_weights(tmp_path)
    bad = {name: tensor * np.nan for name, tensor in weights.state.items()}
    with pytest.raises(BundleError, match="no number"):
        verify_check(tmp_path, replace(weights, state=bad).build())


def test_a_model_that_answers_with_no_number_is_not_written(tmp_path):
    weights = read_weights(write(tmp_path / "good"))
    bad = replace(weights, state={name: each * np.nan for name, each in weights.state.items()})
    with pytest.raises(BundleError, match="something that is no number, so it is not written"):
        write_weights(tmp_path / "bad", bad)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    with pytest.raises(BundleError, match="so it is not written"):
        write_weights(tmp_path, bad)
    assert (tmp_path / "good").exists(), "it was there before"


def test_a_damaged_record_is_named(tmp_path):
    model = read_weights(write(tmp_path)).build()
    for text in ("{", "[]", "{}"):
        (tmp_path / CHECK).write_text(text)
        with pytest.raises(BundleError, match=r"check\.json"):
            verify_check(tmp_path, model)


def test_the_digest_is_that_of_the_weights_alone(tmp_path):
    first, again = write(tmp_path / "a"), write(tmp_path / "again")
    (again / "raptide.json").write_text('{"step": 9}\n')
    assert digest_weights(first) == digest_weights(again)
    assert digest_weights(first) != digest_weights(write(tmp_path / "b", seed=2))
    assert len(digest_weights(first / "model.safetensors")) == 64
    with pytest.raises(BundleError, match="holds no weights"):
        digest_weights(tmp_path)
