"""Real runs: Ray Train workers, DeepSpeed, checkpoints; a few, shared among the tests."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch
from lone_worker import run_here
from offline_wandb import read_runs
from small_runs import (
    EVERY,
    ROWS,
    STEPS,
    as_recipe,
    evaluations,
    losses,
    make_recipe,
    run_to_the_end,
)
from training_processes import training_processes
from transformers import EsmForMaskedLM

from raptide.errors import (
    CheckpointError,
    ConfigError,
    CorpusError,
    StreamStalled,
    TrainingDiverged,
)
from raptide.inference.engine import Engine
from raptide.model.formats.detect import read_weights
from raptide.training.checkpoints.export import read_model, read_zero_weights
from raptide.training.planning.estimate import checkpoint_bytes
from raptide.training.run_folder import load_resumed
from raptide.training.trainer import prepare_run, pretrain
from raptide.training.watching.audit import audited_steps

OF_A_RUN = ("ray::RayTrainWorker", "ray::TrainController", "ray::Board", "ray::Feeder")


def test_a_run_leaves_what_it_promises(whole):
    assert whole.step == STEPS
    assert sorted(losses(whole.folder)) == list(range(1, STEPS + 1))
    names = sorted(p.name for p in (whole.folder / "checkpoints").glob("step-*"))
    (attempt,) = (whole.folder / "checkpoints/attempts").iterdir()
    assert names == [f"step-{step:08d}-{attempt.name}" for step in range(EVERY, STEPS + 1, EVERY)]
    manifest = json.loads((whole.checkpoint / "manifest.json").read_text())
    on_disk = {
        str(p.relative_to(whole.checkpoint)) for p in whole.checkpoint.rglob("*") if p.is_file()
    }
    assert set(manifest["files"]) | {"manifest.json"} == on_disk
    assert manifest["tokens"] == whole.tokens
    assert (
        manifest["wandb_run_id"]
        == json.loads((whole.folder / "run.json").read_text())["wandb_run_id"]
    )


def test_a_run_leaves_no_process(whole):
    """Ray ends no actor whose handle was pickled, as Ray Train does, nor one that a handler of
    Ctrl-C holds on to."""
    assert not signal.getsignal(signal.SIGINT).__module__.startswith("ray")
    until = time.monotonic() + 30
    while left := training_processes(OF_A_RUN):
        assert time.monotonic() < until, [psutil.Process(each).cmdline() for each in left]
        time.sleep(0.1)


def test_the_model_learns_and_the_baselines_are_sane(whole):
    assert whole.uniform_ece == 25
    assert 16.5 < whole.unigram_ece.all_chosen < 18.5
    first = json.loads((whole.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert whole.heldout_ece.all_chosen < 0.9 * first["train/ece"]


def test_each_packed_row_is_used_once(whole):
    ids = [row[:3] for _, rows in audited_steps(whole.folder) for row in rows]
    assert len(ids) == len(set(ids)) == ROWS
    assert (whole.audit.steps, whole.audit.rows) == (STEPS, ROWS)
    assert (whole.audit.attempts, whole.audit.redone_steps) == (1, 0)
    assert json.loads((whole.folder / "audit.json").read_text()) == asdict(whole.audit)


def test_the_bundle_opens_in_transformers_and_in_the_engine(whole):
    EsmForMaskedLM.from_pretrained(whole.bundle)
    engine = Engine.load(whole.bundle)
    assert engine.lineage["step"] == STEPS
    assert engine.embed(["MKTAYIAKQR"]).shape == (1, 64)


CHARTS = {
    *("train/loss", "train/ece", "train/grad_norm", "train/lr"),
    *("train/nonfinite_targets", "train/skipped_steps", "train/spikes"),
    *("progress/tokens", "progress/epoch"),
    *("speed/step_s", "speed/tokens_per_s", "speed/padded_tokens_per_s"),
    *("speed/padding_percent", "speed/data_wait_fraction", "speed/model_tflops"),
    *("speed/checkpoint_s", "speed/checkpoint_stall_s"),
    *("system/memory_gb", "system/workers", "system/restarts"),
    *("eval/ece", "eval/ece_masked", "eval/accuracy_masked", "eval/ece_length/1-128"),
}


def test_wandb_holds_the_run_and_its_lineage_under_its_stable_id(whole, corpus):
    ((run_id, config, history, artifacts),) = read_runs(whole.folder / "wandb")
    assert run_id == json.loads((whole.folder / "run.json").read_text())["wandb_run_id"]
    assert config["model"]["width"] == 64
    assert config["corpus_manifest"]["digest"] == corpus.digest
    assert config["code_version"].startswith("0.1.0")
    assert artifacts == [
        ("corpus", f"corpus-{corpus.digest[:16]}", [(corpus.path / "manifest.json").as_uri()]),
        ("model", f"model-{run_id}", sorted(file.as_uri() for file in whole.bundle.iterdir())),
    ]
    assert [row["trainer/global_step"] for row in history] == list(range(1, STEPS + 1))
    assert set(history[-1]) >= CHARTS
    assert history[-1]["eval/ece"] == pytest.approx(whole.heldout_ece.all_chosen)


def test_a_finished_run_is_neither_resumed_nor_overwritten_silently(whole, corpus):
    recipe = as_recipe(make_recipe(corpus))
    with pytest.raises(ConfigError, match="exists already; go on with --resume"):
        prepare_run(recipe, whole.folder)
    with pytest.raises(ConfigError, match="no run folder"):
        prepare_run(recipe, whole.folder.parent, replace=True)
    gone = as_recipe(make_recipe(corpus) | {"corpus": "gone"})
    with pytest.raises(CorpusError, match="no finished corpus"):
        prepare_run(gone, whole.folder, replace=True)
    assert whole.bundle.exists(), "a replacement that was refused has deleted the run"


@pytest.mark.parametrize("name", ["run[1]", "a*", "b?"])
def test_a_folder_that_deepspeed_would_take_for_a_pattern_is_refused(corpus, tmp_path, name):
    with pytest.raises(ConfigError, match="A run folder's path may not hold"):
        prepare_run(as_recipe(make_recipe(corpus)), tmp_path / name / "run")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_no_run_starts_on_a_damaged_corpus(corpus, tmp_path, damage):
    copy = tmp_path / "corpus"
    shutil.copytree(corpus.path, copy)
    shard = copy / corpus.manifest["shards"][-1]["name"]
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[:-100])
    else:
        shard.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    recipe = as_recipe(make_recipe(corpus) | {"corpus": str(copy)})
    expected = corpus.manifest["shards"][-1]["sha256"]
    told = "missing" if damage == "missing" else f"damaged: expected sha256 {expected}"
    with pytest.raises(CorpusError, match=f"{shard.name} is {told}"):
        prepare_run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resume_with_another_stream_or_model_is_refused(whole, corpus):
    assert load_resumed(whole.folder) == whole.folder / "recipe.yaml"
    tree = make_recipe(corpus)
    other_seed = as_recipe(tree | {"stream": tree["stream"] | {"seed": 4}})
    with pytest.raises(CheckpointError, match=r"stream\.seed=3.*cannot change to 4"):
        prepare_run(other_seed, whole.folder, resume=True)
    other_model = as_recipe(tree | {"model": tree["model"] | {"layers": 3}})
    with pytest.raises(CheckpointError, match=r"model\.layers=2"):
        prepare_run(other_model, whole.folder, resume=True)


def signal_a_worker(
    run: Path, number: signal.Signals, *, restarts: int, at_step: int, which: int
) -> None:
    """Signal one training worker once the run, after so many restarts, has logged a step."""
    deadline = time.monotonic() + 240
    while (restarts, at_step) not in logged(run):
        assert time.monotonic() < deadline, "the run never got that far"
        time.sleep(0.02)
    os.kill(training_processes()[which], number)


def logged(run: Path) -> set[tuple[int, int]]:
    """(restarts, step) of every whole line of the metrics."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    rows = map(json.loads, lines)
    return {(row["system/restarts"], row["trainer/global_step"]) for row in rows}


def test_killed_and_hanging_workers_change_nothing(whole, corpus, tmp_path):
    results = []
    recipe = as_recipe(make_recipe(corpus, tracked=True), hang_timeout_s=40)
    thread = threading.Thread(
        target=lambda: results.append(run_to_the_end(recipe, tmp_path / "run"))
    )
    thread.start()
    run = tmp_path / "run"
    signal_a_worker(run, signal.SIGKILL, restarts=0, at_step=EVERY + 2, which=0)
    signal_a_worker(run, signal.SIGSTOP, restarts=1, at_step=2 * EVERY, which=-1)
    thread.join()
    (killed,) = results
    assert (2, STEPS) in logged(killed.folder), "a kill came too late to interrupt anything"
    assert abs(killed.heldout_ece.all_chosen - whole.heldout_ece.all_chosen) < 1e-4
    assert dict(audited_steps(killed.folder)) == dict(audited_steps(whole.folder))
    assert killed.audit.digest == whole.audit.digest
    assert killed.audit.attempts == 3
    assert 1 <= killed.audit.longest_redone < 2 * EVERY, "a save may have been on its way"
    same = [(r.bundle / "model.safetensors").read_bytes() for r in (killed, whole)]
    assert same[0] == same[1], "the weights differ in at least one bit"
    (stack,) = (run / "hangs").iterdir()  # the other worker was stopped, and could not write
    assert "all_reduce" in stack.read_text(), "it did not wait for the one that was stopped"
    # A killed worker takes with it what W&B had not written down yet, which may be all.
    tracked = [start for start in read_runs(run / "wandb") if start[0]]
    info = json.loads((run / "run.json").read_text())
    assert {run_id for run_id, *_ in tracked} == {info["wandb_run_id"]}
    steps = [[row["trainer/global_step"] for row in history] for _, _, history, _ in tracked]
    assert [sorted(each) for each in steps] == steps
    assert steps[-1][-1] == STEPS


def test_a_damaged_block_ends_the_run_at_once_with_its_name(corpus, tmp_path):
    """And no half-made run is left."""
    copy = tmp_path / "corpus"
    shutil.copytree(corpus.path, copy)
    tree = make_recipe(corpus) | {"corpus": str(copy)}
    plan = prepare_run(as_recipe(tree), tmp_path / "run")
    shard = copy / corpus.manifest["shards"][0]["name"]
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(CorpusError, match=f"{shard.name}, row group"):
        pretrain(as_recipe(tree), plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_data_stall_is_a_failure_and_is_tried_again(corpus, tmp_path):
    tree = make_recipe(corpus) | {"name": "stalled"}
    recipe = as_recipe(tree, data_timeout_s=0.001, workers=1, max_failures=1)
    with pytest.raises(StreamStalled, match="a data stall, not a slow model"):
        run_to_the_end(recipe, tmp_path / "run")
    attempts = (tmp_path / "run/checkpoints/attempts").iterdir()
    assert sorted(attempt.name[:6] for attempt in attempts) == ["000001", "000002"]


def test_a_run_starts_from_weights_and_ends_when_it_improves_no_more(whole, corpus, tmp_path):
    """At a rate too small to change a bit, every evaluation finds the ECE of the start."""
    tree = make_recipe(corpus) | {"init_from": str(whole.folder)}
    tree["optimizer"]["lr"] = 1e-30
    tree["evaluation"]["patience"] = 1
    tree["cluster"]["peak_tflops"] = 0.5
    other = as_recipe(tree | {"model": tree["model"] | {"width": 32}})
    with pytest.raises(ConfigError, match=r"has model.width 64, but the recipe asks for 32"):
        prepare_run(other, tmp_path / "run")
    run = run_to_the_end(as_recipe(tree), tmp_path / "run")
    assert run.step == 2 * EVERY < STEPS
    assert run.heldout_ece == whole.heldout_ece
    assert_same_weights(run.bundle, whole.bundle)
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["speed/mfu"] == pytest.approx(2 * last["speed/model_tflops"])
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    estimate = checkpoint_bytes(as_recipe(tree))
    size = sum(p.stat().st_size for p in run.checkpoint.rglob("*") if p.is_file())
    assert size == pytest.approx(estimate, rel=0.1)


def test_a_run_whose_loss_is_no_number_stops_and_says_so(alone, corpus, tmp_path):
    tree = make_recipe(corpus, max_nonfinite_steps=3)
    tree["optimizer"] = {"lr": 1e30, "warmup_steps": 1}
    tree["checkpoint"]["every_steps"] = 2
    with pytest.raises(TrainingDiverged, match="NaN or infinite in 3 steps in a row, up to step 4"):
        run_here(as_recipe(tree, workers=1), tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))
    lines = list(map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()))
    assert [line["train/nonfinite_targets"] > 0 for line in lines] == [False, True, True]


def assert_same_weights(one, other):
    one, other = (read_weights(bundle).state for bundle in (one, other))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def assert_shards_hold_the_bundle(checkpoint):
    """A checkpoint without a bundle exports too: the weights come out of DeepSpeed's shards."""
    bundle = read_weights(checkpoint / "model").state
    (checkpoint / "model").rename(checkpoint / "elsewhere")
    shards = read_model(checkpoint)
    assert shards.lineage["step"] == json.loads((checkpoint / "manifest.json").read_text())["step"]
    assert shards.state.keys() == bundle.keys()
    for name, tensor in bundle.items():
        assert torch.equal(shards.state[name], tensor), name
    (checkpoint / "elsewhere").rename(checkpoint / "model")
    victim = min((checkpoint / "zero/state").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{victim.name} is damaged"):
        read_zero_weights(checkpoint)


@pytest.mark.parametrize(
    ("stage", "precision", "before", "after", "saved_at", "tolerance"),
    [
        pytest.param(0, "fp32", 2, 1, EVERY, 1e-4, marks=pytest.mark.thorough),
        (1, "fp32", 1, 2, STEPS - 4, 1e-4),  # nearly all of it on one worker
        (2, "bf16", 2, 1, EVERY, 3e-2),
        (3, "fp32", 2, 1, EVERY, 1e-4),
    ],
)
def test_every_zero_stage_trains_saves_and_resumes_at_any_size(
    whole, alone, corpus, tmp_path, stage, precision, before, after, saved_at, tolerance
):
    """Up to a checkpoint at one size, on at another; the curve is that of ZeRO-2 throughout."""
    # At this width stage 3 would keep every parameter whole, and nothing would be gathered.
    split_all = {"zero3_keep_whole_below": 0} if stage == 3 else {}
    options = split_all | {
        "checkpoint_activations": stage in (1, 3),
        "compile": stage == 0,
        "offload_optimizer": stage == 1,
    }
    tree = make_recipe(corpus, steps=saved_at, zero_stage=stage, precision=precision, **options)
    # What compiles stays in a process of its own: Dynamo's warnings would be errors here.
    run = {1: run_to_the_end if options["compile"] else run_here, 2: run_to_the_end}
    run[before](as_recipe(tree, workers=before), tmp_path / "run")
    tree["training"]["steps"] = saved_at + 4
    resumed = run[after](as_recipe(tree, workers=after), tmp_path / "run", resume=True)
    assert resumed.step == saved_at + 4
    curve = losses(whole.folder)
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(curve[step], abs=tolerance), f"step {step}"
    found, expected = (evaluations(run) for run in (tmp_path / "run", whole.folder))
    assert saved_at == STEPS - 4 or EVERY in found
    for step in found.keys() & expected.keys():
        assert found[step]["eval/ece"] == pytest.approx(expected[step]["eval/ece"], rel=tolerance)
    engine = Engine.load(resumed.bundle, dtype="fp32")
    assert engine.lineage["workers"] == after
    assert_shards_hold_the_bundle(resumed.checkpoint)
    weight = engine.model.layers[0].fc1.weight
    assert not torch.equal(weight, weight.bfloat16().float()), "the bundle lost the fp32 weights"


MUON_CLOSE = 1e-2
"""Nats; a step is computed of directions in bf16, and its size is not that of the gradients."""


@pytest.fixture(scope="module")
def whole_muon(alone, corpus, tmp_path_factory):
    recipe = as_recipe(muon_recipe(corpus, STEPS, 0), workers=1)
    return run_here(recipe, tmp_path_factory.mktemp("muon") / "whole")


def muon_recipe(corpus, steps, stage):
    tree = make_recipe(corpus, steps=steps, zero_stage=stage)
    tree["optimizer"] |= {"matrices": "muon", "lr": 2e-3}
    return tree


@pytest.mark.thorough
@pytest.mark.parametrize(("stage", "before", "after"), [(0, 1, 2), (1, 2, 1), (2, 1, 2)])
def test_muon_trains_saves_and_resumes_at_any_size(
    whole_muon, alone, corpus, tmp_path, stage, before, after
):
    run = {1: run_here, 2: run_to_the_end}
    run[before](as_recipe(muon_recipe(corpus, EVERY, stage), workers=before), tmp_path / "run")
    recipe = as_recipe(muon_recipe(corpus, STEPS, stage), workers=after)
    resumed = run[after](recipe, tmp_path / "run", resume=True)
    assert resumed.audit.digest == whole_muon.audit.digest
    assert resumed.audit.redone_steps == 0
    curve = losses(whole_muon.folder)
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(curve[step], abs=MUON_CLOSE), f"step {step}"
