"""Evaluation beside the training: real tasks on checkpoints of the shared run."""

import contextlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from draws import generator
from pyarrow.fs import PyFileSystem
from small_runs import EVERY, STEPS, as_recipe, checkpoint_of, evaluations, make_recipe
from stumbles import Stumbling, hurry

from raptide.errors import StorageStumbled, Superseded
from raptide.evaluation.beside import RunBenchmark
from raptide.training.checkpoints.keeping import awaiting_evaluation, prune
from raptide.training.checkpoints.owned import Storage
from raptide.training.trainer import prepare_run
from raptide.training.watching.heldout import Ece, Evaluation, Evaluations
from raptide.training.watching.progress import BoardActor
from raptide.training.watching.validation import (
    MOST_CPUS,
    RunEvaluations,
    ask_benchmark,
    free_resources,
)

GOOD, GONE, KILLED, HANGS = names = [f"step-{EVERY * n:08d}" for n in (1, 2, 3, 4)]


def test_a_task_takes_what_is_free_and_leaves_some_to_the_data():
    def free(device, *nodes):
        return free_resources(
            device, [dict(zip(("CPU", "GPU"), node, strict=True)) for node in nodes]
        )

    gpu = {"num_cpus": 0, "num_gpus": 1}
    assert free("cuda", (0, 0), (0, 1)) == gpu
    assert free("cuda", (0, 0), (3, 0.5)) == {"num_cpus": 1}, "half a GPU is none"
    assert free("cpu", (4, 1)) == {"num_cpus": 2}
    assert free("cpu", (1, 0), (1, 0), (1, 0)) == {"num_cpus": 1}, "they are on several nodes"
    assert free("cuda", (1, 0)) is free("cpu", (1.9, 8)) is free("cpu") is None
    for _ in range(100):
        nodes = [
            (int(cpus), 0) for cpus in generator().integers(0, 100, generator().integers(1, 9))
        ]
        cpus = (free("cuda", *nodes) or {"num_cpus": 0})["num_cpus"]
        free_cpus = [node[0] for node in nodes]
        assert cpus <= min(max(free_cpus), sum(free_cpus) / 2, MOST_CPUS)
        assert cpus or sum(free_cpus) < 2


@pytest.fixture
def make(whole, corpus, tmp_path):
    """Evaluations of checkpoints that lie in `tmp_path/checkpoints`."""
    for step, name in zip(range(EVERY, STEPS + 1, EVERY), names, strict=True):
        shutil.copytree(checkpoint_of(whole.folder, step), tmp_path / "checkpoints" / name)
    tree = make_recipe(corpus)
    plan = prepare_run(as_recipe(tree), tmp_path / "run")

    def make(timeout_s, bench=None):
        tree["evaluation"] |= {"asynchronous": True, "timeout_s": timeout_s}
        board, storage = BoardActor.remote(), Storage.of(tmp_path / "checkpoints")
        made = RunEvaluations(
            *(as_recipe(tree), plan, "cpu", board, {}, Evaluations()), storage=storage, bench=bench
        )
        return made, board, storage

    return make


def await_saves_of(storage, *names, **changes):
    for name in names:
        file = f"{storage.path}/{name}/manifest.json"
        with open(file) as before:
            manifest = json.load(before) | {"awaits_evaluation": True} | changes
        with open(file, "w") as after:
            json.dump(manifest, after)


def test_what_cannot_be_written_down_now_is_told_and_written_later(tmp_path, monkeypatch):
    hurry(monkeypatch)
    (tmp_path / GOOD).mkdir()
    (tmp_path / GOOD / "manifest.json").write_text('{"awaits_evaluation": true}')
    handler = Stumbling(10**9, only=("create",))
    storage = Storage(PyFileSystem(handler), str(tmp_path))
    warnings = []
    board = SimpleNamespace(warn=SimpleNamespace(remote=warnings.append))
    owners = []

    def refuse_others():
        if owners:
            raise Superseded("another one's")

    run = RunEvaluations(
        *(None, None, "cpu", board, {}, Evaluations(failed=3)),
        storage=storage,
        refuse_others=refuse_others,
    )
    run.write_down(GOOD)
    assert warnings[0].startswith(f"What {GOOD} has come to was not written down, and will be")
    with pytest.raises(StorageStumbled, match=GOOD):
        run.refuse_unwritten()
    handler.times = 0
    owners.append("another")
    run.look()
    assert (tmp_path / GOOD / "manifest.json").read_text() == '{"awaits_evaluation": true}'
    owners.clear()
    run.look()
    run.refuse_unwritten()
    manifest = json.loads((tmp_path / GOOD / "manifest.json").read_text())
    assert (manifest["awaits_evaluation"], manifest["heldout_failed"]) == (False, 3)
    assert len(warnings) == 1


def kill_evaluations():
    """Those that run, or have just ended and still have the name."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::evaluate"):
                process.kill()


def test_evaluations_that_fail_or_hang_or_die_are_counted_and_let_go(whole, make, tmp_path):
    """Two that succeed lie around one that is gone, one whose process is killed, one that hangs."""
    beside, board, storage = make(timeout_s=300)
    for name in (KILLED, HANGS):  # whoever opens a pipe waits for ever
        (tmp_path / "checkpoints" / name / "model/config.json").unlink()
        os.mkfifo(tmp_path / "checkpoints" / name / "model/config.json")
    await_saves_of(storage, *names, heldout_step=0)
    beside.take_up(last_step=4 * EVERY - 1)
    assert list(beside.waiting) == [GOOD, GONE, KILLED], "the last is evaluated by the workers"
    beside.take_up(last_step=4 * EVERY)
    beside.look()
    shutil.rmtree(tmp_path / "checkpoints" / GONE)
    prune(storage, HANGS, 1, 0, tuple(beside.waiting))
    assert (tmp_path / "checkpoints" / GOOD).exists(), "deleted while it was evaluated"
    while KILLED in list(beside.waiting)[1:]:
        beside.look()
        time.sleep(0.05)
    while KILLED in beside.waiting:
        kill_evaluations()
        beside.look()
        time.sleep(0.05)
    beside.waiting[HANGS] = time.monotonic() - 297
    beside.wait(lambda: None)
    found, *failures = beside.unlogged()
    expected = evaluations(whole.folder)[EVERY]
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-4)
    assert failures == [{"eval/failed": n} for n in (1, 2, 3)]
    assert beside.so_far.failed == 3
    assert beside.so_far.best == pytest.approx(expected["eval/ece"], abs=1e-4)
    warnings = [text.split(" was not evaluated beside the training: ") for text in warned(board)]
    assert [name for name, _ in warnings] == [GONE, KILLED, HANGS]
    reasons = [reason for _, reason in warnings]
    assert reasons[0] == "it is gone or damaged."
    assert "died" in reasons[1]
    assert reasons[2] == "it did not end within 300 s on what the cluster had free."
    assert not awaiting_evaluation(storage, 4 * EVERY)
    prune(storage, HANGS, 1, 0, tuple(beside.waiting))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == [HANGS]


def warned(board):
    return ray.get(board.read.remote())[1]


def evaluation(ece, value, low, high, *, higher=True):
    return Evaluation(Ece(ece, ece), 0.1, {}, {"contacts/p@l/long": (value, low, high, higher)})


def test_what_falls_while_the_loss_does_not_is_told():
    so_far = Evaluations()
    for step, ece, value in ((1, 15.0, 0.20), (2, 14.0, 0.30), (3, 13.5, 0.28)):
        found = evaluation(ece, value, value - 0.03, value + 0.03)
        assert so_far.collapses(found) == [], step
        so_far = so_far.after(found.ece, step, found.bench)
    so_far = Evaluations.of_manifest(json.loads(json.dumps(so_far.to_manifest())))
    assert so_far.collapses(evaluation(14.5, 0.1, 0.08, 0.12)) == [], "the loss shows it, too"
    assert so_far.collapses(evaluation(13.0, 0.25, 0.2, 0.28)) == [], "intervals overlap"
    (sentence,) = so_far.collapses(evaluation(13.0, 0.1, 0.08, 0.12))
    assert "contacts/p@l/long has become worse (0.300 to 0.100)" in sentence
    assert "held-out ECE has not (14.000 to 13.000)" in sentence


def test_where_lower_is_better_a_rise_is_told():
    found = evaluation(15.0, 17.0, 16.5, 17.5, higher=False)
    so_far = Evaluations().after(found.ece, 1, found.bench)
    assert so_far.collapses(evaluation(14.0, 16.0, 15.0, 17.0, higher=False)) == []
    assert len(so_far.collapses(evaluation(14.0, 19.0, 18.0, 20.0, higher=False))) == 1


@ray.remote
class Trainer:
    """Holds what it was started with."""

    def ready(self):
        return True


def test_nothing_waits_for_ever_where_nothing_is_free(make):
    beside, board, storage = make(timeout_s=1)
    taken = Trainer.options(num_cpus=int(ray.available_resources()["CPU"])).remote()
    assert ray.get(taken.ready.remote())
    await_saves_of(storage, GOOD, GONE)
    began = time.monotonic()
    beside.take_up(last_step=4 * EVERY)
    beside.wait(lambda: None)
    assert 1 < time.monotonic() - began < 30
    assert [line.split()[0] for line in warned(board)] == [GOOD, GONE]
    assert beside.so_far == Evaluations(failed=2)
    assert Evaluations.of_manifest(beside.so_far.to_manifest()) == beside.so_far
    ray.kill(taken)


def test_a_number_that_is_none_never_counts_as_the_best():
    for higher in (True, False):
        so_far = Evaluations()
        for step, value in ((1, math.nan), (2, 0.3), (3, math.nan)):
            found = evaluation(14.0, value, value - 0.03, value + 0.03, higher=higher)
            so_far = so_far.after(found.ece, step, found.bench)
        ((best, _, _),) = so_far.bench_best.values()
        assert best == 0.3


def test_a_benchmark_that_fails_costs_no_evaluation_and_is_told_once(whole, make, tmp_path):
    """Its data vanish while the run goes on."""
    (tmp_path / "b.yaml").write_text("name: b\ntasks: [{kind: space, domains: gone.csv}]")
    bench = RunBenchmark(str(tmp_path / "b.yaml"), str(tmp_path / "run"))
    beside, board, storage = make(timeout_s=300, bench=bench)
    await_saves_of(storage, GOOD, GONE, heldout_step=0)
    beside.take_up(last_step=2 * EVERY)
    beside.wait(lambda: None)
    lines = beside.unlogged()
    assert [line["eval/step"] for line in lines] == [EVERY, 2 * EVERY]
    expected = evaluations(whole.folder)[EVERY]
    assert lines[0] == pytest.approx(expected, abs=1e-4)
    assert beside.so_far.failed == 0
    (sentence,) = warned(board)
    assert f"Step {EVERY}: the benchmark gave nothing (" in sentence
    assert "gone.csv cannot be read" in sentence


def test_a_benchmark_beside_a_training_on_gpus_gets_a_cpu_all_the_same():
    asked = []
    assert ask_benchmark(lambda bundle, cpus: asked.append(cpus) or {}, Path("bundle"), 0) == (
        {},
        "",
    )
    assert asked == [1], "torch takes no number of threads below 1"
