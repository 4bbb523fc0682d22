"""Every field of a recipe on a resume: it takes effect, or is refused by name."""

import copy
import errno
import json
import shutil
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
import torch
import wandb
import yaml
from lone_worker import run_here
from offline_wandb import read_runs
from pyarrow.fs import PyFileSystem
from small_runs import (
    STEPS,
    as_recipe,
    checkpoint_of,
    evaluations,
    losses,
    make_recipe,
    metrics,
)
from stumbles import Stumbling, hurry

from raptide.alphabet import ESM_33
from raptide.config import Settings, parse_settings
from raptide.data.streaming.stream import Source, StreamPlan
from raptide.errors import CheckpointError
from raptide.training.batches import empty_micro_batch
from raptide.training.checkpoints.checkpoint import (
    ZERO,
    ZERO_TAG,
    SavedCheckpoint,
    find_bundle,
)
from raptide.training.checkpoints.owned import Storage
from raptide.training.checkpoints.saving import send_folder
from raptide.training.checkpoints.step_bundle import full_tensors
from raptide.training.engine import build_engine, load_state
from raptide.training.planning.optimizer import learning_rate
from raptide.training.planning.recipe import Recipe
from raptide.training.trainer import prepare_run

REFUSED = {
    "init_from": "models/other",
    "stream.row_tokens": 512,
    "stream.crop_tokens": 64,
    "stream.batch_rows": 8,
    "stream.first_batch_rows": 3,
    "stream.batch_warmup_steps": 9,
    "stream.fraction": 0.5,
    "stream.seed": 4,
    "stream.sampling": "all",
    "stream.mask_fraction": 0.2,
    "model.family": "esm1b",
    "model.layers": 3,
    "model.width": 32,
    "model.heads": 2,
    "model.ffn": 100,
    "model.norm_eps": 1e-3,
    "model.max_positions": 2048,
    "model.norm_before": True,
    "continue_from": "runs/other",
    "optimizer.matrices": "muon",
    "optimizer.fused": False,
    "training.precision": "bf16",
    "training.zero_stage": 1,
    "training.seed": 2,
    "training.rotary_base": 1000.0,
    "checkpoint.storage": "file:///elsewhere",
    "evaluation.blocks": 2,
    "evaluation.seed": 8,
}
"""Every one of them on its own, by `prepare_run`."""

IN_ENGINE = {
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.95,
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 0.25,
    "training.micro_batch_rows": 5,
    "training.checkpoint_activations": True,
}
"""All at once; seen in an engine that has loaded its state, at every ZeRO stage."""

IN_RUN = {
    "name": "renamed",
    "corpus.path": "the same corpus, moved",
    "optimizer.lr": 2e-3,
    "optimizer.warmup_steps": 2,
    "optimizer.decay": "stable",
    "optimizer.cooldown": 0.5,
    "training.steps": STEPS + 4,
    "cluster.workers": 1,
    "cluster.peak_tflops": 0.5,
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 1,
    "checkpoint.keep_best": 1,
    "evaluation.every_steps": 2,
    "tracking.log_every": 2,
    "tracking.audit": False,
}
"""All at once; seen in what a run leaves that goes on with them."""

FREE = {
    "stream.lookahead_mb": 300,
    "training.max_nonfinite_steps": 3,
    "training.offload_optimizer": True,
    "training.offload_parameters": False,
    "training.compile": True,
    "training.zero3_keep_whole_below": 5,
    "training.bucket_elements": 1000,
    "training.overlap_comm": False,
    "cluster.device": "auto",
    "cluster.cpus_per_worker": 2,
    "cluster.worker_resources": {"trainer": 1.0},
    "cluster.resize_check_s": 5.0,
    "cluster.max_failures": 1,
    "cluster.data_timeout_s": 5.0,
    "cluster.hang_timeout_s": 5.0,
    "cluster.check_first": True,
    "checkpoint.when_unsaved": "stop",
    "checkpoint.bundle_every": 3,
    "checkpoint.average_over": 2,
    "evaluation.asynchronous": True,
    "evaluation.benchmark": "b.yaml",
    "evaluation.timeout_s": 60.0,
    "evaluation.patience": 5,
    "evaluation.until_ece_masked": 3.0,
    "tracking.mode": "disabled",
    "tracking.project": "other",
}
"""Read from the recipe at every start, kept by no state; they change no number of a step."""

OF_SEVERAL_CORPORA = {"corpus.weight"}

OF_MUON = {"optimizer.muon_lr", "optimizer.muon_momentum"}
"""Seen in test_muon.py."""


def fields_of(settings, section=""):
    for name, field in settings.model_fields.items():
        types = (field.annotation, *get_args(field.annotation))
        inner = [t for t in types if isinstance(t, type) and issubclass(t, Settings)]
        if inner:
            yield from fields_of(inner[0], f"{section}{name}.")
        else:
            yield f"{section}{name}"


def changed(tree, changes):
    """A recipe with some fields changed."""
    tree = copy.deepcopy(tree)
    for field, value in changes.items():
        *sections, name = field.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return parse_settings(Recipe, tree, source="test")


def test_every_field_has_its_rule():
    rules = [*REFUSED, *IN_ENGINE, *IN_RUN, *FREE, *OF_SEVERAL_CORPORA, *OF_MUON]
    assert len(rules) == len(set(rules))
    assert set(rules) == set(fields_of(Recipe))


@pytest.mark.parametrize("field", REFUSED)
def test_what_cannot_change_is_refused_by_name(whole, corpus, field):
    others = {"model.norm_before": {"model.family": "esm1b"}}.get(field, {})
    recipe = changed(make_recipe(corpus), {**others, field: REFUSED[field]})
    name = "model.family" if others else field
    with pytest.raises(CheckpointError, match=rf"was saved with {name}=.*, which a resumed run"):
        prepare_run(recipe, whole.folder, resume=True)


def test_the_weights_of_a_mixture_cannot_change():
    def plan(*weights):
        sources = tuple(Source(f"/c/{n}", f"digest{n}", w) for n, w in enumerate(weights))
        return StreamPlan(sources, changed(NO_CORPUS, {}).stream, ESM_33.name)

    manifest = {"recipe": changed(NO_CORPUS, {}).model_dump(), "fingerprint": {}}
    saved = SavedCheckpoint(Storage.of("."), "step-00000001", manifest)
    manifest["fingerprint"] = plan(1.0, 1.0).fingerprint()
    with pytest.raises(CheckpointError, match=r"corpus_digest: .* the corpus settings"):
        saved.refuse_other_run(plan(1.0, 2.0).fingerprint(), changed(NO_CORPUS, {}))
    manifest["fingerprint"] = plan(1.0).fingerprint()
    saved.refuse_other_run(plan(2.0).fingerprint(), changed(NO_CORPUS, {}))  # all of it is all


@pytest.mark.parametrize("field", FREE)
def test_what_is_read_anew_is_not_refused(whole, corpus, field):
    needs = {"evaluation.asynchronous": True}
    others = needs if field in ("evaluation.benchmark", "checkpoint.average_over") else {}
    recipe = changed(make_recipe(corpus), {**others, field: FREE[field]})
    prepare_run(recipe, whole.folder, resume=True)


def test_a_resumed_run_follows_its_recipe(whole, alone, corpus, tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(whole.folder, folder)
    shutil.copytree(corpus.path, moved)
    changes = {field: value for field, value in IN_RUN.items() if field != "corpus.path"}
    recipe = changed(make_recipe(corpus, tracked=True), {**changes, "corpus": str(moved)})
    result = run_here(recipe, folder, resume=True)
    wandb.teardown()  # its service runs beside this process
    assert result.step == STEPS + 4
    assert result.audit is None
    manifest = json.loads((result.checkpoint / "manifest.json").read_text())
    assert manifest["workers"] == 1
    kept = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert manifest["recipe"] == kept
    assert kept["corpus"] == str(moved)
    lines = [line for line in metrics(folder) if line["trainer/global_step"] > STEPS]
    assert [line["trainer/global_step"] for line in lines] == [STEPS + 2, STEPS + 4]
    for line in lines:
        step = line["trainer/global_step"]
        assert line["train/lr"] == learning_rate(recipe.optimizer, step, STEPS + 4)
        assert "speed/mfu" in line
    assert {STEPS + 2, STEPS + 4} <= set(evaluations(folder))
    left = {path.name for path in (folder / "checkpoints").glob("step-*")}
    assert len(left) <= 2, "of those before, only the best one stays"
    assert result.checkpoint.name in left
    assert read_runs(folder / "wandb")[-1][1]["name"] == "renamed"


def test_a_run_ends_where_it_was_to_come(alone, corpus, tmp_path):
    tree = make_recipe(corpus, steps=1000)
    tree["evaluation"] |= {"every_steps": 2, "until_ece_masked": 24.5}
    result = run_here(as_recipe(tree, workers=1), tmp_path / "run")
    assert result.step < 200
    assert result.heldout_ece.masked_only <= 24.5
    found = evaluations(tmp_path / "run")
    assert all(found[step]["eval/ece_masked"] > 24.5 for step in found if step < result.step)
    assert result.step in found


def test_some_checkpoints_hold_a_bundle_and_a_run_goes_on_from_any(alone, corpus, tmp_path):
    tree = make_recipe(corpus, steps=5)
    tree["checkpoint"] |= {"every_steps": 1, "bundle_every": 3}
    recipe, run = as_recipe(tree, workers=1), tmp_path / "run"
    whole = run_here(recipe, run)
    curve = losses(run)
    bundles = [(checkpoint_of(run, step) / "model").exists() for step in range(1, 6)]
    assert bundles == [False, False, True, False, True], "every third, and the last one"
    assert whole.bundle == checkpoint_of(run, 5) / "model"
    shutil.rmtree(checkpoint_of(run, 5))
    (run / "result.json").unlink()
    assert find_bundle(run) == checkpoint_of(run, 3) / "model"
    resumed = run_here(recipe, run, resume=True)
    assert resumed.audit.redone_steps == 1
    assert losses(run) == curve
    assert resumed.bundle == checkpoint_of(run, 5) / "model"


NO_CORPUS = {
    "name": "tiny",
    "corpus": "corpora/none",
    "stream": {"row_tokens": 64, "crop_tokens": 64, "batch_rows": 1},
    "model": {"layers": 1, "width": 16, "heads": 2},
    "training": {"steps": 2, "micro_batch_rows": 1},
    "cluster": {"workers": 1, "device": "cpu"},
}


def save_engine(engine, recipe, folder, workers):
    """A checkpoint of an engine after one update, as of so many workers."""
    nothing = empty_micro_batch(ESM_33, engine.device)
    engine.backward(engine(nothing.packed, nothing.targets).sum())
    engine.step()
    name = "step-00000001"
    engine.save_checkpoint(str(folder / name / ZERO), tag=ZERO_TAG, save_latest=False)
    manifest = {
        "step": 1,
        "recipe": recipe.model_dump(),
        "workers": workers,
        "wandb_run_id": folder.name,
        "inv_freq": engine.module.inv_freq.tolist(),
        "files": {},
    }
    return SavedCheckpoint(Storage.of(folder), name, manifest)


@pytest.mark.parametrize(
    ("stage", "workers", "precision"),
    [
        *((0, 1, "fp32"), (0, 1, "bf16")),
        *((1, 1, "bf16"), (2, 1, "fp32"), (2, 2, "fp32")),
        *((3, 1, "bf16"), (3, 2, "fp32")),
    ],
)
def test_a_resumed_engine_follows_its_recipe(on_cpu, tmp_path, stage, workers, precision):
    """A checkpoint of two workers takes the way by DeepSpeed's universal format."""
    kind = {"training.zero_stage": stage, "training.precision": precision}
    before, after = changed(NO_CORPUS, kind), changed(NO_CORPUS, kind | IN_ENGINE)
    engine = build_engine(before, 1, "cpu", None)
    saved = save_engine(engine, before, tmp_path, workers)
    resumed = build_engine(after, 1, "cpu", saved)
    load_state(resumed, saved, 1)
    for group in resumed.optimizer.param_groups:
        assert tuple(group["betas"]) == (0.8, 0.95)
        assert (group["eps"], group["weight_decay"]) == (1e-6, 0.1)
    assert resumed.gradient_clipping() == 0.25
    assert getattr(resumed.optimizer, "clip_grad", 0.25) == 0.25
    assert resumed.train_micro_batch_size_per_gpu() == 5
    assert resumed.module.checkpoint_activations


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_shards_of_a_file_system_that_stumbles_are_read_again(on_cpu, tmp_path, monkeypatch, stage):
    recipe = changed(NO_CORPUS, {"training.zero_stage": stage, "training.precision": "fp32"})
    engine = build_engine(recipe, 1, "cpu", None)
    saved = save_engine(engine, recipe, tmp_path, 1)
    resumed = build_engine(recipe, 1, "cpu", saved)
    hurry(monkeypatch)
    tries, through = Counter(), torch.load

    def stumbles_first(file, *args, **kwargs):
        tries[str(file)] += 1
        if tries[str(file)] == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        return through(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", stumbles_first)
    load_state(resumed, saved, 1)
    assert min(tries.values()) >= 2
    found, expected = (dict(full_tensors(each, recipe.training)) for each in (resumed, engine))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("stage", "precision", "loaded"),
    [
        (0, "fp32", {"mp_rank_00_model_states.pt"}),
        (0, "bf16", {"mp_rank_00_model_states.pt"}),
        (1, "fp32", {"mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"}),
        (
            2,
            "bf16",
            {"mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"},
        ),
        (
            3,
            "bf16",
            {
                "zero_pp_rank_0_mp_rank_00_model_states.pt",
                "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            },
        ),
    ],
)
def test_an_engine_resumes_with_what_its_rank_fetches(
    on_cpu, tmp_path, monkeypatch, stage, precision, loaded
):
    """Of a checkpoint of two workers, so that half of its shards are another rank's."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kind = {"training.zero_stage": stage, "training.precision": precision}
    recipe = changed(NO_CORPUS, kind)
    engine = build_engine(recipe, 1, "cpu", None)
    saved = save_engine(engine, recipe, tmp_path / "saved", 1)
    folder = tmp_path / "saved" / saved.name
    for file in list((folder / ZERO / ZERO_TAG).glob("*rank_0_mp*")):
        shutil.copy(file, file.with_name(file.name.replace("rank_0_mp", "rank_1_mp")))
    remote = Storage(PyFileSystem(Stumbling(0)), str(tmp_path / "bucket"))
    saved = replace(saved, storage=remote)
    saved.manifest["files"] = send_folder(folder, remote, saved.name)
    resumed = build_engine(recipe, 1, "cpu", saved)
    load_state(resumed, saved, 1)
    (states,) = tmp_path.glob(f"raptide-*/saved/*/*/{ZERO}/{ZERO_TAG}")
    assert {file.name for file in states.iterdir()} == loaded
    for before, after in zip(engine.module.parameters(), resumed.module.parameters(), strict=True):
        held = [getattr(each, "ds_tensor", each.data) for each in (before, after)]  # ZeRO 3's part
        torch.testing.assert_close(*held)
        assert held[0].numel() > 0
