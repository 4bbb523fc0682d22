"""jobs/export_model.py as a user runs it."""

import itertools
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from in_process import job_in_process
from safetensors.torch import load_file
from small_runs import checkpoint_of
from transformers import EsmForMaskedLM, EsmForTokenClassification
from transformers_shapes import esm_config

from raptide.inference.engine import Engine
from raptide.model.formats.detect import read_weights


def export(*arguments):
    return job_in_process("export_model.py", *arguments, cwd=".")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder that transformers wrote."""
    folder = tmp_path_factory.mktemp("transformers") / "esm1b"
    config = esm_config(rotary=False, layers=2, width=32, positions=128, intermediate_size=64)
    EsmForMaskedLM(config).save_pretrained(folder)
    return folder


def test_a_folder_of_transformers_to_a_bundle_to_fair_esm_and_back_bit_for_bit(theirs, tmp_path):
    steps = [theirs, tmp_path / "bundle", tmp_path / "esm1b_copy.pt", tmp_path / "deep/back"]
    for source, target in itertools.pairwise(steps):
        done = export(source, target)
        assert done.returncode == 0, done.stderr
        assert f"{source} -> {target}" in done.stdout
        assert "with contact head" in done.stdout
        opens = "load_model_and_alphabet_local" if target.suffix == ".pt" else "raptide.Engine.load"
        assert opens in done.stdout
    assert (tmp_path / "esm1b_copy-contact-regression.pt").exists()
    bundle, back = (steps[i] / "model.safetensors" for i in (1, 3))
    one, other = load_file(bundle), load_file(back)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if name == "esm.embeddings.word_embeddings.weight":
            tensor[32] = 0  # fair-esm clears the row of <mask>, which no model reads
        assert torch.equal(other[name], tensor), name
    again = EsmForMaskedLM.from_pretrained(steps[1]).state_dict()
    expected = EsmForMaskedLM.from_pretrained(theirs).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bundle",
        "deep",
        "esm1b_copy-contact-regression.pt",
        "esm1b_copy.pt",
    ]


def test_the_precision_can_be_chosen(theirs, tmp_path):
    assert export(theirs, tmp_path / "half", "--dtype", "bf16").returncode == 0
    half, full = read_weights(tmp_path / "half"), read_weights(theirs)
    for name, tensor in full.state.items():
        assert torch.equal(half.state[name], tensor.bfloat16()), name
    assert half.contact_head.weight.dtype == torch.float32
    assert half.lineage == {"converted_from": "esm1b"}
    EsmForMaskedLM.from_pretrained(tmp_path / "half")


def test_a_classifier_becomes_an_encoder_and_what_is_left_out_is_named(tmp_path):
    config = esm_config(rotary=True, layers=2, width=32, positions=128, num_labels=3)
    EsmForTokenClassification(config).save_pretrained(tmp_path / "theirs")
    done = job_in_process("export_model.py", "theirs", "ours", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "with contact head, without language-model head\n" in done.stdout
    assert "Left out: classifier.bias, classifier.weight\n" in done.stdout
    engines = [Engine.load(tmp_path / name) for name in ("theirs", "ours")]
    np.testing.assert_array_equal(*[engine.embed(["MKTAYIAKQR"]) for engine in engines])
    done = job_in_process("export_model.py", "ours", "esm2_x.pt", cwd=tmp_path)
    assert done.returncode == 2
    assert "fair-esm opens no model" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]


def structures(file, count, **columns):
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(count):
        length = int(rng.integers(40, 70))
        walk = rng.normal(size=(length, 3)).cumsum(0) * 2.5
        sequence = "".join(rng.choice(list("LAGVSERTID"), length))
        rows.append({"sequence": sequence, "cb_angstrom": walk.ravel().tolist()} | columns)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def test_the_last_checkpoints_of_a_run_are_averaged(whole, tmp_path):
    done = export(whole.folder, tmp_path / "averaged", "--average", 3)
    assert done.returncode == 0, done.stderr
    averaged = read_weights(tmp_path / "averaged")
    assert averaged.lineage["average_of_steps"] == [12, 18, 24]
    bundles = [read_weights(checkpoint_of(whole.folder, step) / "model") for step in (12, 18, 24)]
    for name, tensor in averaged.state.items():
        mean = np.mean([bundle.state[name].double().numpy() for bundle in bundles], axis=0)
        np.testing.assert_allclose(tensor.numpy(), mean, rtol=1e-6, atol=1e-12)
    assert not torch.equal(averaged.state["embed.weight"], bundles[-1].state["embed.weight"])
    Engine.load(tmp_path / "averaged").embed(["MKTAYIAKQR"])


@pytest.mark.parametrize(
    ("number", "told"),
    [(9, r"keeps 4 have a bundle, but 9 are to be averaged"), (1, "--average needs at least 2")],
)
def test_too_few_checkpoints_are_said(whole, tmp_path, number, told):
    done = export(whole.folder, tmp_path / "averaged", "--average", number)
    assert done.returncode == 2
    assert told in done.stderr
    assert not (tmp_path / "averaged").exists()


def test_a_checkpoint_of_long_ago_is_not_averaged_with_the_last(whole, tmp_path):
    """Of a run that keeps two, and its best; one of the two has no bundle."""
    shutil.copytree(whole.folder, tmp_path / "run")
    for file in (tmp_path / "run").glob("checkpoints/step-*/manifest.json"):
        manifest = json.loads(file.read_text())
        manifest["recipe"]["checkpoint"]["keep"] = 2
        if manifest["step"] == 18:
            files = manifest["files"].items()
            manifest["files"] = {n: h for n, h in files if not n.startswith("model/")}
        file.write_text(json.dumps(manifest))
    done = export(tmp_path / "run", tmp_path / "averaged", "--average", 2)
    assert done.returncode == 2
    assert "keeps 1 have a bundle, but 2 are to be averaged" in done.stderr


def test_a_contact_head_is_fitted_and_saved(theirs, tmp_path):
    file = structures(tmp_path / "s.parquet", 6)
    arguments = ("--fit-contacts", file, "--fit-proteins", 4)
    done = export(theirs, tmp_path / "fitted", *arguments)
    assert done.returncode == 0, done.stderr
    assert "heads take part" in done.stdout
    assert "on the next 2 proteins" in done.stdout
    before, after = read_weights(theirs), read_weights(tmp_path / "fitted")
    assert not torch.equal(before.contact_head.weight, after.contact_head.weight)
    assert Engine.load(tmp_path / "fitted").contacts(["MKTAYIAKQR"])[0].shape == (10, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone", "new"), "is no model folder, no checkpoint, and no run"),
        (("gone.pt", "new"), "does not exist"),
        (("{theirs}", "{theirs}"), "exists already; remove it or choose another TARGET"),
        (("{theirs}", "esm2.pt"), "names that start with esm2"),
        (("{theirs}", "new", "--fit-contacts", "gone.parquet"), "no Parquet file with the columns"),
        (
            ("{theirs}", "new", "--fit-contacts", "{short}"),
            "row 0: .* coordinates, but there are 3",
        ),
        (("{theirs}", "new", "--fit-contacts", "{short}", "--fit-proteins", "0"), "at least 1"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2_and_leaves_nothing(
    theirs, tmp_path, arguments, message
):
    short = structures(tmp_path / "short.parquet", 1, cb_angstrom=[1.0, 2.0, 3.0])
    arguments = [each.format(theirs=theirs, short=short) for each in arguments]
    done = job_in_process("export_model.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last), last
    assert [p.name for p in tmp_path.iterdir()] == ["short.parquet"]
