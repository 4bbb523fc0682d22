"""Checkpoints in an S3 bucket and on a full disk: real servers, real disks."""

import re
from types import SimpleNamespace

import pyarrow.fs
import pytest
import storages
from lone_worker import run_here
from pyarrow.fs import PyFileSystem
from small_runs import (
    EVERY,
    STEPS,
    as_recipe,
    evaluations,
    losses,
    make_recipe,
    metrics,
    run_to_the_end,
)
from stumbles import Stumbling, fill, hurry

from raptide.errors import CheckpointError, CheckpointUnsaved, ConfigError, StorageStumbled
from raptide.evaluation.beside import RunBenchmark
from raptide.evaluation.emergence import read_emergence
from raptide.inference.engine import Engine
from raptide.training.checkpoints import saving
from raptide.training.checkpoints.checkpoint import (
    SavedCheckpoint,
    find_bundle,
    newest_checkpoint,
)
from raptide.training.checkpoints.owned import Storage, checkpoint_step
from raptide.training.checkpoints.saving import send_folder
from raptide.training.planning.estimate import moving_s
from raptide.training.trainer import prepare_run
from raptide.training.watching.audit import audited_steps
from raptide.training.watching.watch import HangWatch


@pytest.fixture(scope="module")
def bucket():
    """The URI of a folder in a bucket of a local S3 server."""
    with storages.bucket("runs") as uri:
        yield uri.format("raptide")


@pytest.fixture(scope="module")
def stored(corpus, bucket, tmp_path_factory):
    """Half of the shared run, in the bucket, evaluated beside the training."""
    tree = make_recipe(corpus, steps=STEPS // 2)
    tree["checkpoint"] |= {"storage": bucket, "keep": 1, "keep_best": 1}
    folder = tmp_path_factory.mktemp("stored")
    (folder / "space.yaml").write_text("name: space\ntasks: [{kind: space}]")
    tree["evaluation"] |= {"asynchronous": True, "benchmark": str(folder / "space.yaml")}
    bench = RunBenchmark(tree["evaluation"]["benchmark"], str(folder / "run"))
    return tree, run_to_the_end(as_recipe(tree), folder / "run", bench=bench)


def test_a_run_in_a_bucket_is_the_run_on_a_disk(whole, stored):
    _, run = stored
    curve = losses(whole.folder)
    assert losses(run.folder) == {step: curve[step] for step in range(1, STEPS // 2 + 1)}
    assert not (run.folder / "checkpoints").exists()
    names = [info.base_name for info in listed(Storage.of_run(run.folder))]
    steps = [checkpoint_step(name) for name in names]
    assert steps == [EVERY, 2 * EVERY], "the best, and the newest"
    assert run.failed_evaluations == 0
    assert find_bundle(run.folder) == run.bundle
    assert Engine.load(run.bundle).lineage["step"] == STEPS // 2


def listed(storage):
    infos = storage.filesystem.get_file_info(pyarrow.fs.FileSelector(storage.path))
    return sorted((i for i in infos if i.base_name.startswith("step-")), key=lambda i: i.path)


def test_evaluation_beside_the_training_finds_what_the_workers_find(whole, stored):
    found = [evaluations(run.folder) for run in (whole, stored[1])]
    assert found[1].keys() == {EVERY, 2 * EVERY}
    for step, found_metrics in found[1].items():
        assert found_metrics.keys() == found[0][step].keys()
        assert any(name.startswith("eval/ece_length/") for name in found_metrics)
        for name, value in found_metrics.items():
            assert value == pytest.approx(found[0][step][name], abs=1e-4), name


def test_checkpoints_are_asked_a_benchmark_the_last_one_too(stored):
    tree, run = stored
    curve = {
        line["eval/step"]: {name: value for name, value in line.items() if "bench/" in name}
        for line in metrics(run.folder)
        if "eval/step" in line
    }
    assert curve.keys() == {EVERY, 2 * EVERY}
    bench = RunBenchmark(tree["evaluation"]["benchmark"], str(run.folder))
    for step, found in curve.items():
        assert found.keys() == {"bench/space/letters-silhouette"}, step
    ((value, low, high, higher),) = bench(run.bundle, 1).values()
    assert found["bench/space/letters-silhouette"] == value
    assert low <= value <= high
    assert higher
    emergence = read_emergence(run.folder)
    assert [moment.step for moment in emergence.moments] == [EVERY, 2 * EVERY]
    assert emergence.moments[-1].tokens == run.tokens
    assert emergence.moments[-1].ece == run.heldout_ece.masked_only


def test_a_run_goes_on_from_a_bucket_past_a_damaged_checkpoint(alone, whole, stored, capsys):
    """At another number of workers, from the checkpoint before the damaged one."""
    tree, run = stored
    storage = Storage.of_run(run.folder)
    name = listed(storage)[-1].base_name
    victim = f"{storage.path}/{name}/model/config.json"
    with storage.filesystem.open_output_stream(victim) as file:
        file.write(b"{}")
    tree["training"]["steps"] = STEPS // 2 + 2
    resumed = run_here(as_recipe(tree, workers=1), run.folder, resume=True)
    told = capsys.readouterr().out
    assert f"Skipping checkpoint {name}: model/config.json is damaged" in told
    assert resumed.step == STEPS // 2 + 2
    assert resumed.audit.redone_steps == EVERY
    audit, curve = dict(audited_steps(whole.folder)), losses(whole.folder)
    assert dict(audited_steps(run.folder)) == {
        step: audit[step] for step in range(1, resumed.step + 1)
    }
    for step, loss in losses(run.folder).items():
        assert loss == pytest.approx(curve[step], abs=1e-4)


OF_ALL = "mp_rank_00_model_states.pt"
SHARDS = {
    2: [OF_ALL, *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(12))],
    3: [
        f"{prefix}zero_pp_rank_{rank}_mp_rank_00_{what}_states.pt"
        for prefix, what in (("bf16_", "optim"), ("", "model"))
        for rank in range(12)
    ],
}
"""As DeepSpeed names them; test_resume.py holds that it does."""


@pytest.mark.parametrize("stage", SHARDS)
def test_a_node_fetches_from_a_bucket_what_its_ranks_load(bucket, tmp_path, monkeypatch, stage):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made, name = tmp_path / "made", f"step-{stage:08d}"
    for file in (*(f"zero/state/{shard}" for shard in SHARDS[stage]), "model/config.json"):
        (made / file).parent.mkdir(parents=True, exist_ok=True)
        (made / file).write_text(file)
    storage = Storage.at(bucket)
    files = send_folder(made, storage, name)
    saved = SavedCheckpoint(storage, name, {"files": files, "wandb_run_id": f"node-{stage}"})
    fetched, fetch = [], Storage.fetch
    monkeypatch.setattr(
        Storage, "fetch", lambda self, name, *args: (fetched.append(name), fetch(self, name, *args))
    )
    folders = {saved.shards(rank) for rank in (1, 10, 1)}
    wanted = [shard for shard in SHARDS[stage] if re.search(r"_rank_(1|10)_mp|^mp_rank", shard)]
    assert len(wanted) == {2: 3, 3: 4}[stage]
    assert sorted(fetched) == sorted(f"{name}/zero/state/{shard}" for shard in wanted)
    (folder,) = folders
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == {
        f"zero/state/{shard}" for shard in wanted
    }


def test_no_storage_holds_keys_and_an_unknown_one_is_refused(corpus, tmp_path):
    tree = make_recipe(corpus)
    tree["checkpoint"]["storage"] = "s3://key:secret@bucket/runs"
    with pytest.raises(ConfigError, match="must hold no keys") as caught:
        as_recipe(tree)
    assert "secret" not in str(caught.value)
    for field in ("corpus", "continue_from"):
        with pytest.raises(ConfigError, match="must hold no keys") as caught:
            as_recipe(make_recipe(corpus) | {field: "s3://key:secret@bucket/x"})
        assert "secret" not in str(caught.value)
    tree["checkpoint"]["storage"] = "tape://bucket/runs"
    with pytest.raises(ConfigError, match="give a URI such as s3://"):
        prepare_run(as_recipe(tree), tmp_path / "run")


def test_a_full_disk_stops_the_run_or_not_and_the_last_good_checkpoint_stays(
    alone, corpus, tmp_path
):
    tree = make_recipe(corpus, steps=2 * EVERY)
    with storages.small_disk(tmp_path / "disk", 3) as disk:  # one checkpoint has two megabytes
        tree["checkpoint"]["storage"] = disk.as_uri()
        with pytest.raises(CheckpointError, match="ended without its last checkpoint"):
            run_here(as_recipe(tree, workers=1), tmp_path / "goes-on")
        assert max(losses(tmp_path / "goes-on")) == 2 * EVERY
        saved = newest_checkpoint(Storage.of_run(tmp_path / "goes-on"))
        assert saved.step == EVERY
        assert [info.base_name for info in listed(saved.storage)] == [saved.name], "nothing half"
        saved.storage.filesystem.delete_dir(saved.storage.path)
        tree["checkpoint"]["when_unsaved"] = "stop"
        with pytest.raises(
            CheckpointUnsaved, match=r"step-00000012-\S+ could not be saved .*No space"
        ):
            run_here(as_recipe(tree, workers=1), tmp_path / "stops")
        assert newest_checkpoint(Storage.of_run(tmp_path / "stops")).step == EVERY


class Away(Stumbling):
    """Takes nothing of some checkpoints."""

    def __init__(self, *steps):
        super().__init__(10**9)
        self.steps = steps

    def stumble(self, deed, path):
        if deed in ("create_dir", "create") and any(f"step-{s:08d}" in path for s in self.steps):
            super().stumble(deed, path)


def test_a_storage_that_is_away_at_the_very_end_is_a_failure_and_no_end(
    alone, corpus, tmp_path, monkeypatch
):
    """The workers' next start finds it there again."""
    hurry(monkeypatch)
    recipe = as_recipe(make_recipe(corpus, steps=2 * EVERY), workers=1)
    allowed, progress = [], HangWatch.progress
    monkeypatch.setattr(
        HangWatch, "progress", lambda self, longer_s=0.0: allowed.append(longer_s) or progress(self)
    )
    away = Away(2 * EVERY)
    storage = Storage(PyFileSystem(away), str(tmp_path / "storage"))
    monkeypatch.setattr(Storage, "of_run", lambda folder: storage)
    monkeypatch.setattr("raptide.training.result.local_checkpoint", lambda run, saved: saved.name)
    with pytest.raises(StorageStumbled, match=rf"step-{2 * EVERY:08d}-\S+ could not be saved"):
        run_here(recipe, tmp_path / "run")
    assert [checkpoint_step(info.base_name) for info in listed(storage)] == [EVERY]
    away.steps = ()
    resumed = run_here(recipe, tmp_path / "run", resume=True)
    assert (resumed.step, resumed.audit.redone_steps) == (2 * EVERY, EVERY)
    assert allowed.count(moving_s(recipe)) > 4, "what moves checkpoints may take longer"


def test_a_full_scratch_warns_as_a_full_storage_does(alone, corpus, tmp_path, monkeypatch, capsys):
    """It was free when it was asked, and is full when DeepSpeed writes."""
    tree = make_recipe(corpus, steps=EVERY)
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(CheckpointError, match="ended without its last checkpoint"):
        run_here(as_recipe(tree, workers=1), tmp_path / "none")
    assert "has too little space on some node" in capsys.readouterr().err
    assert listed(Storage.of_run(tmp_path / "none")) == []
    free.free = 10**15
    with storages.small_disk(tmp_path / "disk", 1) as disk:  # one checkpoint has two megabytes
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        with pytest.raises(CheckpointError, match="ended without its last checkpoint"):
            run_here(as_recipe(tree, workers=1), tmp_path / "run")
    assert max(losses(tmp_path / "run")) == EVERY
    assert re.search(
        r"Warning: step-00000006-\S+ could not be saved \(rank 0: ", capsys.readouterr().err
    )
    assert listed(Storage.of_run(tmp_path / "run")) == []


def test_a_full_run_folder_neither_prevents_nor_ends_a_run(alone, corpus, tmp_path, capsys):
    """Its checkpoints lie elsewhere. A torn line, and a result that is none, are no harm either."""
    tree = make_recipe(corpus, steps=EVERY)
    tree["checkpoint"]["storage"] = (tmp_path / "storage").as_uri()
    with storages.small_disk(tmp_path / "disk", 1) as disk:
        run = disk / "run"
        run_here(as_recipe(tree, workers=1), run)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"trainer/global_st')
        (run / "result.json").write_text("")
        tree["training"]["steps"] = 2 * EVERY
        fill(disk)
        ended = run_here(as_recipe(tree, workers=1), run, resume=True)
        assert ended.step == 2 * EVERY
        assert not (run / "result.json").exists()
    told = capsys.readouterr().err
    assert "Warning: The run goes on, but its recipe was not written down (No space left" in told
    assert "metrics.jsonl loses lines (No space left on device)" in told
    assert "result.json was not written; --resume writes it (No space left on device)" in told


def test_a_storage_that_deletes_nothing_ends_no_run(alone, corpus, tmp_path, monkeypatch, capsys):
    hurry(monkeypatch)
    tree = make_recipe(corpus, steps=2 * EVERY)
    tree["checkpoint"]["keep"] = 1
    never = PyFileSystem(Stumbling(10**9, only=("delete_dir",)))
    storage = Storage(never, str(tmp_path / "storage"))
    monkeypatch.setattr(Storage, "of_run", lambda folder: storage)
    monkeypatch.setattr("raptide.training.result.local_checkpoint", lambda run, saved: saved.name)
    assert run_here(as_recipe(tree, workers=1), tmp_path / "run").step == 2 * EVERY
    assert len(listed(storage)) == 2
    told = capsys.readouterr().err
    assert "Warning: Old checkpoints were not deleted, and will be tried again: " in told
