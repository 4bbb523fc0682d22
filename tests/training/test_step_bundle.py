"""A step's bundle: weights of that very step, of which rank 0 never holds more than a shard."""

import weakref
from pathlib import Path

import pytest
import torch
from draws import random_sequence
from safetensors import SafetensorError
from small_engines import SHAPES, recipe_of
from transformers import EsmForMaskedLM

from raptide.alphabet import encode_residues
from raptide.errors import BundleError
from raptide.model.check import CHECK, verify_check
from raptide.model.formats.detect import read_weights
from raptide.model.formats.tensor_files import SAFETENSORS, digest_weights
from raptide.training.checkpoints import step_bundle
from raptide.training.checkpoints.running_mean import RunningMean
from raptide.training.checkpoints.step_bundle import StepBundle, full_tensors
from raptide.training.engine import build_engine

SHAPES = SHAPES | {"lstm": {"family": "lstm", "layers": 2, "width": 64}}
SHARD = 40_000
"""Bytes: a dozen shards, and single tensors that are larger."""


def prepare(family, stage=0, precision="fp32"):
    recipe = recipe_of(stage, precision, model=SHAPES[family])
    engine = build_engine(recipe, 1, "cpu", None)
    frequencies = engine.module.frequencies()
    kept = None if frequencies is None else frequencies.tolist()
    manifest = {"step": 7, "cursor": {}, "inv_freq": kept}
    return recipe.training, engine, StepBundle(recipe, manifest, RunningMean(recipe, Path("none")))


@pytest.mark.parametrize(
    ("family", "stage", "precision"),
    [
        ("esm1", 0, "fp32"),
        ("esm1b", 2, "bf16"),
        ("esm2", 0, "fp32"),
        ("esm2", 1, "bf16"),
        ("esm2", 3, "bf16"),
        ("lstm", 0, "bf16"),
    ],
)
def test_shards_hold_the_step_they_were_taken_at(on_cpu, tmp_path, family, stage, precision):
    training, engine, bundle = prepare(family, stage, precision)
    expected = dict(full_tensors(engine, training))
    bundle.gather(engine, tmp_path, shard_bytes=SHARD)
    assert len(list(tmp_path.glob("*.partial"))) > 1, "nothing was written in between"
    for parameter in engine.module.parameters():
        parameter.data.zero_()  # as if training had gone on
    bundle.finish()
    found = read_weights(tmp_path)
    assert found.lineage == {"step": 7}
    assert found.state.keys() == expected.keys()
    assert all(torch.equal(found.state[name], expected[name]) for name in expected)
    assert verify_check(tmp_path, found.build())
    assert not (tmp_path / SAFETENSORS).exists()
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert [file.name[12:] for file in shards] == [f"of-{len(shards):05}.safetensors"] * len(shards)
    assert not list(tmp_path.glob("*.partial"))


def test_transformers_opens_shards_with_the_same_answers(on_cpu, tmp_path):
    _, engine, bundle = prepare("esm2")
    for folder, size in ((tmp_path / "shards", SHARD), (tmp_path / "whole", 1 << 30)):
        bundle.gather(engine, folder, shard_bytes=size)
        bundle.finish()
    assert digest_weights(tmp_path / "shards") != digest_weights(tmp_path / "whole")
    alphabet = engine.module.settings.alphabet
    tokens = torch.from_numpy(alphabet.add_specials(encode_residues(random_sequence(40)))).long()[
        None
    ]
    with torch.inference_mode():
        one, other = (
            EsmForMaskedLM.from_pretrained(tmp_path / kind).eval()(tokens).logits
            for kind in ("shards", "whole")
        )
    assert torch.equal(one, other)


def test_rank_zero_holds_no_more_than_a_shard(on_cpu, tmp_path, monkeypatch):
    _, engine, bundle = prepare("esm2", 3)
    alive, most, through = weakref.WeakSet(), [], step_bundle.full_tensors

    def noted(*args):
        for name, tensor in through(*args):
            alive.add(tensor)
            most.append(sum(each.nbytes for each in alive))
            yield name, tensor

    monkeypatch.setattr(step_bundle, "full_tensors", noted)
    bundle.gather(engine, tmp_path, shard_bytes=SHARD)
    largest = max(parameter.ds_numel * 4 for parameter in engine.module.parameters())
    everything = sum(parameter.ds_numel * 4 for parameter in engine.module.parameters())
    assert max(most) <= SHARD + 2 * largest < everything / 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("full")])
def test_a_full_scratch_is_told_once_all_ranks_are_through(on_cpu, tmp_path, monkeypatch, error):
    _, engine, bundle = prepare("esm2", 3)
    seen, through = [], step_bundle.full_tensors

    def noted(*args):
        for item in through(*args):
            seen.append(item[0])
            yield item

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(step_bundle, "full_tensors", noted)
    monkeypatch.setattr("raptide.model.formats.tensor_files.save_file", refuse)
    bundle.gather(engine, tmp_path, shard_bytes=SHARD)
    assert seen == [name for name, _ in engine.module.named_parameters()]
    with pytest.raises(type(error)) as told:
        bundle.finish()
    assert told.value is error


def test_a_bundle_that_answers_no_number_is_refused(on_cpu, tmp_path):
    _, engine, bundle = prepare("esm2")
    engine.module.embed.weight.data[5, 3] = float("nan")
    bundle.gather(engine, tmp_path, shard_bytes=SHARD)
    with pytest.raises(BundleError, match="no number"):
        bundle.finish()
    assert not (tmp_path / CHECK).exists()
